"""Defaults that settings, messages and the parts that obey them share. Imports nothing, so that all may.

A default that only the settings need stands in `config/settings.py`.
"""

from typing import Literal

ExpertPolicy = Literal["auto", "lru", "nearness"]
EXPERT_POLICY: ExpertPolicy = "auto"
DECODE_SHARE = 0.3
INFLIGHT_PER_AGENT = 8
QUEUE_LENGTH = 64
QUEUE_TIMEOUT_S = 600.0
REQUEST_TIMEOUT_S = 7200.0
STEP_TIMEOUT_S = 120.0
