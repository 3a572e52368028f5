"""The shapes of answers, as the OpenAPI document declares them.

Nothing is built from these models: answers are written as plain JSON where they are made, and the tests hold
them to what is declared here.
"""

from typing import Any, Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "tool_calls", "content_filter", "error"]


class ErrorMetadata(BaseModel):
    error_type: str
    provider_name: str


class ErrorObject(BaseModel):
    """`code` is a word where OpenAI's clients wait for one, and the status everywhere else."""

    code: int | Literal["context_length_exceeded"]
    message: str
    type: str
    param: str | None
    metadata: ErrorMetadata


class Error(BaseModel):
    """The body of every refusal and failure, but for those of Messages."""

    error: ErrorObject


class MessagesError(BaseModel):
    """The same in Anthropic's form."""

    type: Literal["error"]
    error: ErrorObject


class PromptDetails(BaseModel):
    cached_tokens: int
    cache_write_tokens: int
    audio_tokens: int


class CompletionDetails(BaseModel):
    reasoning_tokens: int


class UsageShape(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cost: float
    is_byok: bool
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails
    cost_details: dict[str, float]


class Called(BaseModel):
    name: str
    arguments: str


class Call(BaseModel):
    id: str
    type: Literal["function"]
    index: int
    function: Called


class ReasoningText(BaseModel):
    type: Literal["reasoning.text"]
    text: str
    format: str
    index: int


class AssistantMessage(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning: str = ""
    reasoning_content: str = ""
    reasoning_details: list[ReasoningText] = []
    tool_calls: list[Call] = []


class TokenLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class ScoredToken(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[ScoredToken]
    refusal: None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    finish_reason: FinishReason
    native_finish_reason: FinishReason
    logprobs: ChatLogprobs | None


class Answered(BaseModel):
    id: str
    provider: str
    model: str
    created: int
    system_fingerprint: str
    usage: UsageShape


class ChatCompletion(Answered):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    native_finish_reason: FinishReason


class Completion(Answered):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class ThinkingDetails(BaseModel):
    thinking_tokens: int


class MessageUsage(BaseModel):
    input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingDetails
    cache_creation: dict[str, int]
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    inference_geo: None
    server_tool_use: None
    service_tier: Literal["standard"]


class MessageBlock(BaseModel):
    type: Literal["thinking", "text", "tool_use"]
    thinking: str = ""
    signature: str = ""
    text: str = ""
    id: str = ""
    name: str = ""
    input: dict[str, Any] = {}


class AnsweredMessage(BaseModel):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[MessageBlock]
    stop_reason: Literal[
        "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
    ]
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(BaseModel):
    input_tokens: int


class OutputItem(BaseModel):
    id: str
    type: Literal["reasoning", "message", "function_call", "custom_tool_call"]
    status: Literal["completed"]


class InputDetails(BaseModel):
    cached_tokens: int
    cache_write_tokens: int


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: CompletionDetails
    total_tokens: int


class ResponseObject(BaseModel):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    error: None
    incomplete_details: dict[str, str] | None
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: None
    store: Literal[False]
    temperature: float
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float
    usage: ResponseUsage


class ModelEntry(BaseModel):
    id: str
    canonical_slug: str
    name: str
    created: int
    object: Literal["model"]
    type: Literal["model"]
    display_name: str
    created_at: str
    lifecycle: Literal["active"]
    max_input_tokens: int
    owned_by: str
    context_length: int
    max_model_len: int
    architecture: dict[str, Any]
    pricing: dict[str, str]
    top_provider: dict[str, Any]
    per_request_limits: None
    supported_parameters: list[str]
    default_parameters: dict[str, float]
    supported_voices: None
    links: dict[str, str]


class ModelList(BaseModel):
    object: Literal["list"]
    total_count: int
    has_more: bool
    first_id: str
    last_id: str
    links: dict[str, str | None]
    data: list[ModelEntry]
    models: list[dict[str, Any]]


class OneModel(BaseModel):
    data: ModelEntry


class Found(BaseModel):
    """OpenRouter's wrapping of one object."""

    data: dict[str, Any]


class FoundMany(BaseModel):
    """The same of a list."""

    data: list[dict[str, Any]]


class Tokens(BaseModel):
    tokens: list[int]
    count: int
    max_model_len: int


class Text(BaseModel):
    prompt: str
    content: str


class Health(BaseModel):
    status: Literal["loading", "ready", "down"]
    model: str
