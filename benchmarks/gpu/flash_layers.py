"""GLM-5.3-Flash at true shapes, six layers (5 linear, 1 sparse): decode and prefill beside the bytes' floor.

`python -m benchmarks.gpu.flash_layers`: 4-bit experts resident, from files that are holes, with a random
embedding and random routers, so that rows are routed as rows are. The floor is what a token reads, at the
rate of the GPU's memory.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import mlx.core as mx
from mlx.utils import tree_flatten

from benchmarks.rig.drive import use_engine_environment
from models.arithmetic import choose_arithmetic
from models.attention.attention import Span
from models.attention.cache import SequenceCache
from models.glm_moe_dsa import Model
from models.loading.loading import load_model, open_checkpoint
from models.loading.public_formats import FLASH_FORMAT, write_hollow
from streaming.store import ExpertStore

LAYERS = 6
H200_BYTES_PER_S = 4.8e12


def load(folder: Path) -> tuple[Model, int]:
    """The model, and the bytes of one expert of each layer together."""
    checkpoint, arithmetic = open_checkpoint(write_hollow(folder, FLASH_FORMAT, LAYERS)), choose_arithmetic()
    store = ExpertStore(checkpoint.experts, checkpoint.args.n_routed_experts, float_dtype=arithmetic.dtype)
    store.load_all()
    model = load_model(checkpoint, arithmetic, store)
    embedding = model.model.embed_tokens
    embedding.scales = mx.random.normal(embedding.scales.shape).astype(embedding.scales.dtype)
    embedding.biases = mx.random.normal(embedding.biases.shape).astype(embedding.biases.dtype)
    for layer in model.model.layers:
        if "gate" in layer.mlp:
            layer.mlp.gate.weight = mx.random.normal(layer.mlp.gate.weight.shape)
    mx.eval(model.parameters())
    experts = sum(sum(part.nbytes for part in checkpoint.experts.parts(layer)) for layer in store.layers)
    return model, experts


def timed(step: Callable[[], mx.array], rounds: int) -> list[float]:
    """Seconds of each round, the first one left out."""
    seconds = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        mx.eval(step())
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def floor_bytes(model: Model, expert_bytes: int) -> int:
    """What a decode step reads and writes at least: weights, the chosen experts, and states twice."""
    parameters = dict(tree_flatten(model.parameters()))
    trunk = sum(array.nbytes for name, array in parameters.items() if "embed_tokens" not in name)
    return trunk + model.args.num_experts_per_tok * expert_bytes + 2 * model.make_cache().nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, nargs="*", default=[2048, 8192])
    parser.add_argument("--rounds", type=int, default=64)
    options = parser.parse_args()
    use_engine_environment("benchmarks.gpu.flash_layers")
    mx.random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model, expert_bytes = load(Path(folder))
    nbytes = floor_bytes(model, expert_bytes)
    floor_s = nbytes / H200_BYTES_PER_S
    for length in options.prompts:
        prompt = mx.random.randint(0, model.args.vocab_size, (length,))
        times = timed(partial(read, model, prompt), 3)
        rate, low, high = length / median(times), min(times), max(times)
        print(f"prefill of {length}: {rate:.0f} tokens/s, {low:.3f} to {high:.3f} s")
        cache = model.make_cache()
        mx.eval(model(prompt, [Span(cache, 0, length)]))
        steps = [1000 * s for s in timed(partial(decode, model, cache), options.rounds)]
        times_floor = median(steps) / (1000 * floor_s)
        print(
            f"decode after {length}: {median(steps):.2f} ms (from {min(steps):.2f} to {max(steps):.2f}), "
            f"{times_floor:.1f} times the floor of {1000 * floor_s:.3f} ms for {nbytes / 1e6:.0f} MB"
        )


def read(model: Model, prompt: mx.array) -> mx.array:
    """A prompt through all layers, into a cache of its own: its last row."""
    return model(prompt, [Span(model.make_cache(), 0, prompt.shape[0])])[-1:]


def decode(model: Model, cache: SequenceCache) -> mx.array:
    """A step behind what the cache holds."""
    return model.logits(model(mx.array([7]), [Span(cache, 0, 1)]))


if __name__ == "__main__":
    main()
