"""Reports that are data: JSONL, CSV and the summary as JSON. ASCII, so that nothing in a token steers a terminal."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from typing import Any, TextIO

from .inspection import Inspection
from .rows import TokenRow, dump_json, dump_row
from .summary import summarise

#: Columns of CSV whose cells are JSON: texts and lists. A quoted text is never a formula to a spreadsheet.
JSON_COLUMNS = ("token", "teacher_top_k", "prompt", "strategy")
COLUMNS = (
    "sequence", "position", "token_id", "token", "written_by", "student_logprob", "teacher_logprob", "p_trust", "region",
    "credit", "credit_top_k_mass", "student_entropy", "teacher_entropy", "teacher_rank", "teacher_top_k", "strategy",
    "uniform", "outlier_weight", "credit_absolute", "prompt", "group", "sample", "finish",
)  # fmt: skip


def write_jsonl(rows: Iterable[TokenRow], stream: TextIO) -> None:
    """One object per token and line, as `rows` defines it."""
    for row in rows:
        stream.write(dump_row(row) + "\n")


def write_csv(rows: Iterable[TokenRow], stream: TextIO) -> None:
    """One line per token under a header. Texts and lists are JSON inside their cell, missing values are empty."""
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        values = row.to_json()
        writer.writerow([_cell(name, values.get(name)) for name in COLUMNS])


def _cell(name: str, value: Any) -> Any:
    return dump_json(value) if name in JSON_COLUMNS and value is not None else value


def summary_json(inspection: Inspection) -> str:
    """The summary as indented JSON: one object, or {strategy: object} when several were asked for."""
    summaries = {name: summarise(sequences) for name, sequences in inspection.by_strategy.items()}
    value = next(iter(summaries.values())) if len(summaries) == 1 else summaries
    return json.dumps(value, indent=2, allow_nan=False).replace("\x7f", "\\u007f")
