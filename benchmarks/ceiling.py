"""Whether --ram-budget is a ceiling: the real server in a memory cgroup (needs root).

`python -m benchmarks.ceiling`. The cgroup's hard limit, with swap, is the budget; the checkpoint is at least
four times as large and its pages are evicted first. Samples rss and mapped files of the process tree every
50 ms while requests run, and prints the peak, what the kernel charged, the page cache of the expert files,
and the ledger beside the rss.
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

from benchmarks.checkpoint import BENCH, write_checkpoint
from config.sizes import parse_size
from server.checkpoint import GLM_ID
from tests.tiny_tokenizer import build_tokenizer

CGROUPS = Path("/sys/fs/cgroup/memory")
SAMPLE_S = 0.05
PAGE = os.sysconf("SC_PAGE_SIZE")
# 2 GB of experts in four layers: with 8 bits half as many weights are unpacked for a prompt, which is what
# takes the time on two cores.
LARGE = BENCH | {
    "num_hidden_layers": 6, "first_k_dense_replace": 2, "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 4,
    "n_routed_experts": 152, "num_experts_per_tok": 4, "moe_intermediate_size": 1024,
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
                name = "engine" if any("worker" in word for word in arguments) else "http"
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
def serving(group: Path, directory: Path, budget: str, context: int) -> Iterator[httpx.Client]:
    """The server's process tree inside the group, ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "server.cli", "serve", "--model", str(directory), "--stream-experts"]
    command += ["--ram-budget", budget, "--max-context", str(context), "--port", str(port)]
    command += ["--prefix-cache-size", "0"]
    enter = f'echo $$ > {group}/cgroup.procs; exec "$@"'
    process = subprocess.Popen(["sh", "-c", enter, "sh", *command], start_new_session=True)
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
    context = prompt_tokens + tokens + 8
    experts = sorted(directory.glob("model-0*.safetensors"))
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    plan = _plan(directory, budget, context)
    print(f"checkpoint {size / 1e6:.0f} MB, budget {budget_bytes / 1e6:.0f} MB ({size / budget_bytes:.1f} x)")
    evict(directory)
    peak, stop = Peak(), threading.Event()
    with limited(budget_bytes) as group:
        sampler = threading.Thread(target=_sample, args=(peak, group, stop))
        with serving(group, directory, budget, context) as client:
            loaded = charged(group)
            sampler.start()
            for number in range(requests):
                start_s = time.monotonic()
                prompt = rng.integers(20, 4000, prompt_tokens).tolist()
                body = {"model": GLM_ID, "prompt": prompt, "max_tokens": tokens}
                answer = client.post("/v1/completions", json=body)
                if answer.status_code != 200:
                    raise SystemExit(f"request {number}: {answer.status_code} {answer.text}")
                new = answer.json()["usage"]["completion_tokens"]
                print(
                    f"request {number}: {time.monotonic() - start_s:.1f} s {new} tokens",
                    flush=True,
                )
            stop.set()
            sampler.join()
            used = _used(client)
            after, cached = charged(group), cached_bytes(experts)
            failures = int((group / "memory.failcnt").read_text())
            kills = (group / "memory.oom_control").read_text().split()
    return _report(plan, used, peak, budget_bytes, loaded, after, cached, failures, kills)


def _sample(peak: Peak, group: Path, stop: threading.Event) -> None:
    while not stop.wait(SAMPLE_S):
        peak.sample(group)


def _plan(directory: Path, budget: str, context: int) -> dict[str, int]:
    command = [sys.executable, "-m", "server.cli", "plan", "--json", "--model", str(directory)]
    command += ["--stream-experts", "--ram-budget", budget, "--max-context", str(context)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines: dict[str, int] = json.loads(done.stdout)["lines"]
    return lines


def _used(client: httpx.Client) -> dict[str, float]:
    """The most that each line of the ledger was used, as the server tells."""
    lines = re.findall(r'^glmserve_memory_used_bytes{line="(.+)"} (.+)$', client.get("/metrics").text, re.M)
    return {name: float(value) for name, value in lines}


def _report(
    plan: dict[str, int],
    used: dict[str, float],
    peak: Peak,
    budget_bytes: int,
    loaded: dict[str, int],
    after: dict[str, int],
    cached: int,
    failures: int,
    kills: list[str],
) -> bool:
    for name, nbytes in plan.items():
        print(f"  ledger {name:24} {nbytes / 1e6:8.1f} MB, used {used.get(name, 0) / 1e6:8.1f} MB")
    ledger = sum(plan.values())
    print(f"ledger {ledger / 1e6:.1f} MB; when loaded the kernel charged rss {loaded['rss'] / 1e6:.1f} MB")
    print(
        f"peak of rss + mapped files of the tree {peak.tree_bytes / 1e6:.1f} MB = "
        f"{peak.tree_bytes / budget_bytes:.1%} of the budget, {peak.tree_bytes / ledger:.1%} of the ledger "
        f"{ {name: round(value / 1e6) for name, value in peak.rss_at_peak.items()} }"
    )
    print(f"charged at the end: rss {after['rss'] / 1e6:.1f} MB, cache {after['cache'] / 1e6:.1f} MB")
    print(f"page cache of the expert files {cached / 1e6:.2f} MB; times at the limit {failures}; {kills}")
    was_killed = "oom_kill 0" not in " ".join(kills)
    is_held = 0 < peak.tree_bytes <= budget_bytes and not was_killed and cached < budget_bytes / 100
    print("the budget held" if is_held else "the budget was exceeded")
    return is_held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="written there if it is not")
    parser.add_argument("--budget", default="500M")
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
