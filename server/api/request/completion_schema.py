"""The body of a text completion."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from server.api.request.common_fields import GenerationRequest, Listed

MAX_PROMPTS = 1024

TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class CompletionRequest(GenerationRequest):
    """The body of POST /completions. `max_tokens` 0 with `echo` and `logprobs` scores a prompt."""

    prompt: str | Listed[str] | Listed[TokenId] | Listed[Listed[TokenId]]
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _refuse_what_is_missing(self) -> Self:
        if self.best_of not in (None, 1):
            raise ValueError(f"'best_of' can only be 1, not {self.best_of}")
        if self.suffix:
            raise ValueError("'suffix' is not supported")
        return self

    @model_validator(mode="after")
    def _has_prompts(self) -> Self:
        if not 1 <= len(self.prompts) <= MAX_PROMPTS:
            raise ValueError(f"'prompt' must hold 1 to {MAX_PROMPTS} prompts")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, text or ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[item for item in self.prompt if isinstance(item, int)]]
        return [item for item in self.prompt if not isinstance(item, int)]
