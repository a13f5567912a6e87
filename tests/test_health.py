"""Warnings come once, and only when something is off."""

from __future__ import annotations

from typing import Any

import pytest

from tropd_cli.health import Health

GOOD: dict[str, Any] = {
    "reward_min": -3.0, "reward_max": 1.0, "skipped_steps": 0, "entropy": 1.0, "truncated_share": 0.1, "outlier_share": 0.2,
    "grad_norm": 0.5,
}  # fmt: skip


def test_a_sound_run_gets_no_warning() -> None:
    health = Health()
    assert [health.check(GOOD) for _ in range(30)] == [[]] * 30


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"reward_min": -1e-6, "reward_max": 1e-6}, "is the teacher the student?"),
        ({"skipped_steps": 1}, "--learning-rate"),
        ({"entropy": 0.01}, "from 1.000 to 0.010"),
        ({"truncated_share": 0.6}, "--max-response-length"),
        ({"outlier_share": 0.6}, "closer teacher"),
        ({"grad_norm": 50.0}, "over 20 times its median 0.5"),
    ],
)
def test_each_problem_is_said_once(change: dict[str, Any], says: str) -> None:
    health = Health()
    for _ in range(6):
        health.check(GOOD)
    first = health.check(GOOD | change)
    assert len(first) == 1 and says in first[0]
    assert health.check(GOOD | change) == []


def test_what_has_no_tokens_is_no_problem() -> None:
    assert Health().check(dict.fromkeys(GOOD)) == []
