"""Opens the model for the engine: the one place where server/ meets models/."""

from config.errors import UsageError
from server.engine.messages import EngineConfig
from server.engine.model import Backend, ReportProgress


def open_backend(config: EngineConfig, report: ReportProgress) -> Backend:
    """Open the checkpoint that `config` names; `report` is told how far it is."""
    raise UsageError(f"no model code yet that could open {config.model_path}")
