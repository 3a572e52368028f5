"""Whether --ram-budget is a ceiling: the real server in a memory cgroup (needs root).

`python -m benchmarks.ceiling`. The cgroup's hard limit, with swap, is the budget; the checkpoint is at least
four times as large and its pages are evicted first. Samples rss and mapped files of the process tree every
50 ms while requests run, and prints the peak, what the kernel charged and the page cache of the expert files.
Every eighth prompt is one token repeated, so that all its rows want the same experts: the worst for memory.

Beside the rss stand two sums. Promised: the plan's lines. Explained: what the owners held when the engine's
rss was largest, none of it derived from the rss: both processes before there was a model, what MLX held and
had freed, what the C library had not given back of what was freed, the reader's buffers, saved prompts. What
is left is nobody's.
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
from numpy.typing import NDArray

from benchmarks.rig.checkpoint import BENCH, write_checkpoint
from config.sizes import parse_size
from models.dsa_family import GLM_MOE_DSA
from tests.tiny_tokenizer import build_tokenizer

CGROUPS = Path("/sys/fs/cgroup/memory")
SAMPLE_S = 0.05
PAGE = os.sysconf("SC_PAGE_SIZE")
# 2 GB of experts in four layers: with 8 bits half as many weights are unpacked for a prompt, which is what
# takes the time on two cores.
LARGE = BENCH | {
    "num_hidden_layers": 6, "first_k_dense_replace": 2, "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 4,
    "n_routed_experts": 256, "num_experts_per_tok": 4, "moe_intermediate_size": 1024,
}  # fmt: skip


@dataclass
class Peak:
    """The largest samples seen."""

    tree_bytes: int = 0
    rss_at_peak: dict[str, int] = field(default_factory=dict)
    cache_bytes: int = 0

    def sample(self, group: Path) -> None:
        by_process: dict[str, int] = {}
        for pid in (group / "cgroup.procs").read_text().split():
            with suppress(OSError, IndexError):
                resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
                arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                name = "engine" if "-P" in arguments else "http"
                by_process[name] = by_process.get(name, 0) + resident
        total = sum(by_process.values())
        if total > self.tree_bytes:
            self.tree_bytes, self.rss_at_peak = total, by_process
        self.cache_bytes = max(self.cache_bytes, charged(group)["cache"])


def charged(group: Path) -> dict[str, int]:
    """The kernel's own account."""
    lines = (group / "memory.stat").read_text().splitlines()
    return {name: int(value) for name, value in (line.split() for line in lines)}


@contextmanager
def limited(budget_bytes: int) -> Iterator[Path]:
    """A memory cgroup whose hard limit, swap included, is the budget."""
    group = CGROUPS / f"glmserve-ceiling-{os.getpid()}"
    group.mkdir()
    try:
        for name in ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"):
            (group / name).write_text(str(budget_bytes))
        (group / "memory.swappiness").write_text("0")
        yield group
    finally:
        for _ in range(100):
            with suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


