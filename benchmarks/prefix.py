"""What saved prompts are worth: `python -m benchmarks.prefix ttft|abort`.

The engine's own loop over Pocket with a quarter of its experts in memory and the rest on a simulated disk,
by default as slow beside this machine as the target's (benchmarks/rig/slow_pocket.py). Blocks of the prefix
cache lie on the machine's real disk. Shares are also printed as if they had come from the simulated one:
Pocket's blocks are large beside its experts, the target's are not.

ttft    time to the first token of a long prompt: read whole; its beginning in memory, with 16 tokens added;
        the same from the SSD; the same in a new process after the old one was killed (kill -9) while it
        served, start-up not counted. Each round has its own prompt and its own processes.
abort   a client leaves at 60 % of that prompt and asks again; one that waits for half of it asks five times.

Run it alone on the machine. On two cores a round of ttft takes a minute, one of abort a minute and a half.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

from benchmarks.rig.drive import Served, drive, use_engine_environment
from benchmarks.rig.slow_pocket import SlowPocket, rate_like_the_target, text_tokens
from models.attention.cache_blocks import bytes_per_token
from server.engine.prefix.lookup import DiskTier, PrefixCache
from server.engine.schedule.shared_prefixes import SavedPrefixes
from server.link.messages import Cancel, Generate, Sampling

PLENTY = 10**10
FINGERPRINT = bytes(32)
NEW_TOKENS = 16
PATIENCE_S = 3600.0


def ask(name: str, prompt: tuple[int, ...]) -> Generate:
    return Generate(name, prompt, 1, Sampling(temperature=0))


# ttft


@dataclass(frozen=True)
class First:
    """How a first token came about."""

    seconds: float
    num_cached: int
    num_prompt: int
    expert_bytes: int
    block_bytes: int  # read from disk

    def seconds_with_blocks(self, rate: float) -> float:
        """As if the blocks too had come from a disk of this rate, and nothing had been done meanwhile."""
        return self.seconds + self.block_bytes / rate


def serve_prompts(pipe: Connection, rate: float, directory: Path) -> None:
    """Answers each prompt with its `First`, and "reopen" by emptying the memory tier, until it is killed."""
    pocket, disk = SlowPocket(rate), DiskTier(directory, PLENTY, PLENTY)
    prefix = PrefixCache(FINGERPRINT, PLENTY, disk)
    pipe.send("ready")
    while True:
        match pipe.recv():
            case "reopen":
                prefix.close(PATIENCE_S)
                prefix = PrefixCache(FINGERPRINT, PLENTY, disk)
                pipe.send("empty")
            case "written":
                pipe.send(prefix.flush(PATIENCE_S))
            case tuple(prompt):
                experts, blocks = pocket.disk.num_bytes, _block_bytes(prefix)
                prefixes = SavedPrefixes(prefix)
                served = drive(pocket.backend(len(prompt)), [ask("a", prompt)], prefixes=prefixes)
                pipe.send(
                    First(
                        served.first_s("a"),
                        served.usage["a"].num_cached_tokens,
                        len(prompt),
                        pocket.disk.num_bytes - experts,
                        _block_bytes(prefix) - blocks,
                    )
                )


def _block_bytes(prefix: PrefixCache) -> int:
    return int(prefix.statistics()["prefix_bytes_read"])


class Engine:
    """Such a process, from outside."""

    def __init__(self, rate: float, directory: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve_prompts, args=(theirs, rate, directory), daemon=True)
        self._process.start()
        theirs.close()
        self._pipe.recv()

    def ask(self, prompt: tuple[int, ...]) -> First:
        first = self._tell(prompt)
        assert isinstance(first, First), "prompts are answered so"
        return first

    def reopen(self) -> None:
        self._tell("reopen")

    def kill(self) -> None:
        """kill -9, when all blocks are on disk, in the middle of another prompt."""
        self._tell("written")
        self._pipe.send(text_tokens(99, 512))
        time.sleep(0.05)
        self._process.kill()
        self._process.join()

    def _tell(self, message: object) -> object:
        self._pipe.send(message)
        return self._pipe.recv()


def measure_ttft(rate: float, length: int, rounds: int, directory: Path) -> None:
    """Print each kind's time to the first token, and its share of the cold one."""
    seen: dict[str, list[First]] = defaultdict(list)

    def note(kind: str, first: First) -> None:
        seen[kind].append(first)
        print(
            f"  {kind:8} {first.seconds:8.3f} s, cached {first.num_cached}/{first.num_prompt}, read "
            f"{first.expert_bytes / 1e6:.1f} MB of experts, {first.block_bytes / 1e6:.1f} MB of blocks",
            flush=True,
        )

    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", flush=True)
        prompt, folder = text_tokens(number, length), directory / str(number)
        engine = Engine(rate, folder)
        note("cold", engine.ask(prompt))
        note("memory", engine.ask(prompt + text_tokens(1000 + number, NEW_TOKENS)))
        engine.reopen()
        note("ssd", engine.ask(prompt + text_tokens(2000 + number, NEW_TOKENS)))
        engine.kill()
        engine = Engine(rate, folder)
        note("killed", engine.ask(prompt + text_tokens(3000 + number, NEW_TOKENS)))
        engine.kill()
    colds = seen["cold"]
    cold_s = [first.seconds for first in colds]
    print(f"cold     {_spread(cold_s, 3)} s")
    for kind, bound in (("memory", 2), ("ssd", 5), ("killed", 8)):
        pairs = list(zip(seen[kind], colds, strict=True))
        shares = [100 * first.seconds / cold.seconds for first, cold in pairs]
        seconds = _spread([first.seconds for first in seen[kind]], 3)
        print(f"{kind:8} {seconds} s, {_spread(shares, 2)} % of cold (wanted: at most {bound} %)")
        if kind != "memory":
            shares = [100 * first.seconds_with_blocks(rate) / cold.seconds for first, cold in pairs]
            print(f"         {_spread(shares, 2)} % with its blocks from the simulated disk")
    pocket = SlowPocket(rate)
    sweep_s = pocket.sweep_bytes / rate
    num_bytes = bytes_per_token(pocket.opened.model.make_cache()) * length
    print(
        f"{length} tokens are {num_bytes / 1e6:.1f} MB of blocks, all experts are "
        f"{pocket.sweep_bytes / 1e6:.1f} MB (the target: 0.8 and 306 GB or more); a sweep takes this disk "
        f"{sweep_s:.2f} s, {sweep_s / median(cold_s):.3f} of a cold prompt"
    )


