"""Counts what torch allocates on a CPU, through its profiler: every allocation and release, in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Allocations:
    """sizes: bytes of every allocation. peak: most bytes held at once beyond what was held before."""

    sizes: list[int]
    peak: int

    def largest(self, *, apart_from: set[int] = frozenset()) -> int:  # type: ignore[assignment]
        """The largest allocation whose size is not one of `apart_from` (weights)."""
        return max(size for size in self.sizes if size not in apart_from)


def allocations(action: Callable[[], Any]) -> Allocations:
    """Runs `action` and counts. The result of `action` is dropped only afterwards."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        result = action()
    del result
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    held, peak, sizes = 0, 0, []
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
        if event.nbytes() > 0:
            sizes.append(event.nbytes())
    return Allocations(sizes, peak)
