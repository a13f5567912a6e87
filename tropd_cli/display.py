"""What a person sees of a run, all on stderr: a live table in a terminal, plain lines elsewhere. Data goes to stdout."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

#: (metric, heading, format) of the progress line.
COLUMNS = (
    ("reward_mean", "reward", "+.3f"),
    ("outlier_share", "outliers", ".1%"),
    ("entropy", "entropy", ".3f"),
    ("grad_norm", "grad norm", ".3g"),
    ("response_length", "length", ".1f"),
    ("tokens_per_second", "tokens/s", ".0f"),
)


class Display:
    """Progress, notes and warnings of one process; `active` is False on all but the first."""

    def __init__(self, *, active: bool = True, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.active = active
        self.progress: Progress | None = None
        self._task: Any = None
        self._started = time.monotonic()
        self._first = 0

    def note(self, text: str) -> None:
        """One line of information."""
        if self.active:
            self.console.print(Text(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        """One warning."""
        if self.active:
            self.console.print(Text("warning: ", style="bold yellow") + Text(text), soft_wrap=True)

    def start(self, done: int, total: int) -> None:
        """Begins the progress display at `done` of `total` steps."""
        self._started, self._first = time.monotonic(), done
        if self.active and self.console.is_terminal:
            self.progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=16),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._task = self.progress.add_task("", total=total, completed=done, numbers="")
            self.progress.start()

    def step(self, metrics: dict[str, Any], total: int) -> None:
        """Shows one step."""
        if not self.active:
            return
        numbers = "  ".join(f"{heading} {_format(metrics.get(name), form)}" for name, heading, form in COLUMNS)
        if self.progress is not None:
            self.progress.update(self._task, completed=metrics["step"], numbers=numbers)
            return
        done = metrics["step"] - self._first
        left = (time.monotonic() - self._started) / max(done, 1) * (total - metrics["step"])
        self.note(f"step {metrics['step']}/{total}  {numbers}  left {left:.0f}s")

    def stop(self) -> None:
        """Ends the progress display."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def comparison(self, title: str, before: dict[str, Any], after: dict[str, Any]) -> None:
        """A table of held-out numbers before and after."""
        if not self.active:
            return
        table = Table(title=title, title_justify="left", title_style="bold")
        for heading, justify in (("", "left"), ("before", "right"), ("after", "right"), ("change", "right")):
            table.add_column(heading, justify=justify)  # type: ignore[arg-type]
        for name in before:
            old, new = before[name], after.get(name)
            if not isinstance(old, (int, float)) or not isinstance(new, (int, float)):
                continue
            form = ".1%" if name.endswith(("accuracy", "share", "acceptance", "agreement")) else ".4g"
            change = f"{100 * (new - old):+.1f} points" if form == ".1%" else f"{new - old:+.4g}"
            table.add_row(name.removeprefix("eval_").replace("_", " "), _format(old, form), _format(new, form), change)
        self.console.print(table)


def _format(value: Any, form: str) -> str:
    return "–" if value is None else format(value, form)
