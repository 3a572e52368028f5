"""What chat completions and completions have in common in their bodies, and the rules for all fields.

Each field is honoured, ignored because nothing is lost by it (`IGNORED`), or refused by name.
"""

from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, StringConstraints, model_validator

# OpenRouter routes and bills by these, OpenAI stores and labels; here they have no meaning.
IGNORED = frozenset(
    [
        "metadata",
        "store",
        "verbosity",
        "usage",
        "transforms",
        "route",
        "trace",
        "cache_control",
        "debug",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "prediction",
        "top_a",
        "deferred_tools",
        "modalities",
        "image_config",
        "plugins",
        "provider",
        "safety_identifier",
    ]
)

# Answers to one prompt; each holds a cache of its own.
MAX_ANSWERS = 16

T = TypeVar("T")


class _FirstFault(FailFast):
    """Pydantic's own, in a form that can be a part of a union."""

    __hash__ = object.__hash__


# A list of which only the first fault is told: a body has room for four million, and everybody would wait
# until they are put into words.
Listed = Annotated[list[T], _FirstFault()]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]


class Exact(BaseModel):
    """What is neither a field nor in `ignored` is refused by name, unless it is null."""

    model_config = ConfigDict(strict=True, extra="allow", json_schema_extra={"additionalProperties": False})

    ignored: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="after")
    def _refuse_the_unknown(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if name not in self.ignored and value is not None:
                raise ValueError(f"{name!r} is not supported")
        return self


class StreamOptions(Exact):
    """OpenAI's options of a stream. It pads chunks against eavesdroppers on its own network."""

    ignored: ClassVar[frozenset[str]] = frozenset(["include_obfuscation"])

    include_usage: bool | None = None


class GenerationRequest(Exact):
    """Fields of both kinds of completion. A field that is null counts as absent."""

    ignored: ClassVar[frozenset[str]] = IGNORED

    model: str | None = None
    models: Annotated[Listed[str], Field(max_length=64)] | None = None
    user: str | None = None
    service_tier: str | None = None  # "flex" gives way to others, the rest is one and the same
    session_id: Annotated[str, StringConstraints(max_length=256)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[Listed[Stop], Field(max_length=64)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None
    seed: Seed | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Finite, Field(gt=0, le=2)] | None = None
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[Finite, Field(ge=-100, le=100)]] | None = None

    @property
    def stops(self) -> list[str]:
        """Stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage_in_stream(self) -> bool:
        """Whether the client asked for the usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the named fields that have a value."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}
