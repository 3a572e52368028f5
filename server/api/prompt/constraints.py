"""From `response_format` and `tool_choice` to the grammar that the engine holds an answer to."""

from server.api.request.chat_parts import NamedTool, ResponseFormat
from server.api.request.chat_schema import ChatRequest
from server.api.service import Service
from server.glm.schemas.answer_grammar import (
    CallGrammar,
    Rules,
    check_grammar,
    json_rule,
    make_grammar,
    regex_rule,
    text_rules,
)


def grammar_of(service: Service, body: ChatRequest) -> str:
    """The grammar of an answer, empty where it is free. Raises RequestError for what cannot be held.

    A forced call leaves no room for content; where the model may choose, it may call instead of answering.
    """
    is_parallel = body.parallel_tool_calls is not False and not isinstance(body.tool_choice, NamedTool)
    if forced := body.forced_functions():
        calls = CallGrammar(service.dialect.tokenizer, forced, is_parallel)
        return _checked({"start": "calls"} | calls.rules(), "tools")
    content, tools = body.response_format, body.template_tools()
    if content is None or content.type == "text":
        return make_grammar(text_rules(service.dialect.tokenizer)) if tools and body.forbids_calls else ""
    if content.grammar is not None and content.type == "grammar":
        check_grammar(content.grammar, "response_format.grammar")
        return content.grammar
    rules = {"start": "content", "content": _content_rule(content)}
    _checked(rules, "response_format")
    if tools and not body.forbids_calls:
        functions = [tool["function"] for tool in tools]
        calls = CallGrammar(service.dialect.tokenizer, functions, is_parallel)
        return _checked(rules | {"start": "content | calls"} | calls.rules(), "tools")
    return make_grammar(rules)


def _content_rule(content: ResponseFormat) -> str:
    if content.type == "regex":
        return regex_rule(content.regex or "")
    if content.json_schema is None or content.type == "json_object":
        return json_rule({"type": "object"})
    return json_rule(content.json_schema.json_schema)


def _checked(rules: Rules, param: str) -> str:
    grammar = make_grammar(rules)
    check_grammar(grammar, param)
    return grammar
