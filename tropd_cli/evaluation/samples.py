"""Graded samples on disk: JSON Lines that grow batch by batch, and the settings they belong to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tropd_cli.errors import UserError

Row = dict[str, Any]
Key = tuple[str, int]


class SampleFile:
    """The samples of one model on one benchmark: `X.jsonl`, and beside it `X.settings.json` with what made them.

    Args:
        path: None keeps the samples in memory only.
        settings: everything the samples depend on. A file that was made with others is not continued.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = json.loads(json.dumps(settings))
        self.rows: dict[Key, Row] = {}

    @property
    def settings_path(self) -> Path | None:
        return self.path and self.path.with_suffix(".settings.json")

    def open(self, *, overwrite: bool) -> None:
        """Reads what is there, cuts off a torn last line, and writes the settings of a new file.

        Raises:
            UserError: a file of other settings or of another origin, a damaged line, or no place to write to.
        """
        if self.path is None:
            return
        assert self.settings_path is not None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if overwrite:
                self.path.unlink(missing_ok=True)
            elif self.path.exists():
                self._check_settings()
                self._read()
                return
            self.settings_path.write_text(json.dumps(self.settings, indent=2) + "\n", encoding="utf-8")
            self.path.touch()
        except OSError as error:
            raise UserError(f"'{error.filename or self.path}' cannot be written: {error.strerror}") from error

    def _check_settings(self) -> None:
        assert self.path is not None and self.settings_path is not None
        way_out = "Choose another --output, or replace it with --overwrite"
        try:
            stored = json.loads(self.settings_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(
                f"'{self.path}' exists already, and no readable {self.settings_path.name} says how it was made. {way_out}"
            ) from None
        for name in sorted(stored.keys() | self.settings.keys()):
            if stored.get(name) != self.settings.get(name):
                raise UserError(
                    f"'{self.path}' holds samples made otherwise: {name} was {stored.get(name)!r} and is "
                    f"{self.settings.get(name)!r} now. {way_out}"
                )

    def _read(self) -> None:
        assert self.path is not None
        sound = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    row = json.loads(line)
                    self.rows[str(row["id"]), int(row["sample"])] = row
                except (ValueError, KeyError, TypeError):
                    raise UserError(
                        f"{self.path}, line {number} is no graded sample. Delete the line, or start again with --overwrite"
                    ) from None
                sound += len(line)
        os.truncate(self.path, sound)

    def append(self, rows: Sequence[Row]) -> None:
        """Adds the rows that are not there yet, and brings them to the disk. Raises UserError when it is full."""
        new = [row for row in rows if (row["id"], row["sample"]) not in self.rows]
        self.rows.update({(row["id"], row["sample"]): row for row in new})
        if self.path is None or not new:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                for row in new:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written: {error.strerror}. What is there is kept: make room and repeat the command"
            ) from error
