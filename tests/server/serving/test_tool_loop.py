"""A tool loop from 1,000 to 12,000 tokens through the API and the real loop: each turn pays for what is new.

The model is a tiny one that writes what the test wrote down, so that it calls a tool each time.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from starlette.testclient import TestClient

from server.api.app import make_app
from server.api.request.model_names import ModelNames
from server.api.service import Dialect, Service
from server.engine.model_protocol import Backend
from server.engine.prefix.lookup import PrefixCache
from server.engine.schedule.limits import Limits
from server.engine.schedule.shared_prefixes import SavedPrefixes
from server.glm.templates.template import OUR_TEMPLATE, ChatTemplate
from server.glm.tokenizer import Tokenizer
from server.link.messages import ModelInfo
from tests.server.api.answer.test_tool_calls import TOOLS
from tests.server.api.dialects.test_chat import ask
from tests.server.api.prompt.test_replay import keep, result_of, strip_reasoning, thought
from tests.server.engine.prefix.prefix_runs import FINGERPRINT, PLENTY, CountedModel
from tests.server.glm.answers import call_tokens
from tests.server.in_process import SMALL, VOCAB, running_engine
from tests.tiny_glm import make_weights
from tests.tiny_model import make_model

CONTEXT = 20_000
THOUGHT = "let me see " * 9
# One layer that selects keys and one that takes over its selection: only the counts matter.
SMALLEST = SMALL | {
    "num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"], "first_k_dense_replace": 1,
    "num_attention_heads": 1, "num_key_value_heads": 1, "index_n_heads": 2,
    "index_topk_freq": 4, "index_skip_topk_offset": 1,
}  # fmt: skip


@dataclass
class ScriptedModel(CountedModel):
    """Computes as any model does, and then says what is in `script`."""

    script: list[int] = field(default_factory=list)

    def logits(self, hidden: mx.array) -> mx.array:
        assert hidden.shape[0] == 1, "one request at a time"
        return mx.where(mx.arange(VOCAB) == self.script.pop(0), 100.0, 0.0)[None]


@pytest.mark.slow
@pytest.mark.parametrize("num_turns", [6, pytest.param(40, marks=pytest.mark.long)])
@pytest.mark.parametrize("change", [keep, strip_reasoning])
def test_turns_prefill_no_more_than_their_new_tokens(
    tokenizer: Tokenizer,
    tokenizer_folder: Path,
    change: Callable[[dict[str, Any]], dict[str, Any]],
    num_turns: int,
) -> None:
    model = ScriptedModel(make_model(SMALLEST, make_weights(SMALLEST, 3)))
    limits = Limits(kv_tokens=2 * CONTEXT)
    backend = Backend(model, ModelInfo(VOCAB, CONTEXT), limits=limits)
    prefixes = SavedPrefixes(PrefixCache(FINGERPRINT, PLENTY))
    dialect = Dialect(tokenizer, ChatTemplate(OUR_TEMPLATE.read_text(encoding="utf-8"), "ours"))
    rng = np.random.default_rng(4)
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather? " * 54}]
    prompts, most_over = [0], 0
    with (
        running_engine(backend, tokenizer_folder, prefixes) as engine,
        TestClient(make_app(Service(engine, dialect, ModelNames("z-ai/glm-5.2")))) as client,
    ):
        for turn in range(num_turns):
            call = call_tokens(tokenizer, "weather", {"city": f"Oslo {turn}"})
            generated = [*thought(tokenizer, THOUGHT), *call, *tokenizer.encode("<|observation|>")]
            model.script = list(generated)
            model.take_rows()
            result = ask(client, messages=messages, tools=TOOLS)
            num_prefilled = model.take_rows() - (len(generated) - 1)
            assert not model.script
            prompts.append(result["usage"]["prompt_tokens"])
            num_new = prompts[-1] - prompts[-2] - (len(generated) if turn else 0)
            most_over = max(most_over, num_prefilled - num_new)
            message = result["choices"][0]["message"]
            text = "".join(chr(97 + int(letter)) for letter in rng.integers(0, 26, rng.integers(1, 330)))
            messages += [change(message), result_of(message) | {"content": text}]
    print(f"prompts {prompts[1]} to {prompts[-1]}, at most {most_over} beyond what is new")
    assert most_over <= 64
    assert prompts[1] in range(900, 1100)
    assert prompts[-1] in range(250 * num_turns + 600, 300 * num_turns + 1_200)
