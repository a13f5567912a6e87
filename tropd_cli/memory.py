"""Out of memory: recognise it, take half the tokens at a time, and go on."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .errors import UserError

T = TypeVar("T")
#: What this process says -> what all of them say, in order. A point that every process must reach.
Exchange = Callable[[Any], list[Any]]
SIGNS = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of torch or Python means that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError, OutOfMemory)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


def out_of_memory(
    error: BaseException, advice: str = "a smaller micro_batch_tokens or rollout_batch_tokens, ", where: str = ""
) -> str:
    """What to say when nothing smaller is tried any more."""
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return (
        f"out of memory{where} ({reason}). Try {advice}gradient_checkpointing: true, a smaller --max-response-length, "
        "or --lora-rank 16. What was saved is untouched"
    )


class OutOfMemory(RuntimeError):
    """Memory ran out in a step that all processes do together; here, or in another one (`elsewhere`)."""

    def __init__(self, reason: str | None) -> None:
        super().__init__(reason or "in another process")
        self.elsewhere = reason is None


def nobody_else(mine: T) -> list[T]:
    """`exchange` of a process that works alone."""
    return [mine]


def with_smaller_batches(
    action: Callable[[int], T],
    budget: int,
    *,
    smallest: int,
    knob: str,
    warn: Callable[[str], None],
    exchange: Exchange | None = nobody_else,
) -> tuple[T, int]:
    """Calls `action(budget)`, halving the budget each time memory runs out.

    Args:
        budget: tokens of one batch.
        smallest: tokens of the longest row here: less than that changes nothing.
        knob: the option that sets the budget.
        exchange: what every process says, in order. With several that work together, all call the action again when
            memory ran out in one of them, with the same budget, and so they must all come here with the same one. None:
            the action itself waits for the other processes, which one that fails leaves waiting: no second attempt.

    Returns:
        (result, budget that fitted).

    Raises:
        UserError: memory is short even for single rows; says which knobs are left.
    """
    if exchange is None:
        return action(budget), budget
    while True:
        result, failure = _tried(lambda budget=budget: action(budget))  # type: ignore[misc]
        own = failure is not None and not failure.elsewhere
        everyone = exchange((str(failure), smallest) if own else None)
        short = {rank: shortage for rank, shortage in enumerate(everyone) if shortage is not None}
        if not short:
            assert result is not None
            return result[0], budget
        result = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        rank, (reason, _) = next(iter(short.items()))
        where = f" in process {rank}" if len(everyone) > 1 else ""
        floor = max(longest for _, longest in short.values())
        if budget <= floor:
            raise UserError(out_of_memory(RuntimeError(reason), "", where))
        budget = max(floor, budget // 2)
        warn(f"out of memory{where}; going on with {knob}: {budget}")


def in_step(action: Callable[[], T], exchange: Exchange | None) -> T:
    """Calls an action in which no process waits for another. Where memory runs out in one, it ran out for all.

    Raises:
        OutOfMemory: on every process.
    """
    if exchange is None:
        return action()
    result, failure = _tried(action)
    if any(exchange(failure is not None)):
        raise OutOfMemory(None if failure is None else str(failure))
    assert result is not None
    return result[0]


def _tried(action: Callable[[], T]) -> tuple[tuple[T] | None, OutOfMemory | None]:
    """((result,), None), or (None, why memory ran out)."""
    try:
        return (action(),), None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # Only words leave the handler: the exception's frames hold the tensors that must go first.
        elsewhere = isinstance(error, OutOfMemory) and error.elsewhere
        return None, OutOfMemory(None if elsewhere else str(error) or type(error).__name__)
