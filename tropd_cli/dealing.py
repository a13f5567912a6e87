"""Work dealt to the processes of a job, and its results brought together in the order in which one process makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate import Accelerator

T = TypeVar("T")
R = TypeVar("R")


def mine(accelerator: Accelerator, items: Sequence[T]) -> Sequence[T]:
    """The items of this process: dealt in turn."""
    return items[accelerator.process_index :: accelerator.num_processes]


def in_rounds(accelerator: Accelerator, items: Sequence[T], work: Callable[[T], Iterable[R]]) -> Iterator[Iterable[R]]:
    """In every round each process works on the next of `mine`, if there is one left for it.

    Every process has to go through all rounds: at the end of each they hand over what they made.

    Returns:
        per round, the results of all processes in the order of the items on the first one, nothing on the others.
    """
    count, own = accelerator.num_processes, mine(accelerator, items)
    for number in range(-(-len(items) // count)):
        made = chain.from_iterable([work(item) for item in own[number : number + 1]])
        yield made if count == 1 else _on_the_first(accelerator, list(made))


def _on_the_first(accelerator: Accelerator, results: list[R]) -> list[R]:
    """Everyone's results. Only the first process gets them: all would be many times a machine's memory."""
    parts: list[Any] | None = [None] * accelerator.num_processes if accelerator.is_main_process else None
    dist.gather_object(results, parts)
    return list(chain.from_iterable(parts or []))
