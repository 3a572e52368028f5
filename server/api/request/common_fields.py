"""What chat completions and completions have in common in their bodies, and the rules for all fields.

A field is honoured, ignored because nothing is lost by it (`IGNORED`), or refused by name because the answer
would be another one (`REFUSED`). An unknown field is ignored, and `server/api/parameters.py` says so.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    StringConstraints,
    model_validator,
)
from pydantic_core import PydanticCustomError

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

# Other engines' names for a form that the answer must have. Without it the answer would be wrong.
FORMS = (
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "json_schema",
    "grammar",
    "regex",
    "ebnf",
    "structural_tag",
    "guided_json_object",
    "json_object",
    "json_mode",
    "response_schema",
    "output_schema",
    "format",
)
# Names for searching the web, of several services, and of what is no text.
_WEB = ("web_search_options", "web_search", "search_parameters", "enable_search")
_NOT_HERE: Mapping[str, str] = {
    "audio": "this model writes text",
    **dict.fromkeys(("images", "image"), "this model reads text"),
    **dict.fromkeys(_WEB, "this server does not read the web"),
}
# OpenRouter's plugins that read the web.
WEB_PLUGINS = frozenset(["web", "web-search", "web-fetch"])
_MODALITIES = ("modalities", "response_modalities", "output_modalities")


def refusals(form: str) -> Mapping[str, str]:
    """Fields that every dialect refuses, with reasons; `form` says where the answer's form belongs."""
    return {**dict.fromkeys(FORMS, form), **_NOT_HERE}


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


def whole(value: Any) -> Any:
    """The integer that a number such as 3.0 is: JSON has one kind of number, and clients may write it so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(whole)]
Count = Annotated[Whole, Field(ge=1, lt=2**31)]
Seed = Annotated[Whole, Field(ge=-(2**63), lt=2**64)]


def fault(param: str, message: str) -> PydanticCustomError:
    """What a validator raises to blame the field `param` of its model, or with "" its own field."""
    return PydanticCustomError("fault", "{message}", {"message": message, "param": param})


class Noted(BaseModel):
    """A part of a body that can name what it holds in vain."""

    model_config = ConfigDict(strict=True)

    def overlooked(self) -> Iterator[str]:
        """Names in this part that change nothing although its client may think so."""
        return iter(())


class Lenient(Noted):
    """A part in which clients send back what they once received: fields without a meaning are not told."""

    model_config = ConfigDict(strict=True, extra="ignore")


class Exact(Noted):
    """What is no field is refused by name, unless it is null."""

    model_config = ConfigDict(strict=True, extra="allow", json_schema_extra={"additionalProperties": False})

    @model_validator(mode="after")
    def _refuse_the_unknown(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if value is not None:
                raise fault(name, f"{name!r} is not supported")
        return self


class Options(Noted):
    """Fields of a request. Those in `refused` are faults, with a reason; null counts as absent.

    Those in `ignored` have no meaning here by design; the rest is unknown, and `overlooked` names it.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    ignored: ClassVar[frozenset[str]] = frozenset()
    refused: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="after")
    def _refuse(self) -> Self:
        extra = self.model_extra or {}
        for name, reason in self.refused.items():
            if not _is_off(extra.get(name)):
                raise fault(name, f"{name!r} is not supported: {reason}")
        return self

    def overlooked(self) -> Iterator[str]:
        """The unknown fields that have a value. One of those that are refused asks for nothing here."""
        for name, value in (self.model_extra or {}).items():
            if value is not None and name not in self.ignored and name not in self.refused:
                yield name


class StreamOptions(Options):
    """OpenAI's options of a stream. It pads chunks against eavesdroppers on its own network."""

    ignored: ClassVar[frozenset[str]] = frozenset(["include_obfuscation"])

    include_usage: bool | None = None


class TextRequest(Options):
    """A request in any dialect. What it asks for beside text is refused."""

    @model_validator(mode="after")
    def _asks_for_text_only(self) -> Self:
        extra = self.model_extra or {}
        for name in _MODALITIES:
            for kind in _listed(extra.get(name)):
                if not isinstance(kind, dict) and str(kind).lower() != "text":
                    raise fault(name, f'{name!r} can only be ["text"], not {str(kind)[:40]!r}')
        for plugin in _listed(extra.get("plugins")):
            if _reads_the_web(plugin):
                raise fault("plugins", f"'plugins' has {_id_of(plugin)!r}: this server does not read the web")
        return self


class GenerationRequest(TextRequest):
    """Fields of both kinds of completion. A field that is null counts as absent."""

    ignored: ClassVar[frozenset[str]] = IGNORED
    refused: ClassVar[Mapping[str, str]] = refusals("give the form of the answer in 'response_format'")

    model: str | None = None
    models: Annotated[Listed[str], Field(max_length=64)] | None = None
    user: str | None = None
    service_tier: str | None = None  # "flex" gives way to others, the rest is one and the same
    session_id: Annotated[str, StringConstraints(max_length=256)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[Listed[Stop], Field(max_length=64)] | None = None
    n: Annotated[Whole, Field(ge=1, le=MAX_ANSWERS)] | None = None
    seed: Seed | None = None
    temperature: Annotated[Finite, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[Finite, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Finite, Field(gt=0, le=2)] | None = None
    presence_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Finite, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[Finite, Field(ge=-100, le=100)]] | None = None
    structured_outputs: bool | None = None  # they are there, asked for or not

    @property
    def stops(self) -> list[str]:
        """Stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage_in_stream(self) -> bool:
        """Whether the client asked for the usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def requires_parameters(self) -> bool:
        """Whether OpenRouter's `provider.require_parameters` asks that nothing is ignored."""
        provider = (self.model_extra or {}).get("provider")
        return isinstance(provider, dict) and provider.get("require_parameters") is True

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the named fields that have a value."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def _is_off(value: Any) -> bool:
    """Whether a field asks for nothing: as good as absent."""
    if isinstance(value, dict):
        return value.get("mode") == "off" or False in (value.get("enabled"), value.get("enable"))
    return value in (None, False, "")


def _listed(value: Any) -> list[Any]:
    """The values of a field that is a list, or one of them where it stands alone."""
    return value if isinstance(value, list) else [value] if isinstance(value, str | dict) else []


def _id_of(plugin: Any) -> str:
    name = plugin.get("id") if isinstance(plugin, dict) else plugin
    return name if isinstance(name, str) else ""


def _reads_the_web(plugin: Any) -> bool:
    return _id_of(plugin).lower() in WEB_PLUGINS and not _is_off(plugin)
