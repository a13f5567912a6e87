"""What to do when a summary's numbers say that something is off: a line each, the gravest first."""

from __future__ import annotations

from typing import Any

SAME_MODEL = 1e-3  #: nats; |R| of a model and its float32 copy stays below it on every token
MANY_OUTLIERS = 0.5
LOW_ENTROPY = 0.02  #: nats per token: samples of one prompt hardly differ
MANY_TRUNCATED = 0.25
MUCH_REPETITION = 0.4


def advise(summary: dict[str, Any]) -> list[str]:
    """Lines to act on, from what `summarise` counted; empty when nothing is off."""
    if not summary["student_tokens"]:
        return ["No token here was written by the student: there is nothing to compare."]
    ratio = summary["log_ratio"]
    if ratio["min"] is not None and not ratio["infinite"] and max(-ratio["min"], ratio["max"]) < SAME_MODEL:
        return [
            "Teacher and student are the same model: R is 0 on every token, nothing can be learned. Check --teacher."
        ]
    lines = []
    if summary["outlier_share"] > MANY_OUTLIERS:
        lines.append(
            f"{summary['outlier_share']:.0%} of the student's tokens are outliers: the two models hardly share a "
            "language. Check chat template and tokenizer; else fine-tune the student on the teacher's responses first."
        )
    if _collapsed(summary["student_entropy"], summary["teacher_entropy"]):
        lines.append(
            f"The student's entropy is near zero ({summary['student_entropy']:.3f} nats): its samples hardly differ, so "
            "it sees few mistakes to learn from. Stop earlier, or lower the learning rate."
        )
    truncated = summary["truncated_share"]
    if truncated is not None and truncated > MANY_TRUNCATED:
        lines.append(
            f"{truncated:.0%} of the responses were cut at {summary['response_length']['max']} tokens: raise "
            "--max-response-length, or check that the student ever writes its end token."
        )
    if summary["repetition"] is not None and summary["repetition"] > MUCH_REPETITION:
        lines.append(
            f"{summary['repetition']:.0%} of the 4-grams repeat earlier ones: the student is looping. Look at the last "
            "tokens of the long responses."
        )
    return lines


def _collapsed(student: float | None, teacher: float | None) -> bool:
    """Near zero where the teacher is not: on a task with one right continuation both are sure, and nothing is off."""
    return student is not None and student < LOW_ENTROPY and (teacher is None or student < teacher / 2)
