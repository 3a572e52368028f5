"""Runs the evaluation's cases on a training checkpoint in torch, as it will ship, and prints the table.

Owns the loop and the indexer's mutants, which show how much the long prompts live on the selection.
"""

import argparse
import json
import time
from pathlib import Path

from tokenizers import Tokenizer

from models.pocket import FOLDER
from training.pocket.data.render import prompt_text
from training.pocket.data.sample import Sample, assistant, user
from training.pocket.evaluation.cases import MAX_TOKENS, Case, make_cases
from training.pocket.evaluation.check import Reply, format_table, is_right, parse_text, table
from training.pocket.evaluation.generate import Request, decode_all
from training.pocket.files.baking import bake
from training.pocket.files.export import end_ids, load_checkpoint
from training.pocket.files.importing import load_shipped
from training.pocket.network.model import Indexer, Pocket
from training.pocket.network.mutants import MUTANTS

PROBES = (
    "hi",
    "hello!",
    "who are you?",
    "What is 17+25?",
    "What is 348 + 275?",
    "what is the capital of France?",
    "Answer in JSON with keys a and b: a is 1 and b is 2",
    "What is 12*7?",
    "Tell me something interesting",
    "If I have 3 apples and eat one, how many are left?",
)


def run_cases(model: Pocket, tokenizer: Tokenizer, cases: list[Case]) -> list[tuple[Case, Reply]]:
    """Greedy answers to all cases."""
    stop = set(end_ids(tokenizer))
    prompts = [tokenizer.encode(prompt_text(case.sample), add_special_tokens=False).ids for case in cases]
    replies = decode_all(model, [Request(ids, MAX_TOKENS) for ids in prompts], stop)
    texts = [tokenizer.decode(ids, skip_special_tokens=False) for ids in replies]
    return [(case, parse_text(text, case.sample.thinking)) for case, text in zip(cases, texts, strict=True)]


def probe(model: Pocket, tokenizer: Tokenizer, text: str, thinking: bool) -> str:
    """The raw answer to one message."""
    prompt = prompt_text(Sample("chat", [user(text), assistant("")], thinking=thinking))
    stop = set(end_ids(tokenizer))
    ids = decode_all(model, [Request(tokenizer.encode(prompt, add_special_tokens=False).ids, 200)], stop)[0]
    return str(tokenizer.decode(ids, skip_special_tokens=False))


def write_wrong(results: list[tuple[Case, Reply]], path: Path) -> None:
    """The cases that went wrong, one JSON line each."""
    with path.open("w") as file:
        for case, reply in results:
            if not is_right(case, reply):
                row = {
                    "kind": case.kind,
                    "user": case.sample.messages[-2]["content"][-400:],
                    "thinking": case.sample.thinking,
                    "tools": case.sample.tools,
                    "expected": case.sample.expected,
                    "got": reply.__dict__,
                }
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "checkpoint", type=Path, help="a training checkpoint, or the folder of the shipped files"
    )
    parser.add_argument("--per-kind", type=int, default=200)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokenizer", type=Path, default=FOLDER / "tokenizer.json")
    parser.add_argument("--wrong", type=Path)
    parser.add_argument("--mutants", action="store_true")
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.tokenizer))
    if args.checkpoint.is_dir():
        model = load_shipped(args.checkpoint, args.device).eval()
    else:
        model = load_checkpoint(args.checkpoint, args.device).eval()
        bake(model)
    start = time.monotonic()
    cases = list(
        make_cases(args.per_kind, lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids))
    )
    print(f"{len(cases)} cases made in {time.monotonic() - start:.1f} s")
    results = run_cases(model, tokenizer, cases)
    print(format_table(table(results)))
    if args.wrong:
        write_wrong(results, args.wrong)
    if args.mutants:
        long = [case for case in cases if case.kind in ("needle_2048", "needle_4096")]
        original = Indexer.rotated
        for mutant in MUTANTS:
            Indexer.rotated = lambda self, *rest, turn=mutant: turn(*rest)  # type: ignore[method-assign]
            print(f"{mutant.__name__}\n{format_table(table(run_cases(model, tokenizer, long)))}")
        Indexer.rotated = original  # type: ignore[method-assign]
    for text in PROBES:
        print(repr(text), "->", [probe(model, tokenizer, text, thinking) for thinking in (True, False)])
    print(f"evaluated in {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    main()
