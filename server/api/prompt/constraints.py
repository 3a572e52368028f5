"""From `response_format` and `tool_choice` to the order of the grammar that the engine holds an answer to."""

from typing import Literal

from server.api.request.chat_parts import NamedTool, ResponseFormat
from server.api.request.chat_schema import ChatRequest
from server.glm.schemas.grammar_order import GrammarOrder, Tags
from server.glm.tokenizer import Tokenizer

TAGS = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")


def order_of(tokenizer: Tokenizer, body: ChatRequest) -> GrammarOrder | None:
    """What is to be held, None where the answer is free.

    A forced call leaves no room for content; where the model may choose, it may call instead of answering.
    """
    tags = _tags(tokenizer)
    is_parallel = body.parallel_tool_calls is not False and not isinstance(body.tool_choice, NamedTool)
    if forced := body.forced_functions():
        return GrammarOrder(tags, None, tuple(forced), is_parallel, is_forced=True)
    content, tools = body.response_format, body.template_tools()
    if content is None or content.type == "text":
        return GrammarOrder(tags) if tools and body.forbids_calls else None
    functions = [tool["function"] for tool in tools or [] if not body.forbids_calls]
    if content.type == "grammar":
        functions = []
    return GrammarOrder(tags, _content(content), tuple(functions), is_parallel)


def _content(content: ResponseFormat) -> tuple[Literal["json", "regex", "grammar"], object]:
    if content.type == "regex":
        return "regex", content.regex or ""
    if content.type == "grammar":
        return "grammar", content.grammar or ""
    if content.json_schema is None or content.type == "json_object":
        return "json", {"type": "object"}
    return "json", content.json_schema.json_schema


def _tags(tokenizer: Tokenizer) -> Tags:
    found = {tag: tokenizer.token_id(tag) for tag in TAGS}
    return Tags({tag: token_id for tag, token_id in found.items() if token_id is not None})
