"""Whether memory or latency creep: 100,000 tokens through the engine's loop. `python -m benchmarks.soak`.

A tiny model that streams a quarter of its experts, keys beyond `index_topk`, one request after the other.
Prints the resident memory and the time of a token for each tenth of the run, the slope of the memory by
least squares over the last nine tenths, and the last tenth's latency over the first's. A shared machine is
not always as fast, so between requests the same small work is timed each time: latencies are also given in
units of it. Beside them stand the processor's time, and how often others took the processor; `--cores` keeps
the run to processors that others can be kept from.
"""

import argparse
import gc
import os
import resource
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from statistics import median

import mlx.core as mx
import numpy as np

from benchmarks.rig.checkpoint import BENCH, write_checkpoint
from models.arithmetic import CPU
from models.loading.loading import load_model, open_checkpoint
from server.engine.loop import EngineLoop
from server.engine.model_protocol import Backend
from server.link.messages import (
    Command,
    Event,
    Failed,
    Finished,
    Generate,
    ModelInfo,
    Sampling,
    Shutdown,
    Token,
)
from streaming.store import ExpertStore

TINY = BENCH | {
    "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 3, "intermediate_size": 128,
    "moe_intermediate_size": 64, "first_k_dense_replace": 1, "mlp_layer_types": ["dense"] + ["sparse"] * 2,
    "n_routed_experts": 32, "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 64, "v_head_dim": 64, "index_topk": 64,
}  # fmt: skip
PROMPT_TOKENS, NEW_TOKENS = 40, 250
WARM_REQUESTS = 4
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Record:
    """For each request: tokens so far, resident bytes, seconds a token by the wall and by the CPU, how often
    the processor was taken away until then, and the seconds of `same_work` after it."""

    tokens: list[int] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    taken: list[int] = field(default_factory=list)
    work_s: list[float] = field(default_factory=list)

    def tenth(self, number: int) -> slice:
        size = len(self.tokens) / 10
        return slice(round(number * size), round((number + 1) * size))

    def slope(self) -> float:
        """Bytes of resident memory that a token adds."""
        later = slice(len(self.tokens) // 10, None)
        return float(np.polyfit(self.tokens[later], self.rss[later], 1)[0])


def same_work() -> float:
    """Seconds of some work that has nothing to do with the engine."""
    x = mx.ones((64, 256))
    start_s = time.perf_counter()
    for _ in range(200):
        x = mx.softmax(x @ mx.ones((256, 256)) * 0.01, axis=-1)
        mx.eval(x)
    return time.perf_counter() - start_s


class Client:
    """Sends the next request when one is over; `send` is called on the loop's thread."""

    def __init__(self, inbox: SimpleQueue[Command], num_tokens: int) -> None:
        self.record = Record()
        self._inbox, self._num_tokens = inbox, num_tokens
        self._rng = np.random.default_rng(0)
        self._num_done = self._num_requests = self._num_new = 0
        self._start: tuple[float, float] | None = None

    def ask(self) -> None:
        prompt = tuple(self._rng.integers(4, TINY["vocab_size"], PROMPT_TOKENS).tolist())
        sampling = Sampling(temperature=1.0, top_p=0.95, seed=self._num_requests)
        self._inbox.put(Generate(f"r{self._num_requests}", prompt, NEW_TOKENS, sampling))
        self._num_requests += 1

    def send(self, event: Event) -> None:
        match event:
            case Token():
                self._num_new += 1
                self._start = self._start or (time.perf_counter(), time.process_time())
            case Finished():
                self._finish()
            case Failed():
                sys.exit(event.message)

    def _finish(self) -> None:
        assert self._start is not None, "a request has tokens"
        counted = self._num_new - 1
        wall_s, cpu_s = time.perf_counter() - self._start[0], time.process_time() - self._start[1]
        if self._num_requests > WARM_REQUESTS:
            self._num_done += self._num_new
            self.record.tokens.append(self._num_done)
            self.record.rss.append(int(Path("/proc/self/statm").read_text().split()[1]) * PAGE)
            self.record.wall_s.append(wall_s / counted)
            self.record.cpu_s.append(cpu_s / counted)
            self.record.taken.append(resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw)
            self.record.work_s.append(same_work())
        self._num_new, self._start = 0, None
        if self._num_done < self._num_tokens:
            self.ask()
        else:
            self._inbox.put(Shutdown())


def run(directory: Path, num_tokens: int) -> Record:
    checkpoint = open_checkpoint(directory)
    mx.set_cache_limit(32 * 10**6)
    store = ExpertStore(checkpoint.experts, TINY["n_routed_experts"] // 4, float_dtype=CPU.dtype)
    inbox: SimpleQueue[Command] = SimpleQueue()
    client = Client(inbox, num_tokens)
    backend = Backend(load_model(checkpoint, CPU, store), ModelInfo(TINY["vocab_size"], 4096))
    client.ask()
    EngineLoop(backend, inbox, client.send).run()
    store.check_integrity()
    store.close()
    return client.record


def report(record: Record) -> bool:
    for number in range(10):
        part = record.tenth(number)
        print(
            f"tokens to {record.tokens[part][-1]:7}: rss {median(record.rss[part]) / 1e6:7.2f} MB, "
            f"{1000 * median(record.wall_s[part]):.3f} ms a token, "
            f"{1000 * median(record.cpu_s[part]):.3f} of the CPU, "
            f"the same work {1000 * median(record.work_s[part]):.2f} ms, "
            f"interrupted {record.taken[part][-1] - record.taken[max(0, part.start - 1)]} times"
        )
    in_units = [wall_s / work_s for wall_s, work_s in zip(record.wall_s, record.work_s, strict=True)]
    wall, cpu, units = (
        median(values[record.tenth(9)]) / median(values[record.tenth(0)])
        for values in (record.wall_s, record.cpu_s, in_units)
    )
    slope = record.slope() * 10_000 / 1e6
    print(
        f"rss slope {slope:+.3f} MB per 10,000 tokens; last tenth / first: wall {wall:.3f}, CPU {cpu:.3f}, "
        f"in units of the same work {units:.3f}"
    )
    print(f"objects that Python's collector follows: {len(gc.get_objects())}")
    return slope < 1.0 and units < 1.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--cores", help="processors to run on, as in 2,3; all if not given")
    given = parser.parse_args()
    if given.cores:
        os.sched_setaffinity(0, map(int, given.cores.split(",")))
    with tempfile.TemporaryDirectory() as scratch:
        record = run(write_checkpoint(Path(scratch) / "tiny", TINY), given.tokens)
    sys.exit(0 if report(record) else 1)


if __name__ == "__main__":
    main()
