"""The command `glmserve bench`: a fleet of agents against a running server, measured where they are.

Each agent talks for some turns over a prompt of its own. Prints a table of percentiles, writes a JSON file,
and compares two of them.
"""

import asyncio
import json
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from config.errors import UsageError
from server.commands.flags import FlagParser

WORDS = ("river", "stone", "morning", "letter", "garden", "window", "seven", "quiet", "north", "bread")
TIMEOUT_S = 3600.0
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class MeasuredTurn:
    """What an agent saw of one request; seconds, and tokens as the server counted them."""

    agent: int
    turn: int
    prompt_words: int
    first_s: float
    total_s: float
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int

    @property
    def tokens_per_s(self) -> float:
        """While it was written."""
        return (self.new_tokens - 1) / max(self.total_s - self.first_s, 1e-9) if self.new_tokens > 1 else 0.0


def bench_command(words: Sequence[str]) -> int:
    """Runs the bench, or compares two files of results."""
    given = _parser().parse_args(words)
    if given.compare:
        before, after = (_read(path) for path in given.compare)
        _print_comparison(before, after)
        return 0
    if given.output:
        _write(given.output, "", mode="a")  # what cannot be written is said before the time is spent
    turns, seconds = asyncio.run(_run(given))
    result = {"url": given.url, "seconds": round(seconds, 3), "turns": [asdict(one) for one in turns]}
    result |= {"summary": summary(turns, seconds)}
    if given.output:
        _write(given.output, json.dumps(result, indent=1))
    if given.json:
        print(json.dumps(result["summary"], indent=2))
    else:
        _print_summary(summary(turns, seconds))
    return 0


def _parser() -> ArgumentParser:
    parser = FlagParser(prog="glmserve bench", description="Measures a running server as a fleet sees it.")
    parser.add_argument(
        "--url", type=_base, default="http://127.0.0.1:8080", help="the server (default %(default)s)"
    )
    parser.add_argument("--api-key", default="none", metavar="KEY", help="its key, if it wants one")
    parser.add_argument("--agents", type=_whole, default=4, metavar="N", help="agents at a time (default 4)")
    parser.add_argument("--turns", type=_whole, default=3, metavar="N", help="turns of each (default 3)")
    parser.add_argument(
        "--prompt-words", type=_numbers, default=[200], metavar="N[,N...]",
        help="lengths of first prompts, given to the agents in turn (default 200)",
    )  # fmt: skip
    parser.add_argument(
        "--max-tokens", type=_whole, default=64, metavar="N", help="of an answer (default 64)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all results there as JSON")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.add_argument("--compare", type=Path, nargs=2, metavar="FILE", help="compare two such files")
    return parser


def _base(text: str) -> str:
    """The server's address, of one with or without the `/v1` or `/api/v1` that clients want."""
    text = text if "://" in text or not text[:1].isalnum() else f"http://{text}"
    return text.rstrip("/").removesuffix("/v1").removesuffix("/api")


def _whole(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise UsageError(f"{text!r} is not a number of 1 or more; see glmserve bench --help")
    return int(text)


def _numbers(text: str) -> list[int]:
    return [_whole(part) for part in text.split(",")]


async def _run(given: Namespace) -> tuple[list[MeasuredTurn], float]:
    headers = {"Authorization": f"Bearer {given.api_key}"}
    limits = httpx.Limits(max_connections=None)
    try:
        async with httpx.AsyncClient(
            base_url=given.url, headers=headers, timeout=TIMEOUT_S, limits=limits
        ) as client:
            models = await client.get("/v1/models")
            if models.status_code == 401:
                raise UsageError(f"{given.url} wants one of its keys: --api-key KEY")
            models.raise_for_status()
            model, started_s = models.json()["data"][0]["id"], time.monotonic()
            agents = [_Talker(client, model, number, given) for number in range(given.agents)]
            found = await asyncio.gather(*(agent.talk() for agent in agents))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"{given.url} does not answer: {reason}") from error
    return [turn for turns in found for turn in turns], time.monotonic() - started_s


