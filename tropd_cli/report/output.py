"""Where an inspection goes: a terminal, a pipe or a file, in the asked format. Imports no torch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.text import Text

from tropd_cli.errors import UserError
from tropd_cli.processes import is_first

from .inspection import Inspection
from .rows import TokenRow

#: --format's values by the ending of --output that implies them.
FORMATS = {".txt": "terminal", ".jsonl": "jsonl", ".csv": "csv", ".html": "html", ".png": "png"}
#: Texts that a terminal shows; the summary counts all.
SHOWN = 8
#: Columns of terminal text that is written to a file.
FILE_WIDTH = 100


def output_format(asked: str | None, output: str | None, *, summary: bool) -> str:
    """The format: --summary, --format, else the ending of --output, else the terminal's. Raises UserError."""
    ending = FORMATS.get(Path(output).suffix) if output else None
    form = asked or ending or "terminal"
    if form not in FORMATS.values():
        raise UserError(f"--format '{form}' is unknown. It is one of: {', '.join(FORMATS.values())}")
    if summary:
        if asked in ("html", "png", "csv"):
            raise UserError(f"--summary prints JSON, so --format {asked} does not apply. Leave one of them out")
        return "summary"
    if form == "png" and not output:
        raise UserError("--format png makes a picture: name its file with -o regions.png")
    return form


def write_rows(rows: Iterable[TokenRow], form: str, output: str | None) -> None:
    """JSONL or CSV, each row as soon as it is made."""
    from .writers import write_csv, write_jsonl

    with destination(output) as stream:
        (write_csv if form == "csv" else write_jsonl)(_flushed(rows, stream), stream)


def _flushed(rows: Iterable[TokenRow], stream: IO[str]) -> Iterator[TokenRow]:
    """Hands a finished sequence to whoever reads the pipe before the next one is made."""
    last: int | None = None
    for row in rows:
        if last is not None and row.sequence != last:
            stream.flush()
        last = row.sequence
        yield row


def write_report(inspection: Inspection, form: str, output: str | None) -> None:
    """Summary, terminal text, HTML or PNG."""
    if form == "png":
        from .figure import write_png

        write_png(inspection, Path(str(output)))
        return
    with destination(output) as stream:
        if form == "summary":
            from .writers import summary_json

            for note in inspection.notes:
                tell(f"note: {note}")
            stream.write(summary_json(inspection) + "\n")
        elif form == "html":
            from .html import render_html

            stream.write(render_html(inspection))
        else:
            from .terminal import render

            console = PipeConsole(file=stream, highlight=False, width=None if output is None else FILE_WIDTH)
            render(inspection, console, most_sequences=SHOWN)


class PipeConsole(Console):
    """A console that leaves a reader who went away to the command's own boundary, as every other output does."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


@contextlib.contextmanager
def destination(output: str | None) -> Iterator[IO[str]]:
    """The output file, or standard output flushed at the end. Raises UserError when the file cannot be written."""
    if output is None:
        reconfigure: Callable[..., None] | None = getattr(sys.stdout, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")  # a terminal without Unicode gets a ? for what it cannot show
        yield sys.stdout
        sys.stdout.flush()
        return
    try:
        with open(output, "w", encoding="utf-8", newline="") as stream:
            yield stream
    except OSError as error:
        raise UserError(f"'{output}' cannot be written: {error.strerror}") from error
    tell(f"written: {output}")


def tell(text: str) -> None:
    """A line for the person, on stderr; of several processes the first one speaks."""
    if is_first():
        Console(stderr=True, highlight=False).print(Text(text), soft_wrap=True)
