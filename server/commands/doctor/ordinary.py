"""The checks of plain `glmserve doctor`, in the order in which they run."""

from collections.abc import Sequence

from server.commands.doctor import machine_checks, model_checks
from server.commands.doctor.finding import Check

CHECKS: Sequence[Check] = (
    Check("python", machine_checks.check_python),
    Check("mlx", machine_checks.check_mlx),
    Check("kernels", machine_checks.check_kernels),
    Check("memory", machine_checks.check_memory),
    Check("wired memory", machine_checks.check_wired),
    Check("open files", machine_checks.check_descriptors),
    Check("port", machine_checks.check_port),
    Check("cache folder", machine_checks.check_cache_folder),
    Check("keys", machine_checks.check_keys),
    Check("checkpoint", model_checks.check_checkpoint),
    Check("plan", model_checks.check_plan),
    Check("alignment", model_checks.check_alignment),
    Check("mirrors", model_checks.check_mirrors),
    Check("dialect", model_checks.check_dialect),
    Check("parser", model_checks.check_parser),
    Check("speed", model_checks.check_speed),
)