@contextmanager
def serving(group: Path, directory: Path, budget: str, context: int, watched: Path) -> Iterator[httpx.Client]:
    """The server's process tree inside the group, ready; its engine notes its peaks in `watched`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.rig.watched", "serve", "--model", str(directory)]
    command += ["--stream-experts", "--ram-budget", budget, "--max-context", str(context)]
    command += ["--prefix-cache-size", "0", "--port", str(port)]
    enter = f'echo $$ > {group}/cgroup.procs; exec "$@"'
    process = subprocess.Popen(
        ["sh", "-c", enter, "sh", *command],
        start_new_session=True,
        env={**os.environ, "BENCHMARK_WATCH": str(watched)},
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=900) as client:
            _wait_until_ready(client, process)
            yield client
    finally:
        process.terminate()
        process.wait(30)


def _wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode}")
        with suppress(httpx.TransportError):
            if client.get("/health").status_code == 200:
                return
        time.sleep(0.2)
    raise SystemExit("the server was not ready within two minutes")


def evict(directory: Path) -> None:
    os.sync()
    for path in directory.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_bytes(paths: list[Path]) -> int:
    """Pages of these files that lie in the page cache."""
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", *map(str, paths)]
    return sum(map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()))


def make_large(directory: Path) -> Path:
    write_checkpoint(directory, LARGE, expert_bits=8)
    inner = build_tokenizer()
    inner.save(str(directory / "tokenizer.json"))
    ids = [inner.token_to_id(text) for text in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return directory


def run(directory: Path, budget: str, requests: int, prompt_tokens: int, tokens: int) -> bool:
    budget_bytes, rng = parse_size(budget), np.random.default_rng(0)
    experts = sorted(directory.glob("model-0*.safetensors"))
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    print(f"checkpoint {size / 1e6:.0f} MB, budget {budget_bytes / 1e6:.0f} MB ({size / budget_bytes:.1f} x)")
    evict(directory)
    peak, stop, watched = Peak(), threading.Event(), directory / "watched.jsonl"
    watched.unlink(missing_ok=True)
    with limited(budget_bytes) as group:
        sampler = threading.Thread(target=_sample, args=(peak, group, stop))
        with serving(group, directory, budget, prompt_tokens + tokens + 8, watched) as client:
            peak.sample(group)
            http_bytes = peak.rss_at_peak["http"]
            sampler.start()
            for number in range(requests):
                prompt = rng.integers(20, 4000, prompt_tokens)
                _ask(client, number, prompt if number % 8 else np.full(prompt_tokens, prompt[0]), tokens)
            stop.set()
            sampler.join()
            planned, used = (_ledger(client, kind) for kind in ("planned", "used"))
            after, cached = charged(group), cached_bytes(experts)
            most_charged = int((group / "memory.max_usage_in_bytes").read_text())
            failures = int((group / "memory.failcnt").read_text())
            kills = (group / "memory.oom_control").read_text().split()
    _explain(planned, used, peak, http_bytes, watched)
    print(
        f"charged at the end: rss {after['rss'] / 1e6:.1f} MB, cache {after['cache'] / 1e6:.1f} MB; "
        f"the most ever {most_charged / 1e6:.1f} MB"
    )
    print(f"page cache of the expert files {cached / 1e6:.2f} MB; times at the limit {failures}; {kills}")
    share = peak.tree_bytes / budget_bytes
    print(f"peak of the tree {peak.tree_bytes / 1e6:.1f} MB = {share:.1%} of the budget")
    was_killed = "oom_kill 0" not in " ".join(kills)
    is_held = 0 < peak.tree_bytes <= budget_bytes and not was_killed and cached < budget_bytes / 100
    print("the budget held" if is_held else "the budget was exceeded")
    return is_held


def _ask(client: httpx.Client, number: int, prompt: NDArray[np.int64], tokens: int) -> None:
    start_s = time.monotonic()
    body = {"model": GLM_MOE_DSA.served_id, "prompt": prompt.tolist(), "max_tokens": tokens}
    answer = client.post("/v1/completions", json=body)
    if answer.status_code != 200:
        raise SystemExit(f"request {number}: {answer.status_code} {answer.text}")
    new = answer.json()["usage"]["completion_tokens"]
    print(f"request {number}: {time.monotonic() - start_s:.1f} s {new} tokens", flush=True)


def _sample(peak: Peak, group: Path, stop: threading.Event) -> None:
    while not stop.wait(SAMPLE_S):
        peak.sample(group)


def _ledger(client: httpx.Client, kind: str) -> dict[str, float]:
    """Lines of the ledger as the server tells them: planned, or the most that was used."""
    told = rf'^glmserve_memory_{kind}_bytes{{line="(.+)"}} (.+)$'
    lines = re.findall(told, client.get("/metrics").text, re.M)
    return {name: float(value) for name, value in lines}


def _explain(
    planned: dict[str, float], used: dict[str, float], peak: Peak, http_bytes: int, watched: Path
) -> None:
    """Prints promised, used and explained beside the peak; see the top."""
    for name, nbytes in planned.items():
        print(f"  {name:22} promised {nbytes / 1e6:6.1f} MB, most used {used.get(name, 0) / 1e6:6.1f} MB")
    notes = [json.loads(line) for line in watched.read_text().splitlines()]
    start, most = notes[0], max(notes, key=lambda note: note["rss"])
    explained = {
        "http before requests": http_bytes,
        "engine before a model": start["rss"],
        "MLX holds": most["active"],
        "MLX has freed": most["cache"],
        "the C library has freed": most["free"] - start["free"],
        "reader buffers": used["reader buffers"],
        "prefix cache": used["prefix cache"],
    }
    for name, nbytes in explained.items():
        print(f"  explained: {name:22} {nbytes / 1e6:6.1f} MB")
    measured = {name: f"{nbytes / 1e6:.1f}" for name, nbytes in peak.rss_at_peak.items()}
    print(f"at the peak {measured}, the engine by its own note {most['rss'] / 1e6:.1f}")
    for name, total in (("promised", sum(planned.values())), ("explained", sum(explained.values()))):
        print(f"{name} {total / 1e6:.1f} MB = {total / peak.tree_bytes:.3f} of the peak")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="written there if it is not")
    parser.add_argument("--budget", default="850M")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=64)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = given.checkpoint or Path(scratch) / "large"
        if not (directory / "config.json").exists():
            make_large(directory)
        is_held = run(directory, given.budget, given.requests, given.prompt_tokens, given.tokens)
    sys.exit(0 if is_held else 1)


if __name__ == "__main__":
    main()
