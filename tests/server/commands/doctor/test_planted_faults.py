"""`glmserve doctor` finds each fault that is planted, and says what to do."""

import json
import os
import resource
import shutil
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from config.settings import Settings, load_settings
from server.cli import main
from server.commands.checkpoint import POCKET
from server.commands.doctor import machine_checks, model_checks
from server.commands.doctor.doctor_command import run_checks
from server.commands.doctor.finding import Check
from server.commands.doctor.ordinary import CHECKS

Plant = Callable[[Path, pytest.MonkeyPatch], dict[str, Any]]


def findings(flags: dict[str, Any], checks: Any = CHECKS) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    run_checks(checks, load_settings({"port": "0"} | flags), told.append, is_quiet=True)
    return [one for one in told if "verdict" in one]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(POCKET, folder)
    return folder


def absent_shard(tmp: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    (tmp / "model" / "model-00002-of-00002.safetensors").unlink()
    return {}


def truncated_shard(tmp: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    path = tmp / "model" / "model-00001-of-00002.safetensors"
    os.truncate(path, path.stat().st_size - 1000)
    return {}


def wrong_config(tmp: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    path = tmp / "model" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"n_routed_experts": 32}))
    return {}


def no_tokenizer(tmp: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    (tmp / "model" / "tokenizer.json").write_text("{}")
    return {}


def broken_template(tmp: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    (tmp / "model" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}")
    return {}


def small_budget(tmp: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"ram_budget": "300M", "stream_experts": True}


def port_taken(tmp: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    taken = socket.create_server(("127.0.0.1", 0))
    patch.setattr(machine_checks, "_planted", taken, raising=False)  # kept open until the test is over
    return {"port": str(taken.getsockname()[1])}


def cache_is_a_file(tmp: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    (tmp / "cache").write_text("")
    return {"prefix_cache_dir": str(tmp / "cache" / "inside")}


def full_disk(tmp: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    usage = shutil.disk_usage(tmp)
    patch.setattr(
        "server.commands.doctor.machine_checks.shutil.disk_usage", lambda path: usage._replace(free=10**6)
    )
    return {"prefix_cache_dir": str(tmp / "new")}


def open_key_file(tmp: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    (tmp / "keys").write_text("fleet: sk-1\n")
    (tmp / "keys").chmod(0o644)
    return {"api_key_file": str(tmp / "keys")}


def empty_key_file(tmp: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    (tmp / "keys").write_text("# none\n")
    return {"api_key_file": str(tmp / "keys")}


def open_network(tmp: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"host": "0.0.0.0"}


def few_files(tmp: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr("server.commands.doctor.machine_checks.resource.getrlimit", lambda which: (256, 256))
    return {}


def old_mlx(tmp: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr(machine_checks, "version", lambda name: "0.20.1")
    return {}


def wrong_kernel(tmp: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    import mlx.core as mx

    right = mx.gather_qmm
    patch.setattr(mx, "gather_qmm", lambda *args, **kw: right(*args, **kw) * 1.5)
    return {}


def mirror_lacks_files(tmp: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    (tmp / "mirror").mkdir()
    return {"mirror": [str(tmp / "mirror")]}


PLANTED: list[tuple[Plant, str, str]] = [
    (absent_shard, "checkpoint", "00002"),
    (truncated_shard, "checkpoint", "00001"),
    (wrong_config, "checkpoint", "experts"),
    (no_tokenizer, "dialect", "tokenizer"),
    (broken_template, "dialect", "template"),
    (small_budget, "plan", "too small"),
    (port_taken, "port", "--port"),
    (cache_is_a_file, "cache folder", "--prefix-cache-dir"),
    (full_disk, "cache folder", "free some"),
    (open_key_file, "keys", "chmod 600"),
    (empty_key_file, "keys", "holds no key"),
    (open_network, "keys", "--insecure"),
    (few_files, "open files", "ulimit"),
    (old_mlx, "mlx", "upgrade"),
    (wrong_kernel, "kernels", "--parity"),
    (mirror_lacks_files, "mirrors", "copy it again"),
]


@pytest.mark.parametrize(("plant", "title", "hint"), PLANTED, ids=[plant.__name__ for plant, _, _ in PLANTED])
def test_a_planted_fault_is_found_and_nothing_else_is_blamed(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, plant: Plant, title: str, hint: str
) -> None:
    flags = {"model": str(checkpoint)} | plant(tmp_path, monkeypatch)
    checks = [check for check in CHECKS if check.title not in ("speed",)]
    told = findings(flags, checks)
    faults = [one for one in told if one["verdict"] == "fault"]
    assert title in [one["check"] for one in faults], told
    assert hint in next(one["text"] for one in faults if one["check"] == title)
    if title not in ("checkpoint", "plan"):  # what these find, those that follow cannot do without
        assert {one["check"] for one in faults} <= {title, *(["parser"] if title == "dialect" else [])}
    if taken := getattr(machine_checks, "_planted", None):
        taken.close()


@pytest.mark.parametrize("plant", [small_budget, absent_shard])
def test_what_stops_several_checks_is_told_once(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, plant: Plant
) -> None:
    told = findings({"model": str(checkpoint)} | plant(tmp_path, monkeypatch))
    assert sum(one["verdict"] == "fault" for one in told) == 1, told


def test_a_container_that_is_too_small_and_an_old_python_are_found(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000000000\n")
    settings = Settings(ram_budget=2 * 10**9)
    [found] = machine_checks.check_memory(settings, tmp_path)
    assert (found.verdict, "container" in found.text) == ("fault", True)
    (tmp_path / "memory.max").write_text("max\n")
    [found] = machine_checks.check_memory(settings, tmp_path)
    assert found.verdict == "good"
    [found] = machine_checks.check_python(settings, (3, 9, 1))
    assert (found.verdict, "3.11" in found.text) == ("fault", True)


def test_streaming_without_a_glm_and_a_half_one_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    checks = [Check("checkpoint", model_checks.check_checkpoint)]
    [found] = findings({"stream_experts": True}, checks)
    assert found["verdict"] == "fault"
    assert "glmserve pull" in found["text"]
    snapshot = tmp_path / "models--org--half" / "snapshots" / "abc"
    shutil.copytree(POCKET, snapshot)
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    [found] = findings({"stream_experts": True}, checks)
    assert "glmserve pull org/half" in found["text"]
    assert "incomplete" in found["text"]


def test_a_sound_machine_has_no_fault_and_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--port", "0"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {one["check"] for one in told} >= {check.title for check in CHECKS} - {"wired memory", "mirrors"}
    assert {one["verdict"] for one in told} <= {"good", "note"}


def test_speed_is_measured_where_experts_are_streamed() -> None:
    flags = {"model": str(POCKET), "stream_experts": True, "ram_budget": "800M"}
    fast = partial(model_checks.check_speed)
    [found] = findings(flags, [Check("speed", fast)])
    assert found["figures"]["bytes_per_s"] > 0
    assert "tokens/s" in found["text"]


@pytest.fixture(autouse=True)
def _no_inherited_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in list(os.environ):
        if name.startswith("GLMSERVE_"):
            monkeypatch.delenv(name)
    yield
    assert resource.getrlimit(resource.RLIMIT_NOFILE)
