"""Faults of the chat request that a body amounts to, told in the words of its client's dialect."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pydantic import ValidationError

from config.errors import ContextOverflow, RequestError
from server.api.error_bodies import first_fault


@contextmanager
def in_words_of(names: Mapping[str, str]) -> Iterator[None]:
    """Lets faults leave with the client's paths. `names` has them by the path in the chat request."""
    try:
        yield
    except ContextOverflow:
        raise
    except ValidationError as error:
        message, param = first_fault(error)
        raise _renamed(RequestError(message, param=param), names) from error
    except RequestError as error:
        raise _renamed(error, names) from error


def _renamed(error: RequestError, names: Mapping[str, str]) -> RequestError:
    """The same error; the longest known beginning of its path is put into the client's words."""
    param = error.param or ""
    begins = [name for name in names if param == name or param.startswith((f"{name}.", f"{name}["))]
    if not begins:
        return error
    begin = max(begins, key=len)
    renamed = names[begin] + param.removeprefix(begin)
    message = str(error)
    if message.startswith(param):
        message = renamed + message.removeprefix(param)
    message = message.replace(f"'{param}'", f"'{renamed}'")
    return RequestError(message, status=error.status, error_type=error.error_type, param=renamed)
