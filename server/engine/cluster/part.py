"""A rank's part of the model, and its way to the others' parts."""

import os
import tempfile
from dataclasses import replace
from json import dumps
from pathlib import Path

import mlx.core as mx

from models.experts.exchange import Exchange, gather_over
from models.loading.loading import Checkpoint
from server.engine.cluster.rank_messages import Welcome
from streaming.placement import Placement


def part_of(checkpoint: Checkpoint, placement: Placement) -> Checkpoint:
    """The checkpoint as the rank uses it: of each layer's experts those that it owns."""
    return replace(checkpoint, experts=checkpoint.experts.part(placement.owned))


def join(welcome: Welcome, checkpoint: Checkpoint) -> Exchange:
    """Connects to the neighbours in MLX's ring; once in a process, because MLX keeps the first group."""
    with tempfile.TemporaryDirectory(prefix="glmserve-ring-") as folder:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(dumps([[address] for address in welcome.addresses]))
        os.environ["MLX_HOSTFILE"], os.environ["MLX_RANK"] = str(hosts), str(welcome.rank)
        group = mx.distributed.init(strict=True, backend="ring")
    placement = Placement.by_id(group.rank(), group.size(), checkpoint.args.n_routed_experts)
    return Exchange(placement, gather_over(group))
