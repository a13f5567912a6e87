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
    first = next(found for found in (health.check(GOOD | change) for _ in range(3)) if found)
    assert len(first) == 1 and says in first[0]
    assert health.check(GOOD | change) == []


def test_what_has_no_tokens_is_no_problem() -> None:
    assert Health().check(dict.fromkeys(GOOD)) == []


@pytest.mark.parametrize("name", ["truncated_share", "outlier_share"])
def test_one_bad_step_between_good_ones_is_no_news(name: str) -> None:
    health = Health()
    assert [health.check(GOOD | {name: 0.6 if step % 3 else 0.1}) for step in range(12)] == [[]] * 12


def test_a_student_as_certain_as_its_teacher_has_not_collapsed() -> None:
    health = Health()
    health.check(GOOD | {"acceptance": 0.8})
    assert health.check(GOOD | {"entropy": 0.01, "acceptance": 0.97}) == []
    assert len(health.check(GOOD | {"entropy": 0.01, "acceptance": 0.5})) == 1