def _spread(values: list[float], digits: int) -> str:
    """The median, and from where to where."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


# abort


def measure_abort(rate: float, length: int, rounds: int) -> None:
    """Print what a second attempt takes of the whole, and which of five impatient ones is answered."""
    shares: list[float] = []
    for number in range(rounds):
        first, second, third = (text_tokens(10 * number + part, length) for part in range(3))
        whole_s = drive(SlowPocket(rate).backend(length), [ask("whole", first)]).first_s("whole")
        print(f"round {number + 1} of {rounds}: undisturbed {whole_s:.2f} s", flush=True)
        served = _impatient(rate, second, [0.6 * whole_s, PATIENCE_S])
        left_s = served.asked_at["1"] - served.asked_at["0"]
        shares.append(served.first_s("1") / whole_s)
        print(
            f"  left after {left_s:.2f} s, {left_s / whole_s:.3f} of it, and asked again: answered after "
            f"{served.first_s('1'):.2f} s, {shares[-1]:.3f} of the whole", flush=True,
        )  # fmt: skip
        served = _impatient(rate, third, [0.5 * whole_s] * 5)
        answered = next((int(name) + 1 for name in served.asked_at if served.tokens[name]), None)
        how = f"answered in attempt {answered}" if answered else "never answered"
        print(f"  a client that waits {0.5 * whole_s:.2f} s, five times: {how}", flush=True)
    print(f"second attempt: {_spread(shares, 3)} of the whole (wanted: at most 0.450)")


def _impatient(rate: float, prompt: tuple[int, ...], patience_s: list[float]) -> Served:
    """Attempt i of a client ends after `patience_s[i]`; the next comes at once, until one is answered."""

    def lose_patience(served: Served) -> Sequence[Generate | Cancel]:
        attempt = len(served.asked_at) - 1
        name = str(attempt)
        is_over = served.times[name] or time.monotonic() < served.asked_at[name] + patience_s[attempt]
        if is_over:
            return []
        again = [ask(str(attempt + 1), prompt)] if attempt + 1 < len(patience_s) else []
        return [Cancel(name), *again]

    prefixes = SavedPrefixes(PrefixCache(FINGERPRINT, PLENTY))
    backend = SlowPocket(rate).backend(len(prompt))
    return drive(backend, [ask("0", prompt)], prefixes=prefixes, on_beat=lose_patience)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("part", choices=["ttft", "abort"])
    parser.add_argument(
        "--rate", type=float, help="bytes per second of the simulated disk (default: measured)"
    )
    parser.add_argument("--length", type=int, default=8192, help="tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=3, help="how often")
    parser.add_argument("--directory", type=Path, help="where blocks go (default: a folder that is deleted)")
    given = parser.parse_args()
    use_engine_environment("benchmarks.prefix")
    rate = given.rate or rate_like_the_target()
    match given.part:
        case "ttft":
            with tempfile.TemporaryDirectory(dir=given.directory) as folder:
                measure_ttft(rate, given.length, given.rounds, Path(folder))
        case "abort":
            measure_abort(rate, given.length, given.rounds)


if __name__ == "__main__":
    main()
