"""Checks of plain `glmserve doctor` that ask the machine: Python, MLX, limits, port, folders, keys."""

import os
import resource
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from config.errors import UsageError
from config.settings import Settings
from config.sizes import format_size, physical_memory_bytes
from server.commands.doctor.finding import Finding, Verdict

LEAST_PYTHON = (3, 11)
# Older ones lack what the engine calls, or have faults that it cannot work around.
LEAST_MLX = (0, 31)
# Connections of a fleet, the experts' files, and what a process opens besides.
LEAST_DESCRIPTORS = 1024
ROOM_BYTES = 10**9
CGROUP = Path("/sys/fs/cgroup")


def check_python(settings: Settings, found: tuple[int, ...] = sys.version_info[:3]) -> Iterator[Finding]:
    """Whether this Python is new enough."""
    name = ".".join(map(str, found))
    if found < LEAST_PYTHON:
        yield Finding(Verdict.FAULT, f"Python {name} is too old: install 3.11 or newer, then glmserve anew")
    else:
        yield Finding(Verdict.GOOD, f"Python {name}")


def check_mlx(settings: Settings) -> Iterator[Finding]:
    """Whether MLX is there and new enough, and on which device it computes."""
    try:
        found = version("mlx")
        import mlx.core as mx
    except (PackageNotFoundError, ImportError) as error:
        yield Finding(Verdict.FAULT, f"MLX cannot be imported ({error}): install glmserve anew")
        return
    if tuple(int(part) for part in found.split(".")[:2]) < LEAST_MLX:
        yield Finding(Verdict.FAULT, f"MLX {found} is too old: pip install --upgrade mlx")
        return
    device = mx.default_device().type.name
    is_slow = sys.platform == "darwin" and device == "cpu"
    text = f"MLX {found} computes on the {device}"
    yield Finding(Verdict.NOTE if is_slow else Verdict.GOOD, text + (", not on the GPU" if is_slow else ""))


def check_kernels(settings: Settings) -> Iterator[Finding]:
    """Whether a packed product of experts is what an unpacked one is."""
    import mlx.core as mx

    x, w = mx.random.normal((4, 1, 64)), mx.random.normal((8, 32, 64))
    packed = mx.quantize(w, 64, 4)
    chosen = mx.array([1, 7, 0, 3])
    got = mx.gather_qmm(x, *packed, rhs_indices=chosen, transpose=True, group_size=64, bits=4)
    plain = x @ mx.dequantize(*packed, group_size=64, bits=4)[chosen].swapaxes(1, 2)
    error = mx.abs(got - plain).max().item()
    if not isinstance(error, float) or not error < 1e-2:
        yield Finding(Verdict.FAULT, f"products of experts are off by {error}: run glmserve doctor --parity")
    else:
        yield Finding(Verdict.GOOD, "products of packed experts are right")


def check_memory(settings: Settings, cgroup: Path = CGROUP) -> Iterator[Finding]:
    """Whether the budget fits this machine, its container and, on a Mac, what the GPU may have."""
    budget, memory = settings.ram_budget, physical_memory_bytes()
    limit = _limit_of(cgroup / "memory.max")
    if limit is not None and limit < budget:
        yield Finding(
            Verdict.FAULT,
            f"this container may use {format_size(limit)}, less than --ram-budget {format_size(budget)}: "
            "lower the budget, or raise the container's limit",
        )
    elif budget > 0.92 * memory:
        yield Finding(
            Verdict.NOTE,
            f"--ram-budget {format_size(budget)} leaves {format_size(memory - budget)} of "
            f"{format_size(memory)} for everything else: 80% is safer",
        )
    else:
        yield Finding(Verdict.GOOD, f"{format_size(budget)} of {format_size(memory)}")


def _limit_of(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # "max", or no such hierarchy
        return None


def check_wired(settings: Settings, platform: str = sys.platform) -> Iterator[Finding]:
    """On a Mac, whether the GPU may wire what --wire asks for."""
    if platform != "darwin" or not settings.wire:
        return
    import mlx.core as mx

    limit = int(mx.device_info()["max_recommended_working_set_size"])
    if limit < settings.ram_budget:
        megabytes = settings.ram_budget // 2**20
        text = f"the GPU may wire {format_size(limit)}: sudo sysctl iogpu.wired_limit_mb={megabytes}"
        yield Finding(Verdict.NOTE, text)


def check_descriptors(settings: Settings) -> Iterator[Finding]:
    """Whether enough files and connections may be open at once."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < LEAST_DESCRIPTORS:
        text = f"only {hard} files may be open: ulimit -Hn {LEAST_DESCRIPTORS}, or LimitNOFILE= of the unit"
        yield Finding(Verdict.FAULT, text)
    else:
        yield Finding(
            Verdict.GOOD, f"{'any number of' if hard == resource.RLIM_INFINITY else hard} open files"
        )


def check_port(settings: Settings) -> Iterator[Finding]:
    """Whether --host and --port can be listened on."""
    from server.commands.http_server import bind

    try:
        bind(settings.host, settings.port).close()
    except UsageError as error:
        yield Finding(Verdict.FAULT, f"{error} (is a server running already?)")
        return
    yield Finding(Verdict.GOOD, f"port {settings.port} is free")


def check_cache_folder(settings: Settings) -> Iterator[Finding]:
    """Whether saved prompts can be written, and have room."""
    from server.commands.serve import prefix_directory

    folder = prefix_directory(settings)
    if folder is None:
        yield Finding(Verdict.NOTE, "prompts are not kept on disk: a restart reads them anew")
        return
    existing = next(one for one in (folder, *folder.parents) if one.exists())
    try:
        if not existing.is_dir():
            raise NotADirectoryError(20, "not a folder")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        text = (
            f"prompts cannot be kept in {folder} ({error.strerror}): --prefix-cache-dir names another folder"
        )
        yield Finding(Verdict.FAULT, text)
        return
    free = shutil.disk_usage(existing).free
    if free < ROOM_BYTES:
        text = f"the disk of the saved prompts has {format_size(free)} left: free some, or --prefix-cache-dir"
        yield Finding(Verdict.FAULT, text)
    else:
        yield Finding(Verdict.GOOD, f"saved prompts have {format_size(free)} of room")


def check_keys(settings: Settings) -> Iterator[Finding]:
    """Whether the keys can be read, by their owner only, and whether the network is open."""
    from server.commands.serve import make_access

    access = make_access(settings)  # what it raises is the finding
    path = settings.api_key_file
    if path is not None and stat.S_IMODE(os.stat(path).st_mode) & 0o077:
        yield Finding(Verdict.FAULT, "others may read or change the file of --api-key-file: chmod 600")
    elif access.keys.is_open:
        yield Finding(Verdict.NOTE if settings.insecure else Verdict.GOOD, "no keys: this machine may ask")
    else:
        yield Finding(Verdict.GOOD, "clients need a key")
