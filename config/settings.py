"""What a run is: one frozen `Settings`, read once at start-up.

Each field is a flag (`--ram-budget`), an environment variable (`GLMSERVE_RAM_BUDGET`) and a key of the TOML
file (`ram_budget`). Its default stands here, or in `config/defaults.py` if others need it, and nowhere else.
Flags win over the environment, the environment over the file. The command line builds its parser from them.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_origin

from pydantic import (
    BeforeValidator,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode, SettingsConfigDict

from config import defaults
from config.defaults import ExpertPolicy
from config.errors import BudgetError, UsageError
from config.sizes import (
    format_size,
    parse_seconds,
    parse_share,
    parse_size,
    parse_tokens,
    physical_memory_bytes,
)

ENV_PREFIX = "GLMSERVE_"
CONFIG_VARIABLE = f"{ENV_PREFIX}CONFIG"


def _parse_size(value: Any) -> Any:
    return parse_size(value) if isinstance(value, str) else value


def _parse_size_or_zero(value: Any) -> Any:
    return 0 if value == "0" else _parse_size(value)


def _of_text(parse: Callable[[str], Any]) -> BeforeValidator:
    return BeforeValidator(lambda value: parse(value) if isinstance(value, str) else value)


Tokens = Annotated[int, _of_text(parse_tokens)]
Seconds = Annotated[float, _of_text(parse_seconds)]
Share = Annotated[float, _of_text(parse_share)]
Size = Annotated[int, BeforeValidator(_parse_size)]
SizeOrZero = Annotated[int, BeforeValidator(_parse_size_or_zero)]


def _setting(default: Any, group: str, metavar: str | None, text: str, **rules: Any) -> Any:
    extra: dict[str, JsonValue] = {"group": group, "metavar": metavar}
    return Field(default=default, description=text, json_schema_extra=extra, validate_default=True, **rules)


class Settings(BaseSettings):
    """All that a user can decide."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True)

    model: str | None = _setting(
        None,
        "Model",
        "PATH-OR-REPO",
        "folder of a checkpoint, or a repository (org/name) in the local Hugging Face cache; "
        "default: a GLM found in that cache, else the small model in the box",
    )
    served_model_name: str | None = _setting(
        None,
        "Model",
        "NAME",
        "the id that clients see (default z-ai/glm-5.2; glmserve/pocket for the model in the box)",
    )
    model_policy: Literal["strict", "any"] = _setting(
        "strict",
        "Model",
        "POLICY",
        "strict: requests for a model that is not this one are refused; any: they are answered",
    )
    max_context: Tokens | None = _setting(
        None,
        "Model",
        "TOKENS",
        "longest prompt and answer together, and what all requests that run at once share: a fleet wants the "
        "sum of its agents' (default 32768, or the model's own maximum where that is less)",
        ge=1,
    )
    stream_experts: bool = _setting(
        False, "Memory", None, "keep the experts on the SSD and only a part of them in memory"
    )
    ram_budget: Size = _setting(
        "80%",
        "Memory",
        "SIZE",
        "ceiling of the memory used: 100G (G = 10^9 bytes), 96GiB (GiB = 2^30) or 80%% of physical memory",
        gt=0,
    )
    wire: bool = _setting(
        False,
        "Memory",
        None,
        "keep the model from being paged out (macOS); off because an open fault of MLX, #3186, can stop the "
        "machine",
    )
    mirror: Annotated[tuple[Path, ...], NoDecode] = _setting(
        (),
        "Memory",
        "DIR",
        "a copy of the checkpoint on another SSD: experts are read from all copies at the same time; may be "
        f"given several times (in the environment separated by {os.pathsep})",
    )
    sweep_tokens: Tokens | None = _setting(
        None,
        "Memory",
        "TOKENS",
        "prompt tokens that go through the layers together, so that each expert is read once for all of them "
        "(default: what the budget allows, at least 2048)",
        ge=1,
    )
    expert_policy: ExpertPolicy = _setting(
        defaults.EXPERT_POLICY,
        "Memory",
        "NAME",
        "which expert gives up its place: lru (the one used longest ago), nearness (the one with the lowest "
        "recent router score, weighted by how often such scores led to its being chosen), or auto (begins "
        "with lru and changes to whichever is measured to hit more)",
    )
    lookahead: Literal["auto", "on", "off"] = _setting(
        "auto",
        "Memory",
        "CHOICE",
        "read experts that are probably wanted next: on, off, or auto (what is measured to be faster)",
    )
    straight_reads: Literal["auto", "on", "off"] = _setting(
        "auto",
        "Memory",
        "CHOICE",
        "read experts straight into their slots, not through buffers: on, off, or auto (what is measured to "
        "be faster)",
    )
    nodes: Path | None = _setting(
        None,
        "Cluster",
        "FILE",
        "compute on several machines as one: a file with a JSON list of their addresses, "
        '[["10.0.0.1:9400"], ["10.0.0.2:9400"]]; without --rank this is the first of them, and starts those '
        "on 127.0.0.1 (docs/scale.md)",
    )
    rank: int | None = _setting(
        None,
        "Cluster",
        "NUMBER",
        "this machine's place in --nodes, from 0, where each is started by hand; only rank 0 serves clients",
        ge=0,
    )
    cluster_key: str | None = _setting(
        None,
        "Cluster",
        "KEY",
        "secret of 16 letters or more that the machines of --nodes have in common; better in the environment",
        min_length=16,
    )
    decode_share: Share = _setting(
        defaults.DECODE_SHARE,
        "Scheduling",
        "SHARE",
        "share of the time that answers under way get while a prompt is read, 0.05 to 0.95",
        ge=0.05,
        le=0.95,
    )
    max_inflight_per_agent: int = _setting(
        defaults.INFLIGHT_PER_AGENT,
        "Scheduling",
        "REQUESTS",
        "requests of one agent that are worked on at once; the others wait in line",
        ge=1,
    )
    batch_width: int | None = _setting(
        None,
        "Scheduling",
        "ROWS",
        "answers that go forward in one step; more of them take turns (default: all that run)",
        ge=1,
    )
    max_queue: int = _setting(
        defaults.QUEUE_LENGTH,
        "Scheduling",
        "REQUESTS",
        "requests that may wait in line; more are refused with 503 and the time to come back",
        ge=1,
    )
    queue_timeout: Seconds = _setting(
        defaults.QUEUE_TIMEOUT_S,
        "Scheduling",
        "SECONDS",
        "a request that has not started by then is refused with 503",
        gt=0,
    )
    request_timeout: Seconds = _setting(
        defaults.REQUEST_TIMEOUT_S,
        "Scheduling",
        "SECONDS",
        "a request that is not complete by then is ended with an error",
        gt=0,
    )
    step_timeout: Seconds = _setting(
        defaults.STEP_TIMEOUT_S,
        "Scheduling",
        "SECONDS",
        "the engine is ended and started again when a layer or a step takes so long",
        gt=0,
    )
    prefix_cache_dir: Path | None = _setting(
        None,
        "Prefix cache",
        "DIR",
        "where prompts that were read are kept, so that a restart does not lose them; whoever may read this "
        "folder may read what people wrote (default glmserve/prefix in "
        "$XDG_CACHE_HOME, ~/.cache or, on a Mac, ~/Library/Caches)",
    )
    prefix_cache_size: SizeOrZero = _setting(
        "50G", "Prefix cache", "SIZE", "most bytes kept in that folder; 0 keeps nothing on disk", ge=0
    )
    prefix_cache_memory: SizeOrZero | None = _setting(
        None,
        "Prefix cache",
        "SIZE",
        "part of --ram-budget for prompts that were read; 0 reads every prompt anew, and keeps nothing on "
        "disk either (default 4 percent of the budget, at most four times the longest context)",
        ge=0,
    )
    prefix_cache_writes: SizeOrZero = _setting(
        "200G",
        "Prefix cache",
        "SIZE",
        "most bytes written to that folder in a day, because SSDs wear (1,000 tokens of GLM-5.2 are 95 MB); "
        "beyond it prompts are kept in memory only",
        ge=0,
    )
    host: str = _setting("127.0.0.1", "Network", "ADDRESS", "address to listen on")
    port: int = _setting(8080, "Network", "PORT", "port to listen on; 0 takes a free one", ge=0, le=65535)
    api_key: str | None = _setting(
        None,
        "Network",
        "KEY",
        "key that clients must send; better in the environment or a file",
        min_length=1,
    )
    api_key_file: Path | None = _setting(
        None,
        "Network",
        "FILE",
        "file of keys, one in a line as [NAME:]KEY [tokens/day=N ...]; read again on SIGHUP",
    )
    insecure: bool = _setting(
        False, "Network", None, "listen beyond this machine without keys, so that anybody there gets in"
    )
    allowed_hosts: str = _setting(
        "",
        "Network",
        "NAMES",
        "names of this machine that clients may use while there are no keys, with commas between them; "
        "localhost, --host and addresses in numbers always may",
    )
    cors_origins: str = _setting(
        "",
        "Network",
        "ORIGINS",
        "origins whose web pages may call this server, with commas between them; * is any (default none)",
    )
    ssl_certfile: Path | None = _setting(
        None, "Network", "FILE", "serve HTTPS with this certificate (PEM, with those between it and the root)"
    )
    ssl_keyfile: Path | None = _setting(
        None, "Network", "FILE", "private key of --ssl-certfile, unless it is in the same file"
    )
    metrics_key: str | None = _setting(
        None,
        "Network",
        "KEY",
        "another key, that only reads /metrics; better in the environment",
        min_length=1,
    )
    metrics_open: bool = _setting(False, "Network", None, "let anybody read /metrics without a key")
    json_keepalive: bool = _setting(
        True, "Network", None, "send a blank every 10 s to clients that wait for an answer in one piece"
    )
    strict_parameters: bool = _setting(
        False,
        "Network",
        None,
        "refuse requests with parameters that are unknown here, instead of ignoring those and saying so",
    )
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "info", "Logging", "LEVEL", "debug, info, warning or error"
    )
    log_format: Literal["text", "json"] = _setting(
        "text", "Logging", "FORMAT", "text for people, json for programs: a line for each event"
    )
    log_file: Path | None = _setting(
        None,
        "Logging",
        "FILE",
        "write the log to this file as well; at 20 MB it is renamed, and five old ones are kept",
    )

    @field_validator("mirror", mode="before")
    @classmethod
    def _split_paths(cls, value: Any) -> Any:
        return value.split(os.pathsep) if isinstance(value, str) else value

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, value: str) -> str:
        """Browsers name scheme, host and port; anything else would never match."""
        origins = [re.sub("(?<=[^/:])/$", "", origin.strip().lower()) for origin in value.split(",")]
        for origin in filter(None, origins):
            sent = _origin_of(origin)
            if origin != sent:
                raise ValueError(f"{origin[:80]!r} is no origin; write it as {sent[:80]}")
        return ",".join(filter(None, origins))

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """A file's `ram_budget = true` would be one byte."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(f"{str(value).lower()} says nothing here; give a value")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _case_is_nothing(cls, value: Any, info: ValidationInfo) -> Any:
        """Accepts choices in capitals: `INFO` as well as `info`."""
        is_choice = get_origin(cls.model_fields[str(info.field_name)].annotation) is Literal
        return value.lower() if is_choice and isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits_this_machine(self) -> Self:
        if self.ram_budget > (memory := physical_memory_bytes()):
            raise BudgetError(
                f"--ram-budget {format_size(self.ram_budget)} is more than this machine's memory "
                f"({format_size(memory)}); give at most that, or a share such as 80%"
            )
        return self


def _origin_of(text: str) -> str:
    """The Origin header that a browser sends for this page: without path and default port."""
    if text in ("*", "null") or text.startswith("file:"):
        return "null" if text.startswith("file:") else text
    scheme, _, rest = text.rpartition("://")
    host, scheme = re.split(r"[/?#\s]", rest.lstrip("/"))[0].rpartition("@")[2], scheme or "https"
    port = {"http": ":80", "https": ":443"}.get(scheme, "")
    return f"{scheme}://{host.removesuffix(port) or 'example.org'}"


def load_settings(flags: Mapping[str, Any], config_file: Path | None = None) -> Settings:
    """Settings from flags, environment and file. Raises UsageError with one line that names the fault."""
    _refuse_unknown_variables(os.environ)
    config_file = config_file or (Path(named) if (named := os.environ.get(CONFIG_VARIABLE)) else None)
    values = {
        **(_read_toml(config_file) if config_file else {}),
        **EnvSettingsSource(Settings)(),
        **flags,
    }
    try:
        return Settings(**values)
    except ValidationError as error:
        raise UsageError(_explain(error)) from error


def _refuse_unknown_variables(environment: Mapping[str, str]) -> None:
    """A variable that is misspelt would else be as good as none, and nobody told."""
    known = [CONFIG_VARIABLE, *(ENV_PREFIX + name.upper() for name in Settings.model_fields)]
    for name in environment:
        upper = name.upper()
        is_nearly_ours = upper.startswith(("GLMS", "GLM_S")) and difflib.get_close_matches(
            upper, known, 1, 0.85
        )
        if upper not in known and (upper.startswith(ENV_PREFIX) or is_nearly_ours):
            raise UsageError(f"unknown variable {name}; {_nearest(upper, known)}")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]}?" if near else "`glmserve --help` lists them"


def flag_of(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read --config {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"--config {path} is not TOML: {error}") from error


def _explain(error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    name = str(fault["loc"][0]) if fault["loc"] else ""
    if fault["type"] == "extra_forbidden":
        return f"unknown setting {name!r}; {_nearest(name, Settings.model_fields)}"
    message = fault["msg"].removeprefix("Value error, ")
    return f"{flag_of(name)} (or {ENV_PREFIX}{name.upper()}): {message}"
