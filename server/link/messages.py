"""What crosses the pipe between the HTTP process and the engine process.

Commands go to the engine, events come back. All of them are small frozen dataclasses of plain Python
values, so that neither side needs the other's libraries to read them. Owns nothing; used on both sides.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from config.defaults import DECODE_SHARE, EXPERT_POLICY, INFLIGHT_PER_AGENT, QUEUE_LENGTH, ExpertPolicy

FinishReason = Literal["stop", "length"]

# Whether something is done; auto leaves it to trials on live steps.
Choice = Literal["auto", "on", "off"]

# Background requests run when nobody else wants to, or when they have waited long.
Priority = Literal["interactive", "background"]

# Size and digest of files by their names, as `streaming/files/marks.py` makes them.
Marks = Mapping[str, tuple[int, bytes]]

# What steps asked of each layer's experts; `Stats` says how to read it.
Heat = Mapping[int, tuple[int, int, bytes]]

# How a prompt gets into the cache: from saved blocks, or computed.
PrefillPhase = Literal["restoring", "reading"]

# What a failure was due to. `server/api/error_bodies.py` turns it into a status.
FailureKind = Literal["request", "engine", "disk", "changed", "died", "busy", "timeout", "cancelled"]


@dataclass(frozen=True)
class ClusterConfig:
    """The machines that are one engine together. `node`: this one's place among `addresses`, host:port each.

    They meet at the first address, where they prove to each other that they have the same `key` and compare
    their `version`. `started`: the other places that are on this machine, whose processes live as long as the
    first one's.
    """

    addresses: tuple[str, ...]
    node: int
    key: str = field(repr=False)
    version: str
    started: tuple[int, ...] = ()


@dataclass(frozen=True)
class EngineConfig:
    """What the engine process needs to open a model."""

    model_path: Path
    stream_experts: bool
    ram_budget_bytes: int
    max_context: int | None
    log_level: str
    log_format: Literal["text", "json"] = "text"
    log_file: Path | None = None
    decode_share: float = DECODE_SHARE
    max_inflight_per_agent: int = INFLIGHT_PER_AGENT
    batch_width: int | None = None
    max_queue: int = QUEUE_LENGTH
    expert_policy: ExpertPolicy = EXPERT_POLICY
    mirrors: tuple[Path, ...] = ()
    wires_memory: bool = False
    lookahead: Choice = "auto"
    straight_reads: Choice = "auto"
    sweep_tokens: int | None = None  # None: what the plan gives
    prefix_memory_bytes: int | None = None  # None: what the plan gives; 0: no prefix cache
    prefix_directory: Path | None = None  # None: nothing on disk
    prefix_disk_bytes: int = 0
    prefix_writes_per_day: int = 0
    cluster: ClusterConfig | None = None
    marks: Marks | None = None  # of the checkpoint's files at the first start


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. The defaults change nothing: the model's own distribution."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None


@dataclass(frozen=True)
class Thought:
    """The prompt leaves the model inside a thought. It is closed after `max_tokens` if not before."""

    end_token_id: int
    max_tokens: int | None = None


# Commands


@dataclass(frozen=True)
class Load:
    """The first command: open this model."""

    config: EngineConfig


@dataclass(frozen=True)
class Generate:
    """Continue `token_ids` by up to `max_tokens` tokens; 0 only reads (and scores) the prompt.

    They are kept as an int32 array: as Python's integers 200,000 that wait in line took 8 MB, not 0.8.

    `num_top_logprobs` asks for that many alternatives beside each token. `score_prompt` asks for the
    log-probabilities of the prompt's own tokens. `grammar`, in llguidance's language, binds the answer from
    the end of the `thought`, or from its start where there is none; compiled it takes `grammar_bytes`.
    `agent` names the client: agents share the engine's time evenly, whatever the number of their requests.
    Saved prefixes are shared within a `cache_group`; "" is that of a server without keys.
    """

    request_id: str
    token_ids: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_token_ids: frozenset[int] = frozenset()
    num_top_logprobs: int = 0
    score_prompt: bool = False
    thought: Thought | None = None
    grammar: str = ""
    grammar_bytes: int = 0
    agent: str = ""
    cache_group: str = ""
    priority: Priority = "interactive"

    def __post_init__(self) -> None:
        if not isinstance(self.token_ids, array):
            object.__setattr__(self, "token_ids", array("i", self.token_ids))


@dataclass(frozen=True)
class Cancel:
    """Forget this request; no further event of it is wanted."""

    request_id: str


@dataclass(frozen=True)
class Administer:
    """Change what the prefix cache keeps. The answer is Administered, or Failed.

    `pin` keeps the whole blocks of this prompt that are on disk, whatever else needs their room;
    `clear` forgets those of all cache groups; `pins` changes nothing and lists what is pinned.
    """

    request_id: str
    action: Literal["clear", "pin", "unpin", "pins"]
    token_ids: Sequence[int] = ()
    cache_group: str = ""


@dataclass(frozen=True)
class Replan:
    """Go on with another budget, or another policy; None leaves either as it is.

    The answer is Replanned, or Failed with the numbers where that needs a restart.
    """

    request_id: str
    ram_budget_bytes: int | None = None
    expert_policy: ExpertPolicy | None = None


@dataclass(frozen=True)
class Ping:
    """Say that the loop takes commands: it is answered by Pong, in its turn."""


@dataclass(frozen=True)
class Shutdown:
    """End after the current step."""


@dataclass(frozen=True)
class Relay:
    """Send this event. It comes from another thread of the engine: only the loop writes to the pipe."""

    event: "Event"


Command = Load | Generate | Cancel | Administer | Replan | Ping | Relay | Shutdown


# Events about the engine


@dataclass(frozen=True)
class ModelInfo:
    """What the HTTP side must know about the model that was opened."""

    vocab_size: int
    context_length: int
    memory_lines: tuple[str, ...] = ()
    request_bytes: int = 0  # the plan's line for the HTTP process
    forecast: str = ""  # what is expected of it, in one line; nothing where it does not stream


@dataclass(frozen=True)
class Loading:
    """The model is being opened."""

    fraction: float
    text: str


@dataclass(frozen=True)
class Ready:
    """The model answers."""

    info: ModelInfo
    marks: Marks = field(default_factory=dict)


@dataclass(frozen=True)
class LoadFailed:
    """The model could not be opened, or a machine of the cluster is lost.

    `is_usage_error`: trying again cannot help, a person must act.
    `is_changed`: the checkpoint is not the one that was served before, so it is not served unasked.
    `is_scarce`: the system had no descriptor, process or memory for it at the moment.
    """

    message: str
    is_usage_error: bool
    is_changed: bool = False
    is_scarce: bool = False


@dataclass(frozen=True)
class Heartbeat:
    """The engine's loop has come to another layer or step. Sent now and then while there is work."""


