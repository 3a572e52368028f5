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


PARITY_CHECKS: Sequence[Check] = (Check("machine", describe_machine),)
