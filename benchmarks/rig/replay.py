"""A model of the bench geometry whose decode rows go where a recorded or made-up routing says.

Everything is computed as in the product, the router too; only its choice is replaced, by one that waits for
it, so that reads start when they would. Prompts are routed by the router itself. The guess at the next layer
is right as often as published: 75 % of all, the likeliest more often than the last. Used by
`benchmarks.fleet.decode` and `benchmarks.fleet.prompts`.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from benchmarks.rig.checkpoint import BENCH, write_checkpoint
from benchmarks.rig.routing import Routing, load_conversations, make_routing
from benchmarks.rig.simulated_disk import SimulatedDisk
from config.plan import MIN_RING_SLOTS
from models.arithmetic import CPU
from models.attention.attention import Span
from models.attention.cache import SequenceCache
from models.experts.router import Router
from models.glm_moe_dsa import Model, MoeMlp
from models.loading.loading import Checkpoint, load_model, open_checkpoint
from server.engine.model_protocol import Backend
from server.engine.schedule.limits import Limits
from server.link.messages import ModelInfo
from streaming.disk.disk import DirectDisk
from streaming.eviction.policy import LeastNearlyChosen
from streaming.store import ExpertStore

TRACES = Path(__file__).parents[1] / "traces"
NUM_AGENTS, NUM_SPARSE = 8, 3
# The bench geometry with three of its thirteen sparse layers, so that a step of eight takes a second.
FLEET: dict[str, Any] = BENCH | {
    "num_hidden_layers": 3 + NUM_SPARSE, "mlp_layer_types": ["dense"] * 3 + ["sparse"] * NUM_SPARSE,
    "max_position_embeddings": 65_536,
}  # fmt: skip
EXPERTS, TOP = BENCH["n_routed_experts"], BENCH["num_experts_per_tok"]
SLOTS = EXPERTS // 4
LATENCY_S = 1e-4
# How often the guess of each rank is right; 0.75 in the mean.
PRECISION = np.linspace(0.95, 0.55, TOP)
ROUTINGS = ("own", "shared", "synthetic")


@cache
def conversations(kind: str) -> tuple[Routing, ...]:
    """A routing for each agent.

    `own`: Pocket's in conversations of their own. `shared`: Pocket's behind 2,048 tokens that all have in
    common. `synthetic`: of the published locality, agents independent of each other.
    """
    if kind == "synthetic":
        return tuple(make_routing(256, NUM_SPARSE, EXPERTS, TOP, seed=i) for i in range(NUM_AGENTS))
    name = {"own": "pocket-live.npz", "shared": "pocket-shared.npz"}[kind]
    found = load_conversations(TRACES / name, TOP)[:NUM_AGENTS]
    return tuple(Routing(r.experts[:, ::3], r.scores[:, ::3]) for r in found)  # every third layer


class ReplayedRouter(nn.Module):
    """Chooses what the replay says, once the router at its place has chosen."""

    def __init__(self, router: Router, rows_of: Callable[[], tuple[NDArray[Any], ...] | None]) -> None:
        super().__init__()
        self._router, self._rows_of = router, rows_of

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        ids, weights, choice = self._router(x)
        if (rows := self._rows_of()) is None:
            return ids, weights, choice
        experts, scores, _ = rows
        return mx.array(experts) + 0 * ids, weights, mx.array(scores) + 0 * choice

    def ranked(self, x: mx.array) -> mx.array:
        """As the router's own."""
        ranked = self._router.ranked(x)
        if (rows := self._rows_of()) is None:
            return ranked
        return mx.array(rows[2]) + 0 * ranked


