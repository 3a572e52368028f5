"""The checks of plain `glmserve doctor`, in the order in which they run."""

from collections.abc import Iterator, Sequence

from config.settings import Settings
from server.commands.checkpoint import choose_checkpoint
from server.commands.doctor.finding import Check, Finding, Verdict


def check_checkpoint(settings: Settings) -> Iterator[Finding]:
    """Whether the checkpoint that would be served is complete."""
    found = choose_checkpoint(settings.model)
    yield Finding(Verdict.GOOD, f"complete, served as {settings.served_model_name or found.model_id}")


CHECKS: Sequence[Check] = (Check("checkpoint", check_checkpoint),)
