"""What OpenRouter charges for the models that this server can stand in for: a table with a date.

Nothing is charged here; receipts say what the same tokens would have cost there.
"""

from collections.abc import Mapping
from dataclasses import dataclass

# From the package genai-prices, as in force at OpenRouter since this day. US dollars for a million tokens.
PRICES_OF = "2026-11-03"


@dataclass(frozen=True)
class Price:
    """US dollars for a million tokens: of a prompt, of its part that was cached, of an answer."""

    prompt: float
    cached: float
    completion: float

    def of(self, num_prompt: int, num_cached: int, num_completion: int) -> float:
        """US dollars for these tokens; the cached ones are among the prompt's."""
        millions = (
            self.prompt * (num_prompt - num_cached)
            + self.cached * num_cached
            + self.completion * num_completion
        )
        return millions / 1e6


PRICES: Mapping[str, Price] = {
    "z-ai/glm-5": Price(1.00, 0.20, 3.20),
    "z-ai/glm-5.1": Price(1.40, 0.26, 4.40),
    "z-ai/glm-5.2": Price(1.40, 0.26, 4.40),
    "z-ai/glm-5.3": Price(1.40, 0.26, 4.40),
}
