"""Which verifier decides whether a response to a prompt with an answer is right."""

from __future__ import annotations

from .demo import task
from .heldout import Judge


def judge_for(verifier: str, data: str | None) -> Judge | None:
    """(response text, reference) -> correct. "auto": the demo's own check on demo data."""
    if verifier == "demo" or (verifier == "auto" and str(data).startswith("demo:")):
        return task.is_correct
    return None
