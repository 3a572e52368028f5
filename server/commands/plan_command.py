"""The command `glmserve plan`: prints how the budget would be divided, and loads nothing."""

import json

from config.plan_report import as_dict, render_plan
from config.settings import Settings
from models.arithmetic import choose_arithmetic
from models.loading.loading import open_checkpoint
from server.commands.checkpoint import choose_checkpoint
from server.commands.serve import make_engine_config
from server.engine.backend import plan_memory


def print_plan(settings: Settings, is_json: bool) -> int:
    """Print the ledger for people, or as JSON with `minimum_budget_bytes`."""
    directory = choose_checkpoint(settings.model).directory
    plan = plan_memory(
        open_checkpoint(directory), choose_arithmetic(), make_engine_config(settings, directory)
    )
    print(json.dumps(as_dict(plan), indent=2) if is_json else render_plan(plan))
    return 0
