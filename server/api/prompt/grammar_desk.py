"""Has grammars written in processes that can be ended, for holders in turn, and remembers what came of it."""

import hashlib
import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from weakref import finalize

from config.errors import EngineError, RequestError
from config.plan import GRAMMAR_TRIAL_BYTES
from server.api.request.turns import Lane
from server.glm.schemas.grammar_order import GrammarOrder
from server.glm.schemas.trial import Bounds, Exceeded, Vocabulary, Written

# Nearly all schemas that people write take 1 to 50 ms. What takes longer waits for a process of its own.
QUICK_S, SLOW_S = 0.2, 1.0
MAX_REMEMBERED = 1000
# Where this very code is, wherever the server was started.
ROOT = Path(__file__).parents[3]
# Longer grammars are not remembered, but written again: all that are take 8 MB at most.
MAX_REMEMBERED_CHARS = 8000


class GrammarDesk:
    """Two processes, started with the first grammars. Belongs to the event loop."""

    def __init__(self) -> None:
        self._benches = [_Bench("grammars", QUICK_S), _Bench("large-grammars", SLOW_S)]
        self._known: OrderedDict[bytes, Written | RequestError] = OrderedDict()

    async def write(self, order: GrammarOrder, vocabulary: Vocabulary, holder: str) -> Written:
        """The grammar of an order, when it is the holder's turn.

        Raises RequestError where it cannot be held, or takes too much.
        """
        name = hashlib.sha256(pickle.dumps((order, vocabulary))).digest()
        result = self._known.get(name)
        if result is None:
            result = await self._attempt(order, vocabulary, holder)
            if isinstance(result, RequestError) or len(result.grammar) <= MAX_REMEMBERED_CHARS:
                self._known[name] = result
                if len(self._known) > MAX_REMEMBERED:
                    self._known.popitem(last=False)
        else:
            self._known.move_to_end(name)
        if isinstance(result, RequestError):
            raise result
        return result

    async def _attempt(
        self, order: GrammarOrder, vocabulary: Vocabulary, holder: str
    ) -> Written | RequestError:
        exceeded = ""
        for bench in self._benches:
            try:
                return await bench.attempt(order, vocabulary, holder)
            except RequestError as error:
                return error
            except Exceeded as error:
                exceeded = str(error)
            if exceeded == "memory":
                break
        most = f"{SLOW_S:g} s" if exceeded == "time" else f"{GRAMMAR_TRIAL_BYTES // 10**6} MB"
        param = "tools" if order.functions else "response_format"
        message = f"{param} cannot be enforced: the grammar of the schema takes more than {most}; simplify it"
        return RequestError(message, param=param)


class _Bench:
    """One process, and the line before it."""

    def __init__(self, name: str, seconds: float) -> None:
        self._lane, self._bounds = Lane(1, name), Bounds(seconds, GRAMMAR_TRIAL_BYTES)
        self._process: subprocess.Popen[bytes] | None = None

    async def attempt(self, order: GrammarOrder, vocabulary: Vocabulary, holder: str) -> Written:
        """The grammar. Raises RequestError or Exceeded. An attempt ends soon even if its client leaves."""
        return await self._lane.run(holder, lambda _: self._attempt(order, vocabulary))

    def _attempt(self, order: GrammarOrder, vocabulary: Vocabulary) -> Written:
        process = self._process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump((order, vocabulary, self._bounds), process.stdin)
            process.stdin.flush()
            result: Written | RequestError | Exceeded = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            self._process = None
            process.kill()
            raise EngineError("the process that reads schemas ended; try again") from error
        if isinstance(result, Written):
            return result
        raise result

    def _start(self) -> subprocess.Popen[bytes]:
        inherited = os.environ.get("PYTHONPATH")
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "server.glm.schemas.trial"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": ":".join(filter(None, [str(ROOT), inherited]))},
        )
        finalize(self, _end, process)
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()