class ReplayedModel:
    """The model, as the engine asks for it. An agent is known by the last token of its prompt."""

    def __init__(self, inner: Model, routings: Sequence[Routing]) -> None:
        self._inner, self._routings = inner, routings
        self._agents: WeakKeyDictionary[SequenceCache, tuple[int, int]] = WeakKeyDictionary()
        self._rows: list[tuple[int, int]] | None = None  # agent and position of each row of the pass
        sparse = [layer.mlp for layer in inner.model.layers if isinstance(layer.mlp, MoeMlp)]
        for number, mlp in enumerate(sparse):
            mlp["gate"] = ReplayedRouter(mlp.gate, partial(self._route, number))
        for layer, following in pairwise(inner.model.layers):
            layer.precede(following)

    @property
    def num_layers(self) -> int:
        """As the model's own."""
        return self._inner.num_layers

    def make_cache(self) -> SequenceCache:
        """An empty cache."""
        return self._inner.make_cache()

    def logits(self, hidden: mx.array) -> mx.array:
        """[M, H] -> [M, V]."""
        return self._inner.logits(hidden)

    def forward(self, tokens: mx.array, spans: Sequence[Span]) -> Generator[int | None, None, mx.array]:
        """As the model's own."""
        rows = self._place(tokens, spans)
        layers = self._inner.forward(tokens, spans)
        while True:
            self._rows = rows
            try:
                layer = next(layers)
            except StopIteration as end:
                hidden: mx.array = end.value
                return hidden
            yield layer

    def _place(self, tokens: mx.array, spans: Sequence[Span]) -> list[tuple[int, int]] | None:
        if all(span.rows == 1 and span.cache in self._agents for span in spans):
            agents = [self._agents[span.cache] for span in spans]
            return [
                (agent, span.cache.length - start) for (agent, start), span in zip(agents, spans, strict=True)
            ]
        for span in spans:
            agent = int(tokens[span.stop - 1]) % len(self._routings)
            self._agents[span.cache] = agent, span.cache.length + span.rows
        return None

    def _route(self, layer: int) -> tuple[NDArray[Any], ...] | None:
        """Experts [N, k], scores [N, E] and guess [N, k] of the rows."""
        if self._rows is None:
            return None
        rows = [(self._routings[agent], agent, position) for agent, position in self._rows]
        at = [(routing, agent, position % len(routing.experts)) for routing, agent, position in rows]
        experts = np.stack([routing.experts[token, layer] for routing, _, token in at]).astype(np.int32)
        scores = np.stack([routing.scores[token, layer] for routing, _, token in at])
        guess = np.stack(
            [_guess(experts[i], (*row[1:], layer), scores.shape[-1]) for i, row in enumerate(at)]
        )
        return experts, scores, guess


def _guess(wanted: NDArray[np.int32], seed: tuple[int, ...], num_experts: int) -> NDArray[np.int32]:
    rng = np.random.default_rng(seed)
    others = np.setdiff1d(np.arange(num_experts, dtype=np.int32), wanted)
    wrong = rng.choice(others, len(wanted), replace=False)
    return np.where(rng.random(len(wanted)) < PRECISION, rng.permutation(wanted), wrong)


@dataclass
class Bench:
    """A checkpoint of a geometry on this disk, to be opened resident or streamed."""

    checkpoint: Checkpoint

    @classmethod
    def write(cls, folder: Path, config: dict[str, Any] = FLEET) -> "Bench":
        """Writes it first."""
        return cls(open_checkpoint(write_checkpoint(folder, config)))

    @property
    def expert_bytes(self) -> int:
        index = self.checkpoint.experts
        return index.expert_bytes(index.layers[0])

    def open(self, rate: float | None, routings: Sequence[Routing]) -> "OpenBench":
        """With a quarter of the experts in memory, the others on a disk of this rate; None: all in memory."""
        index, args = self.checkpoint.experts, self.checkpoint.args
        disk = SimulatedDisk(rate, LATENCY_S, DirectDisk()) if rate else None
        store = ExpertStore(
            index, SLOTS if rate else EXPERTS, float_dtype=CPU.dtype, disk=disk,
            make_policy=partial(LeastNearlyChosen, args.n_routed_experts, args.num_experts_per_tok),
            ring_slots=EXPERTS // 2 if rate else MIN_RING_SLOTS,
        )  # fmt: skip
        if rate is None:
            store.load_all()
        return OpenBench(ReplayedModel(load_model(self.checkpoint, CPU, store), routings), store, disk)


@dataclass
class OpenBench:
    """A model that answers, and what it reads from."""

    model: ReplayedModel
    store: ExpertStore
    disk: SimulatedDisk | None

    def backend(self, limits: Limits) -> Backend:
        """For the engine's loop."""
        return Backend(self.model, ModelInfo(FLEET["vocab_size"], 65_536), limits=limits)
