"""One request while the engine works on it. Owned by the scheduler; touched by the engine's thread only."""

from dataclasses import dataclass, field
from enum import Enum, auto

from models.attention.cache import SequenceCache
from server.engine.decode.constraint import Constraint
from server.engine.decode.sampling import SamplerState
from server.engine.prefix.restore import Restoring
from server.link.messages import FinishReason, Generate, Usage


class State(Enum):
    """Where a sequence stands. The methods of `Sequence` are the only transitions:

        WAITING                    admit    READING, with a cache
        READING, FOLLOWING         restore  RESTORING: saved rows are copied into the cache
        READING, DECODING          follow   FOLLOWING: another sequence computes its next rows
        RESTORING, FOLLOWING       read_on  READING, or DECODING if only the last token is to be computed
        READING, DECODING          append   DECODING: a token was drawn
        all but WAITING and ENDED  suspend  WAITING, without a cache
        all                        end      ENDED

    Two flags stand beside it: `is_boarded`, while a pass over prompts holds the sequence, and `is_cancelled`,
    once its client has left; then it ends as soon as no pass holds it.
    """

    WAITING = auto()
    RESTORING = auto()
    FOLLOWING = auto()
    READING = auto()
    DECODING = auto()
    ENDED = auto()


@dataclass(eq=False)
class Sequence:
    """A prompt, the tokens that followed, and the cache that holds their rows. `State` has its life."""

    request: Generate
    sampler: SamplerState
    constraint: Constraint
    state: State = State.WAITING
    arrived_s: float = 0.0
    served_s: float = 0.0  # when it last had a part in a step
    cache: SequenceCache | None = None
    generated: list[int] = field(default_factory=list)
    num_scored: int = 0  # prompt tokens whose scores were sent
    num_cached_tokens: int = 0  # prompt tokens that were computed for others
    num_restored_tokens: int = 0  # its first rows, if they were not computed for it
    trusts_saved: bool = True  # whether what was saved may be put into its cache
    num_saved_tokens: int = 0  # tokens up to which whole blocks are saved
    leader: "Sequence | None" = None  # while FOLLOWING
    follows_to: int = 0  # tokens that it takes over from its leader: whole blocks, and never its last token
    restoring: Restoring | None = None  # while RESTORING
    promised_tokens: int = 0  # room in the KV that was set aside when it was admitted
    is_boarded: bool = False
    is_cancelled: bool = False

    def admit(self, cache: SequenceCache) -> None:
        """Gives the sequence an empty cache; it reads its prompt from the start."""
        assert self.state is State.WAITING, "only a sequence that waits is admitted"
        self.cache, self.state = cache, State.READING

    def restore(self, restoring: Restoring) -> None:
        """Begins to fill the cache with saved rows; `read_on` ends that."""
        self.leader, self.restoring, self.state = None, restoring, State.RESTORING

    def follow(self, leader: "Sequence", follows_to: int) -> None:
        """Lets `leader` compute the next rows, up to token `follows_to`; `read_on` ends that."""
        self.restoring, self.state = None, State.FOLLOWING
        self.leader, self.follows_to = leader, follows_to

    def read_on(self) -> None:
        """Goes on alone: it decodes if the token drawn last is all that is left to compute, else it reads."""
        self.leader = self.restoring = None
        self.state = State.DECODING if self.generated and self.num_unread == 1 else State.READING

    def append(self, token_id: int) -> None:
        """Adds the token that was drawn from its last row."""
        self.generated.append(token_id)
        self.state = State.DECODING

    def suspend(self) -> None:
        """Takes the cache away; the sequence will read all its tokens again."""
        self._drop()
        self.state = State.WAITING

    def end(self) -> None:
        """Ends the sequence, whether it is complete, failed or cancelled, and frees its cache."""
        self._drop()
        self.state = State.ENDED

    def _drop(self) -> None:
        self.cache = self.leader = self.restoring = None
        self.is_boarded = False

    @property
    def cache_group(self) -> str:
        """The group within which what is computed for it may be used for others."""
        return self.request.cache_group

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.request.token_ids)

    @property
    def num_tokens(self) -> int:
        """Length of prompt and answer so far."""
        return self.num_prompt_tokens + len(self.generated)

    @property
    def num_unread(self) -> int:
        """Tokens that are not in the cache yet."""
        return self.num_tokens - (self.cache.length if self.cache else 0)

    @property
    def running_cache(self) -> SequenceCache:
        """The cache, of one that runs."""
        assert self.cache is not None, "only sequences that run have rows"
        return self.cache

    @property
    def num_before(self) -> int:
        """Length of what its next row comes after: what the cache holds, or its leader will have read."""
        return self.follows_to if self.leader else self.running_cache.length

    @property
    def has_lost_leader(self) -> bool:
        """Whether what it follows is gone, or has not read what both share after all."""
        if self.leader is None:
            return False
        return self.leader.cache is None or not self.leader.cache.can_lend(self.follows_to)

    @property
    def can_follow(self) -> bool:
        """Whether its leader will pass where both part, or has kept what it remembered there."""
        cache = self.leader.cache if self.leader else None
        return cache is not None and (cache.length < self.follows_to or cache.can_lend(self.follows_to))

    @property
    def is_held(self) -> bool:
        """Whether it runs but has no step of its own: another sequence or a disk brings its next rows."""
        return self.state in (State.FOLLOWING, State.RESTORING)

    @property
    def is_before_decoding(self) -> bool:
        """Whether it holds a cache and has rows of a prompt to come."""
        return self.state in (State.RESTORING, State.FOLLOWING, State.READING)

    @property
    def kv_tokens(self) -> int:
        """Room in the KV that it takes or was promised, the next token included."""
        return max(self.num_tokens + 1, self.promised_tokens)

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(self.num_prompt_tokens, len(self.generated), self.num_cached_tokens)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens start to stop of prompt and answer together."""
        num_prompt = self.num_prompt_tokens
        answer = self.generated[max(0, start - num_prompt) : max(0, stop - num_prompt)]
        return [*self.request.token_ids[start:stop], *answer]

    def finish_reason(self) -> FinishReason | None:
        """Why the sequence is complete, or None while it is not."""
        if self.generated and self.generated[-1] in self.request.stop_token_ids:
            return "stop"
        if len(self.generated) >= self.request.max_tokens:
            return "length"
        return None


@dataclass(frozen=True)
class PassPart:
    """The next `num_rows` tokens of a sequence, to be computed in a pass.

    If the sequence has a leader, a part of the leader stands before it in the same pass, or has been read.
    """

    sequence: Sequence
    num_rows: int


def next_part(sequence: Sequence, num_rows: int) -> PassPart:
    """The next tokens of a sequence, at most `num_rows`; short of its end they stop at its cache's grain."""
    start = sequence.num_before
    stop = min(start + num_rows, sequence.num_tokens)
    if stop < sequence.num_tokens:
        aligned = stop - stop % sequence.running_cache.grain
        stop = aligned if aligned > start else stop
    return PassPart(sequence, stop - start)
