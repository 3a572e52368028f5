"""One request while the engine works on it. Owned by the scheduler; touched by the engine's thread only."""

from dataclasses import dataclass, field

from models.attention.cache import SequenceCache
from server.engine.decode.constraint import Constraint
from server.engine.decode.sampling import SamplerState
from server.engine.prefix.restore import Restoring
from server.link.messages import FinishReason, Generate, Usage


@dataclass(eq=False)
class Sequence:
    """A prompt, the tokens that followed, and the cache that holds them.

    Without a cache it waits. With one it reads until a single token is left to compute, which is the last
    one drawn; from then on it decodes. One whose cache was taken away waits again and reads all its tokens.
    """

    request: Generate
    sampler: SamplerState
    constraint: Constraint
    arrived_s: float = 0.0
    served_s: float = 0.0  # when it last had a part in a step
    cache: SequenceCache | None = None
    generated: list[int] = field(default_factory=list)
    num_scored: int = 0  # prompt tokens whose scores were sent
    num_cached_tokens: int = 0  # prompt tokens that were computed for others
    num_saved_tokens: int = 0  # tokens up to which whole blocks are saved
    leader: "Sequence | None" = None  # reads what this one would read next, and this one goes on from there
    restoring: Restoring | None = None  # what was saved of it is on its way into the cache
    follows_to: int = 0  # tokens that it takes over from its leader: whole blocks, and never its last token
    promised_tokens: int = 0  # room in the KV that was set aside when it was admitted
    is_cancelled: bool = False

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
        return self.leader.cache is None or self.leader.cache.length < self.follows_to

    @property
    def is_decoding(self) -> bool:
        """Whether only the token drawn last has to be computed."""
        return bool(self.generated) and self.num_unread == 1 and not self.is_held

    @property
    def is_held(self) -> bool:
        """Whether it runs and cannot have a step of its own: others, or a disk, bring what it needs."""
        return self.leader is not None or self.restoring is not None

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
