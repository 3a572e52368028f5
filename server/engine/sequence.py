"""One request while the engine works on it. Owned by the scheduler; touched by the engine's thread only."""

from dataclasses import dataclass, field

from models.cache import SequenceCache
from server.engine.messages import FinishReason, Generate, Usage
from server.engine.sampling import SamplerState


@dataclass(eq=False)
class Sequence:
    """A prompt, the tokens that followed, and the cache that holds them."""

    request: Generate
    cache: SequenceCache
    sampler: SamplerState
    generated: list[int] = field(default_factory=list)
    is_cancelled: bool = False

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.request.token_ids)

    @property
    def num_unread(self) -> int:
        """Prompt tokens that are not in the cache yet."""
        return max(0, self.num_prompt_tokens - self.cache.length)

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(self.num_prompt_tokens, len(self.generated))

    def finish_reason(self) -> FinishReason | None:
        """Why the sequence is complete, or None while it is not."""
        if self.generated and self.generated[-1] in self.request.stop_token_ids:
            return "stop"
        if len(self.generated) >= self.request.max_tokens:
            return "length"
        return None
