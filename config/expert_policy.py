"""The names of the rules by which experts give up their places, and which one is meant without a word."""

from typing import Literal

ExpertPolicy = Literal["auto", "lru", "nearness"]
DEFAULT_EXPERT_POLICY: ExpertPolicy = "auto"