@dataclass(frozen=True)
class Pong:
    """The loop has come to a Ping, and so to every command before it."""


@dataclass(frozen=True)
class Stats:
    """What the engine counted since it was started; the names are those of `telemetry.measure_store`.

    `heat`: by layer, experts found in memory, experts that were not, and a byte for each expert, made by
    `streaming.statistics.as_cells`. It may be some seconds older than the values.
    """

    values: dict[str, float]
    heat: Heat = field(default_factory=dict)


# Events about one request


@dataclass(frozen=True)
class TokenScore:
    """A token, its log-probability under the model's own distribution, and the likeliest alternatives.

    `top` is sorted, likeliest first. The first token of a prompt has no log-probability.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Queued:
    """The request waits, and `num_before` others go before it as things stand. Sent on each change."""

    request_id: str
    num_before: int


@dataclass(frozen=True)
class Started:
    """The request waits no more: it has a place and a cache. May come again after a preemption."""

    request_id: str


@dataclass(frozen=True)
class Progress:
    """So many of the prompt's tokens have been read.

    Tokens that a running pass reads count by the share of its layers that is done.
    """

    request_id: str
    num_prefilled: int
    num_prompt_tokens: int
    num_cached: int = 0  # of them, computed for others, before or in the same pass
    phase: PrefillPhase = "reading"


@dataclass(frozen=True)
class PromptScored:
    """Scores of the next part of the prompt, in order; together they cover it once."""

    request_id: str
    scores: tuple[TokenScore, ...]


@dataclass(frozen=True)
class Token:
    """One new token."""

    request_id: str
    score: TokenScore


@dataclass(frozen=True)
class Usage:
    """What a request cost, in tokens. Completion tokens include the stop token."""

    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int = 0


@dataclass(frozen=True)
class Finished:
    """The request is complete. `stop_token_id` is the token that ended it; it is not sent as a Token."""

    request_id: str
    reason: FinishReason
    usage: Usage
    stop_token_id: int | None = None


@dataclass(frozen=True)
class Failed:
    """The request is over without an answer. `retry_after_s`: when trying again is worth while, if known."""

    request_id: str
    kind: FailureKind
    message: str
    retry_after_s: int | None = None


@dataclass(frozen=True)
class Replanned:
    """This is in force now, and what an engine that is started again must be given.

    `plan` is `config.plan_report.as_dict` of it, `memory_lines` the same for people. The banks follow between
    the next steps.
    """

    request_id: str
    ram_budget_bytes: int
    expert_policy: ExpertPolicy
    plan: dict[str, object]
    memory_lines: tuple[str, ...]


@dataclass(frozen=True)
class Pin:
    """A pinned conversation, with the token ids of its first and of its last block."""

    num_tokens: int
    num_bytes: int
    first_tokens: tuple[int, ...]
    last_tokens: tuple[int, ...]


@dataclass(frozen=True)
class Administered:
    """So many blocks were pinned, let go or forgotten; or the conversations that are pinned."""

    request_id: str
    count: int = 0
    pins: tuple[Pin, ...] = ()


Answered = Finished | Failed | Replanned | Administered  # the last event of a request or command
RequestEvent = Queued | Started | Progress | PromptScored | Token | Answered
EngineEvent = Loading | Ready | LoadFailed | Heartbeat | Pong | Stats
Event = EngineEvent | RequestEvent
