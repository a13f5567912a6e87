"""Counts what torch allocates on a CPU, through its profiler: every allocation and release, in order."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Allocations:
    """changes: bytes of every allocation, and of every release below zero, in order."""

    changes: list[int]

    @property
    def peak(self) -> int:
        """Most bytes held at once beyond what was held before."""
        return self.peak_apart_from(set())

    def peak_apart_from(self, sizes: set[int]) -> int:
        """`peak` without the tensors of these sizes (weights and their gradients)."""
        counted = (change for change in self.changes if abs(change) not in sizes)
        return max(0, *itertools.accumulate(counted))

    def largest(self, *, apart_from: set[int] = frozenset()) -> int:  # type: ignore[assignment]
        """The largest allocation whose size is not one of `apart_from` (weights)."""
        return max(size for size in self.changes if size not in apart_from)


def allocations(action: Callable[[], Any]) -> Allocations:
    """Runs `action` and counts. The result of `action` is dropped only afterwards."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        result = action()
    del result
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    return Allocations([event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())])
