"""Runs the evaluation's cases through a server's /v1/chat/completions and counts what is right.

Owns the HTTP side of the evaluation. Works with a server that parses tool calls and reasoning and with one
that leaves them in the content. Several of these may share the cases between several servers (`--shard`);
their counts are added up by report.py.
"""

import argparse
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import httpx
from tokenizers import Tokenizer

from models.pocket import FOLDER
from training.pocket.evaluation.cases import Case, make_cases
from training.pocket.evaluation.check import Reply, format_table, is_right, parse_message, table

REPORT_SECONDS, LOADING_TRIES = 20.0, 60
Results = list[tuple[Case, Reply]]


def ask(client: httpx.Client, model: str, case: Case, pause: float = 2.0) -> Reply:
    """One case's answer; an error of the server is an empty answer, one that still loads is waited for."""
    try:
        response = client.post("/chat/completions", json={"model": model, **case.body})
        for _ in range(LOADING_TRIES):
            if response.status_code != 503:
                break
            time.sleep(pause)
            response = client.post("/chat/completions", json={"model": model, **case.body})
    except httpx.HTTPError as error:
        print(f"{case.kind}: {type(error).__name__} {error}", flush=True)
        return Reply()
    if response.status_code != 200:
        print(f"{case.kind}: {response.status_code} {response.text[:200]}", flush=True)
        return Reply()
    return parse_message(response.json()["choices"][0]["message"], case.sample.thinking)


def answers(base_url: str, model: str, cases: list[Case], at_once: int) -> Iterator[tuple[Case, Reply]]:
    """Each case with its answer as it comes, `at_once` requests in flight."""
    with httpx.Client(base_url=base_url, timeout=600.0) as client, ThreadPoolExecutor(at_once) as pool:
        asked = {pool.submit(ask, client, model, case): case for case in cases}
        for future in as_completed(asked):
            yield asked[future], future.result()


def share_of(cases: list[Case], shard: str) -> list[Case]:
    """The cases of shard `i/n` (i from 0), kinds in turn, so that a run that is cut has some of each kind."""
    index, count = (int(part) for part in shard.split("/"))
    seen: dict[str, int] = {}
    turns: list[tuple[int, int]] = []
    for place, case in enumerate(cases):
        turns.append((seen.setdefault(case.kind, 0), place))
        seen[case.kind] += 1
    return [cases[place] for _, place in sorted(turns)][index::count]


def write_counts(results: Results, path: Path) -> None:
    """Right and asked by row, in one step: a reader never sees half a file."""
    path.with_suffix(".new").write_text(json.dumps(table(results)))
    path.with_suffix(".new").replace(path)


def write_wrong(results: Results, path: Path) -> None:
    rows = (
        {"kind": c.kind, "body": c.body, "expected": c.sample.expected, "got": r.__dict__}
        for c, r in results
        if not is_right(c, r)
    )
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:8080/v1")
    parser.add_argument("--model", default="glmserve/pocket")
    parser.add_argument("--per-kind", type=int, default=100)
    parser.add_argument("--needles", type=int, help="needles of each length, if not as many as --per-kind")
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--kinds", default="", help="only kinds that start with this")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="the I-th of N parts, from 0")
    parser.add_argument("--counts", type=Path, help="write right and asked by row here, after each answer")
    parser.add_argument("--wrong", type=Path, help="write the wrong answers here, one JSON line each")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    made = make_cases(
        args.per_kind,
        lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids),
        needles=args.needles,
    )
    cases = share_of([case for case in made if case.kind.startswith(args.kinds)], args.shard)
    start = reported = time.monotonic()
    results: Results = []
    for result in answers(args.base_url, args.model, cases, args.at_once):
        results.append(result)
        if args.counts:
            write_counts(results, args.counts)
        if args.wrong:
            write_wrong(results, args.wrong)
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            right = sum(is_right(case, reply) for case, reply in results)
            print(f"{reported - start:.0f} s: {len(results)} of {len(cases)}, {right} right", flush=True)
    print(format_table(table(results)))
    print(f"{len(cases)} cases in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
