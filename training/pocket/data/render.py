"""Renders a conversation into GLM-5.2's prompt text, in parts that are trained on and parts that are not.

Owns the Python twin of chat_template.jinja (a test holds the two equal). A turn of the assistant is
trained on when it is rendered just as the model would have to write it after a generation prompt.
"""

import json
from dataclasses import dataclass, replace

from training.pocket.data.sample import Message, Sample

TOOL_PREAMBLE = (
    "\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
TOOL_EPILOGUE = (
    "</tools>\n\nFor each function call, output the function name and arguments "
    "within the following XML format:\n"
    "<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key><arg_value>{arg-value-1}</arg_value>"
    "<arg_key>{arg-key-2}</arg_key><arg_value>{arg-value-2}</arg_value>...</tool_call>"
)


@dataclass(frozen=True)
class Part:
    """A piece of prompt text, and whether the model learns to write it."""

    text: str
    trained: bool


def tool_line(tool: Message) -> str:
    function = tool.get("function", tool)
    kept = {k: v for k, v in function.items() if k not in ("defer_loading", "strict")}
    return "{" + ", ".join(f'"{k}": {json.dumps(v, ensure_ascii=False)}' for k, v in kept.items()) + "}"


def tools_text(tools: list[Message]) -> str:
    shown = [tool for tool in tools if not tool.get("function", tool).get("defer_loading")]
    return "<|system|>" + TOOL_PREAMBLE + "".join(tool_line(tool) + "\n" for tool in shown) + TOOL_EPILOGUE


def call_text(call: Message) -> str:
    function = call.get("function", call)
    text = f"<tool_call>{function['name']}"
    for key, value in function["arguments"].items():
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        text += f"<arg_key>{key}</arg_key><arg_value>{shown}</arg_value>"
    return text + "</tool_call>"


def head_text(sample: Sample) -> str:
    text = "[gMASK]<sop>"
    if sample.thinking:
        text += f"<|system|>Reasoning Effort: {'High' if sample.effort == 'high' else 'Max'}"
    return text + (tools_text(sample.tools) if sample.tools else "")


def assistant_parts(message: Message, sample: Sample, fresh: bool) -> list[Part]:
    """An assistant turn: its opening, and what the model writes."""
    answer = message["content"].strip() + "".join(call_text(call) for call in message.get("tool_calls", ()))
    if not sample.thinking:
        return [Part("<|assistant|><think></think>", False), Part(answer, True)]
    if fresh or sample.clear_thinking is False:
        reasoning = message.get("reasoning_content", "").strip()
        return [Part("<|assistant|><think>", False), Part(f"{reasoning}</think>{answer}", True)]
    return [Part(f"<|assistant|><think></think>{answer}", False)]


def end_of_turn(messages: list[Message], index: int) -> str:
    """The token that ends a trained turn where the conversation ends: observation after calls, else user."""
    return "<|observation|>" if messages[index].get("tool_calls") else "<|user|>"


def render(sample: Sample) -> list[Part]:
    """The whole conversation in parts, closed by the token that ends its last turn."""
    messages = sample.messages
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    parts = [Part(head_text(sample), False)]
    for index, message in enumerate(messages):
        role = message["role"]
        if role == "system":
            parts.append(Part("<|system|>" + message["content"], False))
        elif role == "user":
            parts.append(Part("<|user|>" + message["content"], False))
        elif role == "tool":
            opening = "" if messages[index - 1]["role"] == "tool" else "<|observation|>"
            parts.append(Part(f"{opening}<tool_response>{message['content']}</tool_response>", False))
        else:
            parts += assistant_parts(message, sample, index > last_user)
    parts.append(Part(end_of_turn(messages, len(messages) - 1), False))
    return parts


def prompt_text(sample: Sample) -> str:
    """The prompt of the last turn, ending where the model goes on."""
    parts = render(replace(sample, messages=sample.messages[:-1]))[:-1]
    opening = "<|assistant|><think>" if sample.thinking else "<|assistant|><think></think>"
    return "".join(part.text for part in parts) + opening