class _Talker:
    """One conversation; each turn adds the answer and a question."""

    def __init__(self, client: httpx.AsyncClient, model: str, number: int, given: Namespace) -> None:
        self._client, self._model, self._number, self._given = client, model, number, given
        self._num_words = given.prompt_words[number % len(given.prompt_words)]
        text = " ".join(WORDS[(number + index) % len(WORDS)] for index in range(self._num_words))
        question = f"Agent {number} of run {time.time_ns()}. {text} What comes next?"
        self._messages: list[dict[str, Any]] = [{"role": "user", "content": question}]

    async def talk(self) -> list[MeasuredTurn]:
        """All turns, one after the other."""
        return [await self._turn(number) for number in range(self._given.turns)]

    async def _turn(self, number: int) -> MeasuredTurn:
        body = {
            "model": self._model, "messages": self._messages, "max_tokens": self._given.max_tokens,
            "stream": True, "stream_options": {"include_usage": True}, "user": f"bench-{self._number}",
        }  # fmt: skip
        started_s, first_s, text, usage = time.monotonic(), 0.0, "", dict[str, Any]()
        async with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise UsageError(
                    f"the server answered {response.status_code}: {(await response.aread())[:300]!r}"
                )
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise UsageError(f"an answer broke off: {chunk['error']['message']}")
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    delta = choice["delta"]
                    if delta.get("content") or delta.get("reasoning"):
                        first_s = first_s or time.monotonic() - started_s
                    text += delta.get("content") or ""
        total_s = time.monotonic() - started_s
        self._messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "Go on."}]
        cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
        return MeasuredTurn(
            self._number, number, self._num_words, first_s or total_s, total_s,
            usage.get("prompt_tokens", 0), cached, usage.get("completion_tokens", 0),
        )  # fmt: skip


def summary(turns: Sequence[MeasuredTurn], seconds: float) -> dict[str, float]:
    """Percentiles of what agents saw, and what all of them got together."""
    found: dict[str, float] = {"requests": len(turns), "seconds": round(seconds, 3)}
    for name, values in {
        "first_token_s": [one.first_s for one in turns],
        "total_s": [one.total_s for one in turns],
        "tokens_per_s_of_one": [one.tokens_per_s for one in turns],
    }.items():
        found |= {f"{name}_p{part}": round(_percentile(values, part), 4) for part in PERCENTILES}
    found["tokens_per_s_of_all"] = round(sum(one.new_tokens for one in turns) / max(seconds, 1e-9), 3)
    prompt = sum(one.prompt_tokens for one in turns)
    found["cached_share"] = round(sum(one.cached_tokens for one in turns) / max(prompt, 1), 4)
    return found


def _percentile(values: Sequence[float], part: int) -> float:
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=100, method="inclusive")[part - 1]


def _write(path: Path, text: str, mode: str = "w") -> None:
    try:
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(f"--output {path} cannot be written: {error.strerror}") from error


def _read(path: Path) -> Mapping[str, float]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["summary"]
        return {str(name): float(value) for name, value in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is no file of glmserve bench --output: {error}") from error


def _print_summary(found: Mapping[str, float]) -> None:
    table = Table()
    for name in ("measure", *(f"p{part}" for part in PERCENTILES)):
        table.add_column(name, justify="left" if name == "measure" else "right")
    for name in ("first_token_s", "total_s", "tokens_per_s_of_one"):
        table.add_row(name, *(f"{found[f'{name}_p{part}']:.3f}" for part in PERCENTILES))
    console = Console()
    console.print(table)
    console.print(
        f"{found['requests']:.0f} requests in {found['seconds']:.1f} s, {found['tokens_per_s_of_all']:.1f} "
        f"tokens/s together, {found['cached_share']:.1%} of the prompt tokens cached"
    )


def _print_comparison(before: Mapping[str, float], after: Mapping[str, float]) -> None:
    table = Table()
    for name in ("measure", "before", "after", "change"):
        table.add_column(name, justify="left" if name == "measure" else "right")
    for name in [one for one in before if one in after]:
        change = f"{after[name] / before[name] - 1:+.1%}" if before[name] else ""
        table.add_row(name, f"{before[name]:.3f}", f"{after[name]:.3f}", change)
    Console().print(table)
