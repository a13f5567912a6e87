"""How far a piece of work is, on stderr: a live line in a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .display import Display

#: Seconds between two plain lines.
INTERVAL = 10.0


class WorkProgress:
    """Progress of `total` pieces of work called `unit`, of which `done` are there when it starts."""

    def __init__(self, display: Display, name: str, done: int, total: int, *, unit: str) -> None:
        self.display, self.name, self.done, self.total, self.unit = display, name, done, total, unit
        self.started = self.last = time.monotonic()
        self.shown = done
        self.bar: Progress | None = None

    def __enter__(self) -> WorkProgress:
        if self.done:
            self.display.note(f"{self.name}: {self.done} of {self.total} {self.unit} are there already")
        if self.display.active and self.display.console.is_terminal:
            self.bar = Progress(
                TextColumn(self.name), MofNCompleteColumn(), BarColumn(bar_width=16), TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(), console=self.display.console, transient=True,
                redirect_stdout=False,  # rows that are written meanwhile are data, and go where stdout goes
            )  # fmt: skip
            self.line = self.bar.add_task("", total=self.total, completed=self.done, numbers="")
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, done: int, numbers: str = "") -> None:
        """Shows that `done` pieces are there, if that is news; with the last one the live line goes."""
        if done <= self.shown:
            return
        self.shown = done
        if self.bar is not None:
            self.bar.update(self.line, completed=done, numbers=numbers)
            if done >= self.total:
                self.bar.stop()
            return
        now = time.monotonic()
        if now - self.last < INTERVAL and done < self.total:
            return
        self.last = now
        left = (now - self.started) / max(done - self.done, 1) * (self.total - done)
        shown = "  ".join(part for part in (numbers, f"left {left:.0f}s") if part)
        self.display.note(f"{self.name}: {done}/{self.total} {self.unit}  {shown}")
