"""Writes and compiles a client's grammar where nothing can be lost: in a child with limits of its own.

`python -m server.glm.schemas.trial` is kept by `GrammarDesk`, and forks a child for each attempt, which the
operating system ends. llguidance's own limits end neither its reading of a schema nor what it computes in
advance: a number with `multipleOf` took 19 s and 423 MB.
"""

import faulthandler
import os
import pickle
import resource
import signal
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from llguidance import LLMatcher, LLTokenizer, numpy

from config.errors import RequestError
from server.glm.schemas.following import parser_limits, reason_of
from server.glm.schemas.grammar_order import GrammarOrder, write_grammar
from server.glm.tokenizer_file import read_tokenizer_file


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that the engine will follow a grammar with; without a folder it is written only."""

    folder: Path | None
    size: int
    stop_token_ids: frozenset[int]


@dataclass(frozen=True)
class Bounds:
    """What an attempt may take: seconds of a processor, and bytes beside the vocabulary."""

    seconds: float
    num_bytes: int


@dataclass(frozen=True)
class Written:
    """A grammar that can be followed, and the bytes that it takes compiled."""

    grammar: str
    num_bytes: int = 0


class Exceeded(Exception):
    """An attempt took more than it may; says of what."""


def attempt(order: GrammarOrder, vocabulary: Vocabulary, bounds: Bounds) -> Written:
    """The grammar. Raises RequestError where it cannot be followed, Exceeded where that takes too much."""
    tokens = _read_vocabulary(vocabulary) if vocabulary.folder else None
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            _work(order, tokens, bounds, writer)
        finally:
            os._exit(1)
    os.close(writer)
    with open(reader, "rb") as results:
        result = results.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) or not result:
        too_long = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGXCPU)
        raise Exceeded("time" if too_long else "memory")
    written: Written | RequestError = pickle.loads(result)
    if isinstance(written, RequestError):
        raise written
    return written


@lru_cache(1)
def _read_vocabulary(vocabulary: Vocabulary) -> LLTokenizer:
    assert vocabulary.folder, "there is no vocabulary without a folder"
    text = read_tokenizer_file(vocabulary.folder)
    return LLTokenizer(text, n_vocab=vocabulary.size, eos_token=sorted(vocabulary.stop_token_ids))


def _work(order: GrammarOrder, tokens: LLTokenizer | None, bounds: Bounds, writer: int) -> None:
    """Runs in the child, which ends here or by a signal."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # nobody reads what an abort says
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, bounds.seconds)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    before = _peak_bytes()
    size = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc").is_dir() else 0
    if size:  # elsewhere only the time is bounded
        most = size * resource.getpagesize() + bounds.num_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    result: Written | RequestError
    try:
        grammar = write_grammar(order)
        if tokens is not None:
            _follow(grammar, tokens)
        result = Written(grammar, _peak_bytes() - before)
    except RequestError as error:
        result = RequestError(str(error), status=error.status, error_type=error.error_type, param=error.param)
    except MemoryError:
        return
    with open(writer, "wb") as results:
        results.write(pickle.dumps(result))


def _follow(grammar: str, tokens: LLTokenizer) -> None:
    matcher = LLMatcher(tokens, grammar, log_level=0, limits=parser_limits())
    if not matcher.is_error():
        numpy.fill_next_token_bitmask(matcher, numpy.allocate_token_bitmask(1, tokens.vocab_size))
    if matcher.is_error():
        raise RequestError(f"the grammar cannot be followed: {reason_of(matcher)}")


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if os.uname().sysname == "Darwin" else 1024
    )


def main() -> None:
    """Make an attempt for each order that comes, until there are no more."""
    os.nice(10)  # answers under way come first
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal, and for the server to obey
    orders, results = open(0, "rb"), open(1, "wb")  # noqa: SIM115 (until the end)
    while orders.peek(1):
        order, vocabulary, bounds = pickle.load(orders)
        result: Written | RequestError | Exceeded
        try:
            result = attempt(order, vocabulary, bounds)
        except (RequestError, Exceeded) as error:
            result = error
        pickle.dump(result, results)
        results.flush()


if __name__ == "__main__":
    from server.glm.schemas import trial

    trial.main()  # of the module that others know, so that results are of its classes
