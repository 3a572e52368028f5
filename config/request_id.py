"""The id of the request that is being answered, so that a warning on its way can carry it."""

from contextvars import ContextVar

# Set by the HTTP side for each request, read by the handlers of the log.
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
