"""langchain-openrouter and the 0.11 line of OpenRouter's SDK, unmodified, from their own environment."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.glm.tokenizer import Tokenizer
from tests.server.api.scripted import ScriptedEngine
from tests.server.api.test_socket import until
from tests.server.api.test_tool_calls import BERGEN, OSLO

PYTHON = Path(sys.prefix) / "langchain" / "bin" / "python"
TALK = Path(__file__).with_name("langchain_talk.py")
HELLO = "hm</think>Hi Ærø 👋!<|user|>"
CALLS = f"ask</think>{OSLO}{BERGEN}<|observation|>"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="`make install` puts langchain beside the tests"),
]


def talk(url: str) -> dict[str, Any]:
    done = subprocess.run([PYTHON, TALK, url], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_both_talk_to_this_server(base_url: str, engine: ScriptedEngine, tokenizer: Tokenizer) -> None:
    turns = [
        HELLO,
        HELLO,
        CALLS,
        "told</think>Both.<|user|>",
        CALLS,
        HELLO,
        '</think>{"name": "Oslo"}<|user|>',
    ]
    engine.turns = [tokenizer.encode(turn) for turn in turns]
    engine.token_s = 0.01
    heard = talk(base_url)
    langchain = heard["langchain"]
    calls = [{"city": " Oslo\n", "days": 2}, {"city": "Bergen"}]
    tokens = langchain.pop("tokens")
    assert langchain.pop("error").startswith("temperature")
    assert langchain == {
        "text": "Hi Ærø 👋!",
        "thought": "hm",
        "streamed": "Hi Ærø 👋!",
        "streamed_thought": "hm",
        "calls": calls,
        "last": "Both.",
        "streamed_calls": calls,
        "logprobs": len(tokenizer.encode("Hi Ærø 👋!")),
        "parsed": {"name": "Oslo"},
    }
    assert tokens["total_tokens"] == tokens["input_tokens"] + tokens["output_tokens"]
    prompt = tokenizer.decode(engine.requests[3].token_ids)
    assert f"<think>ask</think>{OSLO}{BERGEN}<|observation|><tool_response>Oslo: 2 C" in prompt
    assert '"name"' in engine.requests[6].grammar
    assert heard["sdk"] == {
        "text": "Hi Ærø 👋!",
        "streamed": "Hi Ærø 👋!",
        "usage": True,
        "models": ["z-ai/glm-5.2"],
        "error": "openai/gpt-9 is not a valid model ID; this server has z-ai/glm-5.2",
    }
    until(lambda: engine.cancelled)
    assert engine.cancelled == [engine.requests[-1].request_id]
