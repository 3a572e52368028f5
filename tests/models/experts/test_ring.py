"""Processes on MLX's ring of sockets compute what one process computes; each reads only its own experts."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import open_model, save_packed
from tests.models.experts.rank import KINDS, steps
from tests.models.make_golden import SEED
from tests.tiny_glm import WIDER, make_weights

LIMIT_S = 30.0
Results = dict[str, np.ndarray]
EXPERTS = WIDER["n_routed_experts"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_packed(tmp_path_factory.mktemp("dense"), WIDER, make_weights(WIDER, SEED), lambda path: None)


@pytest.fixture(scope="module")
def expected(folder: Path) -> Results:
    opened = open_model(folder)
    results = dict(steps(opened.model))
    opened.store.close()
    return results


def free_addresses(number: int) -> list[str]:
    with ExitStack() as stack:
        bound = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [f"127.0.0.1:{server.getsockname()[1]}" for server in bound]


def run_ranks(number: int, folder: Path, out: Path, most: int = 9) -> list[Results]:
    """What each rank wrote of the first steps. All are ended after a while, whatever they do."""
    hosts = out / "hosts.json"
    hosts.write_text(json.dumps([[address] for address in free_addresses(number)]))
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(number):
            arguments = [str(folder), f"{out}/{rank}.npz", str(most)]
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.models.experts.rank", *arguments],
                    env=os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
                )
            )
        assert [process.wait(LIMIT_S) for process in ranks] == [0] * number
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return [dict(np.load(out / f"{rank}.npz")) for rank in range(number)]


def check(ranks: Sequence[Results], expected: Results) -> None:
    for name in KINDS:
        for results in ranks:
            for step in ("decode", "batch", "paused"):
                assert np.array_equal(results[f"{name} {step}"], expected[step])
            assert np.abs(results[f"{name} sweep"] - expected["sweep"]).max() < 1e-5
            assert np.array_equal(results[f"{name} sweep"], ranks[0][f"{name} sweep"]), "ranks differ"


@pytest.mark.slow
def test_two_ranks_compute_the_same_and_read_half_each(
    folder: Path, expected: Results, tmp_path: Path
) -> None:
    ranks = run_ranks(2, folder, tmp_path)
    check(ranks, expected)
    index = open_model(folder, 4).checkpoint.experts
    num_layers, expert_bytes = len(index.layers), index.expert_bytes(index.layers[0])
    for results in ranks:
        for step in ("decode", "batch", "sweep"):
            resident, misses, swept, payload, _ = results[f"streamed {step} counts"]
            assert payload == (misses + swept) * expert_bytes
            assert (swept > 0) == (step == "sweep")
            assert results[f"resident {step} counts"][1:].tolist() == [0] * 4
        assert swept == num_layers * EXPERTS // 2 - resident, "each absent expert of the rank's half, once"
        assert results["guessing decode counts"][-1] > 0


@pytest.mark.long
def test_four_ranks_decode_the_same_bits(folder: Path, expected: Results, tmp_path: Path) -> None:
    for results in run_ranks(4, folder, tmp_path, most=1):
        assert all(np.array_equal(results[f"{name} decode"], expected["decode"]) for name in KINDS)
