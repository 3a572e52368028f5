"""Runs the evaluation's cases through a server's /v1/chat/completions and prints the table.

Owns the HTTP side of the evaluation. Works with a server that parses tool calls and reasoning and with one
that leaves them in the content.
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from tokenizers import Tokenizer

from models.pocket.recipe.cases import Case, make_cases
from models.pocket.recipe.check import Reply, format_table, is_right, parse_message, table


def ask(client: httpx.Client, model: str, case: Case) -> Reply:
    """One case's answer; an error of the server is an empty answer."""
    response = client.post("/chat/completions", json={"model": model, **case.body})
    if response.status_code != 200:
        print(f"{case.kind}: {response.status_code} {response.text[:200]}")
        return Reply()
    return parse_message(response.json()["choices"][0]["message"], case.sample.thinking)


def evaluate(base_url: str, model: str, cases: list[Case], at_once: int) -> list[tuple[Case, Reply]]:
    """All answers, `at_once` requests in flight."""
    with httpx.Client(base_url=base_url, timeout=600.0) as client, ThreadPoolExecutor(at_once) as pool:
        return list(zip(cases, pool.map(lambda case: ask(client, model, case), cases), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:8080/v1")
    parser.add_argument("--model", default="glmserve/pocket")
    parser.add_argument("--per-kind", type=int, default=100)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--kinds", default="", help="only kinds that start with this")
    parser.add_argument("--wrong", type=Path, help="write the wrong answers here, one JSON line each")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(Path(__file__).parents[1] / "tokenizer.json"))
    made = make_cases(args.per_kind, lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids))
    cases = [case for case in made if case.kind.startswith(args.kinds)]
    start = time.monotonic()
    results = evaluate(args.base_url, args.model, cases, args.at_once)
    print(format_table(table(results)))
    print(f"{len(cases)} cases in {time.monotonic() - start:.0f} s")
    if args.wrong:
        rows = (
            {"kind": c.kind, "body": c.body, "expected": c.sample.expected, "got": r.__dict__}
            for c, r in results
            if not is_right(c, r)
        )
        args.wrong.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    main()
