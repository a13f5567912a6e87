"""Range checks of options. All raise ValueError with the value and what is allowed; nan never passes."""

from __future__ import annotations


def check_top_k(top_k: int) -> None:
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")


def check_mix(mix: float) -> None:
    """Strictly between 0 and 1: at the ends a mixture reward is identically zero or unbounded."""
    if not 0.0 < mix < 1.0:
        raise ValueError(f"mix must be between 0 and 1, both excluded, got {mix}")


def check_share(share: float) -> None:
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")


def check_below_zero(name: str, nats: float) -> None:
    if not nats < 0.0:
        raise ValueError(f"{name} must be below 0 nats, got {nats}")


def check_not_negative(name: str, value: float) -> None:
    if not value >= 0.0:
        raise ValueError(f"{name} must be at least 0, got {value}")
