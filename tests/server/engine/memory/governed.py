"""A tiny streamed GLM whose banks are governed, on a machine with a neighbour and a time of its own."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import cast

import mlx.core as mx

from config.defaults import ExpertPolicy
from config.plan import Geometry, MemoryPlan, make_plan
from models.arithmetic import CPU
from models.attention.attention import Span
from models.attention.cache import SequenceCache
from models.glm_moe_dsa import Model
from models.loading.loading import load_model, make_geometry, open_checkpoint
from server.engine.loop import EngineLoop
from server.engine.memory.governor import Governor, Memory, Ungoverned
from server.engine.memory.pressure import Room
from server.engine.model_protocol import Backend
from server.engine.schedule.limits import Limits
from server.link.messages import Command, ModelInfo
from streaming.eviction.contest import Rule, make_rule
from streaming.store import ExpertStore
from tests.checkpoints import save_packed
from tests.server.engine.driven import World
from tests.tiny_glm import WIDER, make_weights

CONTEXT = 4096
K, NUM_EXPERTS = WIDER["num_experts_per_tok"], WIDER["n_routed_experts"]
PHYSICAL = 10**12


def save(folder: Path) -> Path:
    return save_packed(folder, WIDER, make_weights(WIDER, 3), lambda path: None)


def rule(name: ExpertPolicy) -> Rule:
    return make_rule(name, NUM_EXPERTS, K)


@dataclass
class Governed:
    """The model, its store, and the plan that both were opened by."""

    store: ExpertStore
    model: Model
    geometry: Geometry
    plan: MemoryPlan

    @property
    def per_slot(self) -> int:
        """Bytes of one more slot in every layer."""
        return sum(self.geometry.expert_bytes)

    def govern(self, machine: "Machine") -> Governor:
        return Governor(
            self.store, self.geometry, self.plan, self.model.settle, rule, rule("nearness"),
            measure_room=machine.room, clock=machine.world.clock,
        )  # fmt: skip


def open_governed(folder: Path, more_slots: int = 10, *, in_place: bool = True) -> Governed:
    """With so many slots a layer more than the smallest budget gives."""
    checkpoint = open_checkpoint(folder)
    geometry = make_geometry(checkpoint, CPU, CONTEXT)
    least = make_plan(
        geometry, PHYSICAL, CONTEXT, prefix_bytes=0, physical_bytes=PHYSICAL
    ).minimum_budget_bytes
    budget = least + more_slots * sum(geometry.expert_bytes)
    plan = make_plan(geometry, budget, CONTEXT, prefix_bytes=0, physical_bytes=PHYSICAL)
    store = ExpertStore(
        checkpoint.experts,
        dict(zip(checkpoint.experts.layers, plan.slots_per_layer, strict=True)),
        float_dtype=CPU.dtype,
        make_policy=rule("nearness"),
        ring_slots=plan.ring_slots,
        shares_memory=in_place,
    )
    assert K < min(plan.slots_per_layer) <= max(plan.slots_per_layer) <= NUM_EXPERTS
    assert store.slot_bytes == plan.lines["experts"]
    return Governed(store, load_model(checkpoint, CPU, store), geometry, plan)


@dataclass
class Machine:
    """Memory that the banks share with a neighbour; half of what is planned is free beside them."""

    governed: Governed
    world: World
    neighbour: Callable[[float], float] = lambda now_s: 0.0  # parts of the planned experts' bytes
    lowest: int = PHYSICAL

    def room(self) -> Room:
        planned = self.governed.plan.lines["experts"]
        taken = self.governed.store.slot_bytes + int(planned * self.neighbour(self.world.now_s))
        available = max(0, int(1.5 * planned) - taken)
        self.lowest = min(self.lowest, available)
        return Room(available, 4 * planned)


@dataclass
class ClockedModel:
    """Each layer takes half a second of the world's time. `on_layer` hears of it."""

    inner: Model
    world: World
    on_layer: Callable[[], object] = bool

    @property
    def num_layers(self) -> int:
        return self.inner.num_layers

    def forward(self, tokens: mx.array, spans: Sequence[Span]) -> Generator[int | None, None, mx.array]:
        layers = self.inner.forward(tokens, spans)
        while True:
            try:
                layer = next(layers)
            except StopIteration as end:
                hidden: mx.array = end.value
                return hidden
            if layer is not None:  # and not a pause amid it
                self.world.now_s += 0.5
            self.on_layer()
            yield layer

    def logits(self, hidden: mx.array) -> mx.array:
        return self.inner.logits(hidden)

    def make_cache(self) -> SequenceCache:
        return self.inner.make_cache()


def serve(
    governed: Governed, world: World, memory: Memory | None = None, on_layer: Callable[[], object] = bool
) -> None:
    """All that arrives in this world, to the end; the books balance then."""
    model = ClockedModel(governed.model, world, on_layer)
    limits = Limits(batch_width=8)
    backend = Backend(model, ModelInfo(64, CONTEXT), limits=limits, memory=memory or Ungoverned())
    inbox = cast("SimpleQueue[Command]", world)
    loop = EngineLoop(backend, inbox, world.send, clock=world.clock)
    loop.run()
    loop.check_integrity()
    governed.store.check_integrity()
