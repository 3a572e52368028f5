"""The errors that glmserve raises on purpose.

    GlmserveError
    ├── UsageError            start-up cannot go on; the command line prints one line and exits with 2
    │   ├── CheckpointError   the files of the model are missing, damaged, or of another kind
    │   └── BudgetError       the memory budget does not fit; the message names the one that would
    ├── GaveUp                the engine dies again and again; a service unit is to start the server anew
    ├── RequestError          one client asked for something wrong; becomes a 4xx
    │   └── ContextOverflow   prompt and answer do not fit the context; each dialect has its own words for it
    └── EngineError           the server failed a request; becomes a 5xx
        ├── DiskError         bytes that a request needed could not be read
        │   └── CheckpointChanged   the checkpoint's files are not those of the start; a person must act
        ├── ClusterError      the machines of a cluster differ, or one has ended; the engine starts anew
        └── BusyError         too many wait already; says when to come back

Each message says what is wrong and what would have been right. The mapping to wire bodies is in
`server/api/error_bodies.py`, and only there.
"""

# Seconds after which clients are told to try again, where nothing better is known, and at most: clients give
# up instead of waiting longer (openai-python: 120 s).
RETRY_AFTER_S = 5
MAX_RETRY_AFTER_S = 120


class GlmserveError(Exception):
    """Root of all errors raised on purpose."""


class UsageError(GlmserveError):
    """Start-up cannot go on."""


class CheckpointError(UsageError):
    """The checkpoint's files are missing, damaged, or describe another model."""


class BudgetError(UsageError):
    """The memory budget does not fit this checkpoint or this machine."""


class GaveUp(GlmserveError):
    """The engine could not be started; the process ends with exit code 75 (EX_TEMPFAIL)."""


class RequestError(GlmserveError):
    """One client asked for something wrong.

    `status` is the HTTP status (4xx), `error_type` the word that OpenRouter uses for it, `param` the
    field of the request body that is to blame, when there is one.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        error_type: str = "invalid_request",
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error_type = error_type
        self.param = param


class ContextOverflow(RequestError):
    """Prompt and answer are longer than the context. All numbers are tokens; 0 for no stated `max_tokens`."""

    def __init__(self, context_length: int, num_prompt_tokens: int, max_tokens: int) -> None:
        super().__init__(
            f"This endpoint's maximum context length is {context_length} tokens. However, you requested "
            f"about {num_prompt_tokens + max_tokens} tokens ({num_prompt_tokens} of text input, "
            f"{max_tokens} in the output). Please reduce the length of the messages.",
            error_type="context_length_exceeded",
        )
        self.context_length, self.num_prompt_tokens = context_length, num_prompt_tokens
        self.max_tokens = max_tokens


class EngineError(GlmserveError):
    """The server could not finish a request that was right."""


class DiskError(EngineError):
    """Bytes that a request needed could not be read from disk."""


class CheckpointChanged(DiskError):
    """The files of the checkpoint are not those of the start: trying again cannot help."""


class ClusterError(EngineError):
    """The ranks of a cluster do not compute the same, or one of them has ended."""


class BusyError(EngineError):
    """Too many requests wait already. `retry_after_s`: when it is worth trying again, in seconds."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
