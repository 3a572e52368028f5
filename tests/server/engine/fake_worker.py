"""An engine process over the counting model. The model path says how: busy, broken, unusable, else well."""

import sys

from config.errors import CheckpointError
from server.engine.messages import EngineConfig
from server.engine.model import Backend, ReportProgress
from server.engine.worker import main
from tests.server.engine.fakes import CountingModel, make_backend


def open_fake(config: EngineConfig, report: ReportProgress) -> Backend:
    """What the path asks for."""
    report(0.5, "half of it")
    match config.model_path.name:
        case "unusable":
            raise CheckpointError("this checkpoint is of no use")
        case "broken":
            raise RuntimeError("out of memory")
        case "busy":
            return make_backend(CountingModel(layer_s=30))
        case _:
            return make_backend(CountingModel(layer_s=0.001))


if __name__ == "__main__":
    sys.exit(main(open_fake))
