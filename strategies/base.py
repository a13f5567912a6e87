"""The registry of strategies, apart from their modules so that each of them can import it."""

from __future__ import annotations

from .registry import Registry
from .types import Strategy

STRATEGIES: Registry[Strategy] = Registry(
    "strategy", "tropd.strategies", "tropd strategies", attributes=("needs", "scope", "ratio_clip", "credit")
)
