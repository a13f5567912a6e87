"""How far the sampling is, on stderr: a live line in a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tropd_cli.display import Display

#: Seconds between two plain lines.
INTERVAL = 10.0


class SampleProgress:
    """Progress of one model on one task. `done` of `total` samples are there when it starts."""

    def __init__(self, display: Display, name: str, done: int, total: int) -> None:
        self.display, self.name, self.done, self.total = display, name, done, total
        self.started = self.last = time.monotonic()
        self.first = done
        self.bar: Progress | None = None

    def __enter__(self) -> SampleProgress:
        if self.done:
            self.display.note(f"{self.name}: {self.done} of {self.total} samples are there already")
        if self.display.active and self.display.console.is_terminal:
            self.bar = Progress(
                TextColumn(self.name), MofNCompleteColumn(), BarColumn(bar_width=16), TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(), console=self.display.console, transient=True,
            )  # fmt: skip
            self.line = self.bar.add_task("", total=self.total, completed=self.done, numbers="")
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, rows: Collection[dict[str, Any]]) -> None:
        """Shows the samples so far."""
        verdicts = [row["correct"] for row in rows if row["correct"] is not None]
        numbers = f"correct {sum(verdicts) / len(verdicts):.1%}" if verdicts else ""
        if self.bar is not None:
            self.bar.update(self.line, completed=len(rows), numbers=numbers)
            return
        now = time.monotonic()
        if now - self.last < INTERVAL and len(rows) < self.total:
            return
        self.last = now
        left = (now - self.started) / max(len(rows) - self.first, 1) * (self.total - len(rows))
        self.display.note(f"{self.name}: {len(rows)}/{self.total} samples  {numbers}  left {left:.0f}s")
