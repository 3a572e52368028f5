"""What every SDK is asked, and the form in which it tells what it heard.

A talk is a module with one function for each scenario, from the server's URL to plain JSON values. It is run
by test_clients.py as `python -m tests.server.clients.NAME URL`, by the Python of the environment that has its
SDK, so it imports nothing else of the tests.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

MODEL = "glmserve/pocket"
SUM = "What is 17+25?"
TWO_CITIES = "Compare the weather in Oslo and Madrid."
MAX_TOKENS = 200
NUM_TOP = 2
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather for a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name of the city"}},
            "required": ["city"],
        },
    },
}
SCHEMA: dict[str, Any] = {
    "title": "Answer",
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "is_sunny": {"type": "boolean"}},
    "required": ["city", "is_sunny"],
    "additionalProperties": False,
}
FORMAT: dict[str, Any] = {
    "type": "json_schema",
    "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA},
}

Scenario = Callable[[str], Any]


def user(text: str) -> dict[str, Any]:
    """A turn of the user."""
    return {"role": "user", "content": text}


def weather(city: str) -> str:
    """What the tool says."""
    return json.dumps({"city": city, "temperature": 7, "condition": "rain"})


def message_of(ask: Callable[[], Any]) -> str:
    """What the error says that this must raise."""
    try:
        ask()
    except Exception as error:  # each SDK has its own
        return str(error)
    return ""


def main(*scenarios: Scenario) -> None:
    """Play all scenarios, and print what was heard by their names."""
    print(json.dumps({scenario.__name__: scenario(sys.argv[1]) for scenario in scenarios}))
