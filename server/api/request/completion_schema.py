"""The body of a text completion."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, model_validator

from server.api.request.common_fields import GenerationRequest, Listed, Whole, fault, refusals, whole

MAX_PROMPTS = 1024

# Ids in one list, and how many of them are checked at once.
MAX_IDS, IDS_AT_ONCE = 2**21, 2**13

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
_IDS = TypeAdapter(Listed[TokenId])
NO_FORM = "this endpoint continues text; /chat/completions has 'response_format'"


def token_ids(value: Any) -> list[int]:
    """Ids, checked some thousands at a time, so that millions leave the interpreter to others meanwhile."""
    if not isinstance(value, list):
        raise fault("", "must be a list of token ids")
    if len(value) > MAX_IDS:
        raise fault("", f"holds {len(value)} ids, at most {MAX_IDS} are taken")
    ids: list[int] = []
    for start in range(0, len(value), IDS_AT_ONCE):
        try:
            ids += _IDS.validate_python(whole_ids(value[start : start + IDS_AT_ONCE]), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            raise fault("", f"[{start + int(first['loc'][0])}]: {first['msg']}") from error
    return ids


def whole_ids(value: Any) -> Any:
    """Ids with numbers such as 3.0 made integers; lists of lists too. Millions of plain ids cost little."""
    if not isinstance(value, list):
        return value
    kinds = set(map(type, value))
    if list in kinds:
        return [whole_ids(item) for item in value]
    return list(map(whole, value)) if float in kinds else value


class CompletionRequest(GenerationRequest):
    """The body of POST /completions. `max_tokens` 0 with `echo` and `logprobs` scores a prompt."""

    refused: ClassVar[Mapping[str, str]] = {**refusals(NO_FORM), "response_format": NO_FORM}

    prompt: Annotated[
        str | Listed[str] | Listed[TokenId] | Listed[Listed[TokenId]], BeforeValidator(whole_ids)
    ]
    max_tokens: Annotated[Whole, Field(ge=0, lt=2**31)] | None = None
    echo: bool | None = None
    logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    best_of: Whole | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _refuse_what_is_missing(self) -> Self:
        if self.best_of not in (None, 1):
            raise fault("best_of", f"'best_of' can only be 1, not {self.best_of}")
        if self.suffix:
            raise fault("suffix", "'suffix' is not supported: this model fills no gaps")
        return self

    @model_validator(mode="after")
    def _has_prompts(self) -> Self:
        if not 1 <= len(self.prompts) <= MAX_PROMPTS:
            raise fault("prompt", f"'prompt' must hold 1 to {MAX_PROMPTS} prompts")
        return self

    @property
    def num_answers(self) -> int:
        """How many answers are to be written, at most."""
        return len(self.prompts) * (self.n or 1)

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, text or ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[item for item in self.prompt if isinstance(item, int)]]
        return [item for item in self.prompt if not isinstance(item, int)]
