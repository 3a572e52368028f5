"""The checks of `glmserve doctor --parity`, in the order in which they run."""

import platform
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version

import mlx.core as mx

from config.settings import Settings
from config.sizes import physical_memory_bytes
from models.arithmetic import choose_arithmetic
from server.commands.doctor.finding import Check, Figure, Finding, Verdict
from server.commands.doctor.parity.correctness import (
    check_aliasing,
    check_gathers,
    check_golden,
    check_streaming,
)
from server.commands.doctor.parity.speed import (
    check_attention,
    check_disk,
    check_eval,
    check_keep_warm,
    check_layer,
    check_limits,
)

# MLX's release that all figures and tests are of.
TRIED_MLX = (0, 32)
LEAST_MACOS = 15


def describe_machine(settings: Settings) -> Iterator[Finding]:
    """Versions, device and memory."""
    device = mx.device_info() if choose_arithmetic().name != "cpu" else {}
    figures: dict[str, Figure] = {
        "mlx": version("mlx"),
        "python": platform.python_version(),
        "system": platform.mac_ver()[0] or platform.release(),
        "machine": platform.machine(),
        "backend": choose_arithmetic().name,
        "device": str(device.get("device_name", "")),
        "memory_bytes": physical_memory_bytes(),
    }
    yield Finding(
        Verdict.GOOD,
        f"{sys.platform} {figures['system']} {figures['machine']}, MLX {figures['mlx']} {figures['backend']}",
        figures,
    )


def check_versions(settings: Settings) -> Iterator[Finding]:
    """Versions that are known to fail, or that nobody has tried."""
    mlx, macos = version("mlx"), platform.mac_ver()[0]
    if tuple(map(int, mlx.split(".")[:2])) < TRIED_MLX:
        yield Finding(Verdict.FAULT, f"MLX {mlx} is older than {TRIED_MLX[0]}.{TRIED_MLX[1]}: update it")
    elif tuple(map(int, mlx.split(".")[:2])) > TRIED_MLX:
        yield Finding(Verdict.NOTE, f"MLX {mlx} is newer than any that was tried: compare figures with care")
    if macos and int(macos.split(".")[0]) < LEAST_MACOS:
        yield Finding(Verdict.FAULT, f"macOS {macos}: MLX needs {LEAST_MACOS} to keep a model in memory")
    yield Finding(Verdict.GOOD, "checked against the list of known faults")


PARITY_CHECKS: Sequence[Check] = (
    Check("machine", describe_machine),
    Check("versions", check_versions),
    Check("limits", check_limits),
    Check("wait", check_eval),
    Check("products", check_gathers),
    Check("aliasing", check_aliasing),
    Check("logits", check_golden),
    Check("streaming", check_streaming),
    Check("layer", check_layer),
    Check("attention", check_attention),
    Check("disk", check_disk),
    Check("keep warm", check_keep_warm),
)
