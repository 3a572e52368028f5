"""What is measured on the wall clock and predicted on the simulated one: agents, prompts, budgets, disks.

A tiny model with GLM-5.2's 256 experts of which eight are chosen: its weights do not matter, because a
simulated device says how long a step takes and a simulated disk how long a read. The loop, the scheduler, the
sweep, the store and the reader are the product's.
"""

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rig.checkpoint import BENCH, write_checkpoint
from benchmarks.rig.drive import Served, drive
from benchmarks.rig.replay import LATENCY_S, ReplayedModel
from benchmarks.rig.routing import Routing, make_routing
from benchmarks.rig.simulated_device import PacedStore
from benchmarks.rig.simulated_disk import SimulatedDisk
from config.plan import MIN_RING_SLOTS
from models.arithmetic import CPU
from models.loading.loading import Checkpoint, load_model, open_checkpoint
from server.engine.model_protocol import Backend
from server.engine.prefix.lookup import PrefixCache
from server.engine.schedule.limits import Limits
from server.engine.schedule.shared_prefixes import NoPrefixes, Prefixes, SavedPrefixes
from server.link.messages import Finished, Generate, ModelInfo, Sampling, Token
from streaming.disk.disk import DirectDisk
from streaming.eviction.policy import LeastNearlyChosen, LeastRecentlyUsed
from streaming.store import ExpertStore

EXPERTS, TOP, VOCAB, CONTEXT = 256, 8, 128, 65_536
SPARSE = 8  # sparse layers of what is measured here
TEXT_TOKENS = 192  # of each agent's made-up routing, again and again
PLENTY = 10**10


@dataclass(frozen=True)
class Scene:
    """What agents ask of which machine. A sparse layer computes `layer_s` of a lone token; an expert takes
    `read_s` of the disk."""

    name: str
    agents: int = 1
    slots: int = 64
    layer_s: float = 0.010
    read_s: float = 0.0055
    prompt: int = 12
    shared: int = 0  # tokens that all prompts begin with
    answer: int = 24
    turns: int = 1
    result: int = 0  # tokens that a turn adds to the last answer
    width: int | None = None
    looks_ahead: bool = True
    follows_nearness: bool = False
    pass_rows: int = 16_384
    sparse: int = SPARSE
    ring: int = MIN_RING_SLOTS


@dataclass(frozen=True)
class Played:
    """What a scene took, in seconds of its clock, and what it read."""

    wall_s: float
    first_s: float  # mean of the agents, from the question to the first token of the first turn
    decode_s: float  # mean between two tokens of an agent, once all write
    misses: int
    hit_rate: float
    num_bytes: int
    late_s: float  # by which this machine was behind the simulated device


@contextmanager
def checkpoint_of(sparse: int) -> Iterator[Checkpoint]:
    """A tiny one with so many sparse layers."""
    config: dict[str, Any] = BENCH | {
        "hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 1 + sparse, "vocab_size": VOCAB,
        "first_k_dense_replace": 1, "mlp_layer_types": ["dense"] + ["sparse"] * sparse,
        "n_routed_experts": EXPERTS, "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 64,
        "kv_lora_rank": 64, "intermediate_size": 64, "max_position_embeddings": CONTEXT, "index_n_heads": 8,
        "index_topk_freq": 4, "index_skip_topk_offset": 3,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        yield open_checkpoint(write_checkpoint(Path(folder), config))


@cache
def routings(agents: int, sparse: int) -> tuple[Routing, ...]:
    """Of the published locality, agents independent of each other."""
    return tuple(make_routing(TEXT_TOKENS, sparse, EXPERTS, TOP, seed=i) for i in range(agents))


def play(scene: Scene, checkpoint: Checkpoint) -> Played:
    """Serves the scene to its end, on whatever clock is installed."""
    index = checkpoint.experts
    reads = _read_bytes(checkpoint)
    disk = SimulatedDisk(reads / scene.read_s, LATENCY_S, DirectDisk())
    nearness = partial(LeastNearlyChosen, EXPERTS, TOP)
    store = PacedStore(
        index, scene.slots, float_dtype=CPU.dtype, disk=disk, looks_ahead=scene.looks_ahead,
        make_policy=nearness if scene.follows_nearness else LeastRecentlyUsed, ring_slots=scene.ring,
        token_s=scene.layer_s * scene.sparse, top_k=TOP,
    )  # fmt: skip
    with closing(store):
        model = ReplayedModel(load_model(checkpoint, CPU, store), routings(scene.agents, scene.sparse))
        backend = Backend(
            model,
            ModelInfo(VOCAB, CONTEXT),
            limits=Limits(pass_rows=scene.pass_rows, kv_tokens=10**9, batch_width=scene.width),
        )
        _fill(store, disk)
        talk, before = _Talk(scene), store.statistics()
        prefixes: Prefixes = (
            SavedPrefixes(PrefixCache(bytes(32), PLENTY)) if scene.turns > 1 else NoPrefixes()
        )
        began = time.monotonic()
        served = drive(backend, talk.first(), talk.react, prefixes=prefixes)
        after = store.statistics()
    names = [f"{agent}.0" for agent in range(scene.agents)]
    all_write_s = max(served.times[name][0] for name in names)
    gaps = [b - a for name in names for a, b in pairwise(served.times[name]) if a >= all_write_s]
    asked = (after.hits + after.misses + after.ahead_used) - (before.hits + before.misses + before.ahead_used)
    return Played(
        max(times[-1] for times in served.times.values()) - began,
        sum(served.first_s(name) for name in names) / len(names),
        sum(gaps) / max(1, len(gaps)),
        after.misses - before.misses,
        (after.hits - before.hits) / max(1, asked),
        after.payload_bytes - before.payload_bytes,
        store.late_s,
    )


def _read_bytes(checkpoint: Checkpoint) -> int:
    index = checkpoint.experts
    return index.expert_bytes(index.layers[0])


def _fill(store: ExpertStore, disk: SimulatedDisk) -> None:
    """Fills the slots in no time: a server has them full, of whatever came before."""
    rate, disk.bytes_per_s = disk.bytes_per_s, 1e15
    for layer in store.layers:
        store.bring_back(layer, range(store.num_slots(layer)))
    disk.bytes_per_s = rate
    disk.services.clear()


class _Talk:
    """Conversations of all agents of a scene."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._said = {agent: _tokens(0, scene.shared) for agent in range(scene.agents)}

    def first(self) -> list[Generate]:
        return [self._ask(agent, 0) for agent in range(self._scene.agents)]

    def react(self, served: Served, event: Token | Finished) -> Sequence[Generate]:
        if isinstance(event, Token):
            return []
        agent, turn = map(int, event.request_id.split("."))
        self._said[agent] += served.tokens[event.request_id]
        return [self._ask(agent, turn + 1)] if turn + 1 < self._scene.turns else []

    def _ask(self, agent: int, turn: int) -> Generate:
        count = self._scene.result if turn else self._scene.prompt - self._scene.shared
        # The replay knows an agent by the last token of its prompt.
        name = 64 // self._scene.agents * self._scene.agents + agent
        self._said[agent] += [*_tokens(100 * agent + turn + 1, count - 1), name]
        ids = tuple(self._said[agent])
        return Generate(f"{agent}.{turn}", ids, self._scene.answer, Sampling(temperature=0), agent=str(agent))


def _tokens(seed: int, count: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(4, VOCAB, max(0, count))]
