"""Out of memory: recognise it, take half the tokens at a time, and go on."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch

from .errors import UserError

T = TypeVar("T")
SIGNS = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch or Python means that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


def out_of_memory(error: BaseException, advice: str = "a smaller micro_batch_tokens or rollout_batch_tokens, ") -> str:
    """What to say when nothing smaller is tried any more."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return (
        f"out of memory ({reason}). Try {advice}gradient_checkpointing: true, a smaller --max-response-length, "
        "or --lora-rank 16. What was saved is untouched"
    )


def with_smaller_batches(
    action: Callable[[int], T], budget: int, *, smallest: int, knob: str, warn: Callable[[str], None], alone: bool
) -> tuple[T, int]:
    """Calls `action(budget)`, halving the budget each time memory runs out.

    Args:
        budget: tokens of one batch.
        smallest: tokens of the longest row: less than that changes nothing.
        knob: the option that sets the budget.
        alone: False with several processes: one that shrinks while the others wait would hang them, so it stops.

    Returns:
        (result, budget that fitted).

    Raises:
        UserError: memory is short even for single rows; says which knobs are left.
    """
    while True:
        try:
            return action(budget), budget
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = str(error)
        # Outside the handler: the exception's frames hold the tensors that must go first.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not alone or budget <= smallest:
            advice = "" if budget <= smallest else f"a smaller {knob} (now {budget}), "
            raise UserError(out_of_memory(RuntimeError(failure), advice))
        budget = max(smallest, budget // 2)
        warn(f"out of memory; going on with {knob}: {budget}")
