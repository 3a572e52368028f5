"""What a grammar costs a decode step of Pocket: `python -m benchmarks.mask_cost [--rounds 9]`.

The same prompt is continued freely and held to a JSON schema, in turns. Shown are the milliseconds of a step
of either side, and those that a held step spends on the grammar itself: waiting for the mask (computed on a
thread beside the forward pass), bringing it to MLX, and starting the next one. The process starts itself
again with OpenBLAS preloaded, as the server starts its engine.
"""

import argparse
import statistics
import time

import mlx.core as mx

from benchmarks.rig.drive import use_fast_blas
from models.arithmetic import choose_arithmetic
from models.attention.attention import Span
from server.commands.checkpoint import POCKET
from server.commands.serve import load_dialect
from server.engine.decode.constraint import Constraint
from server.engine.decode.token_masks import Grammars
from server.glm.answer_grammar import json_rule, make_grammar
from server.link.messages import Generate
from tests.checkpoints import Opened, open_model

NUM_TOKENS = 48
NAMES = {"type": "array", "items": {"type": "string", "minLength": 5, "maxLength": 30}, "minItems": 20}
SCHEMA = {
    "type": "object",
    "properties": {"names": NAMES, "count": {"type": "integer"}},
    "required": ["names", "count"],
}


class Side:
    """Continues a prompt, held to a grammar or free, and keeps its times in seconds."""

    def __init__(self, opened: Opened, request: Generate, grammars: Grammars | None) -> None:
        self._model = opened.model
        self._request = request
        self._grammars = grammars
        self.steps: list[float] = []
        self.own: list[float] = []

    def run(self) -> None:
        """One answer."""
        cache, request = self._model.make_cache(), self._request
        coming = None
        if self._grammars:
            coming = self._grammars.begin_matcher(request.grammar, request.stop_token_ids)
        constraint = Constraint(request, coming)
        constraint.begin()
        hidden = self._model(mx.array(request.token_ids), [Span(cache, 0, len(request.token_ids))])[-1:]
        for _ in range(NUM_TOKENS):
            started = time.perf_counter()
            logits = self._model.logits(hidden)[0]
            mx.eval(logits)
            asked = time.perf_counter()
            allowed = constraint.apply(logits)
            mx.eval(allowed)
            applied = time.perf_counter()
            token_id = int(allowed.argmax())
            drawn = time.perf_counter()
            constraint.accept(token_id)
            accepted = time.perf_counter()
            hidden = self._model(mx.array([token_id]), [Span(cache, 0, 1)])
            mx.eval(hidden)
            self.steps.append(time.perf_counter() - started)
            self.own.append(applied - asked + accepted - drawn)


def main() -> None:
    """Measure both sides in turns, and print their medians over all steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="answers of each side")
    rounds = parser.parse_args().rounds
    use_fast_blas("benchmarks.mask_cost")
    opened = open_model(POCKET, None, choose_arithmetic())
    tokenizer = load_dialect(POCKET).tokenizer
    grammar = make_grammar({"start": "content", "content": json_rule(SCHEMA)})
    prompt = tuple(tokenizer.encode("[gMASK]<sop><|user|>Names, please.<|assistant|><think></think>"))
    request = Generate("x", prompt, NUM_TOKENS, stop_token_ids=tokenizer.eos_token_ids, grammar=grammar)
    grammars = Grammars(POCKET, opened.model.args.vocab_size)
    free, held = Side(opened, request, None), Side(opened, request, grammars)
    for number in range(rounds + 1):
        if number == 1:  # the first round makes what is made once
            free.steps, held.steps, held.own = [], [], []
        free.run()
        held.run()
    own = statistics.median(held.own) * 1e3
    step = statistics.median(free.steps) * 1e3
    print(f"free {_spread(free.steps)} ms a step, held {_spread(held.steps)} ms")
    print(f"of which the grammar's own {_spread(held.own)} ms, {own / step:.1%} of a free step")


def _spread(seconds: list[float]) -> str:
    low, *_, high = statistics.quantiles(seconds, n=10)
    return f"{statistics.median(seconds) * 1e3:.3f} ({low * 1e3:.3f} to {high * 1e3:.3f}, 1st to 9th decile)"


if __name__ == "__main__":
    main()
