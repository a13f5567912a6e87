"""The data of the HTML page: columns of small integers, made so that the page's own arithmetic decides as the rows do.

All texts are made visible here, so the page never holds a control character.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from .inspection import Inspection, Sequence
from .palette import COLOURS, STRONGER
from .rows import TokenRow
from .summary import summarise
from .text import visible

REGION_LETTER = {"trust": "t", "outlier": "o", "guidance": "g", "ignored": "i"}
AUTHOR_LETTER = {"student": "s", "teacher": "t"}
#: Units of the integer columns: values are multiples of one over these.
RATIO, MILLI, UNIFORM, PROBABILITY = 10_000, 1_000, 100_000, 100_000
NEVER = -(10**9)  #: R of a token that the teacher gives probability 0
LONGEST_TEXT = 400  #: characters of one token that the page shows; nothing but an attack is longer


def page_data(inspection: Inspection) -> dict[str, Any]:
    """Everything the page shows, as JSON values. See report/data.js for the reader."""
    sequences = inspection.sequences
    rows = [row for sequence in sequences for row in sequence.rows]
    texts = _Texts()
    return {
        "units": {"ratio": RATIO, "milli": MILLI, "uniform": UNIFORM, "probability": PROBABILITY, "never": NEVER},
        "facts": [[name, visible(value)] for name, value in inspection.facts.items()],
        "notes": [visible(note) for note in inspection.notes],
        "rule": asdict(inspection.rule),
        "stronger": STRONGER,
        "colours": COLOURS,
        "sequences": [_sequence(sequence) for sequence in sequences],
        "columns": _columns(rows, [shown for sequence in sequences for shown in sequence.shown], texts),
        "views": [_view(name, part) for name, part in inspection.by_strategy.items()],
        "summaries": [_summary_numbers(summarise(part)) for part in inspection.by_strategy.values()],
        "texts": texts.shown,
        "spelled": texts.spelled,
    }


class _Texts:
    """Token texts, each stored once; `spelled` says what hides behind the ones that are not shown as they are."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.spelled: dict[int, str] = {}
        self._index: dict[tuple[str, str], int] = {}

    def add(self, token: str, shown: str) -> int:
        key = (token, shown)
        if key not in self._index:
            self._index[key] = len(self.shown)
            if token != shown:
                self.spelled[len(self.shown)] = json.dumps(token)[:LONGEST_TEXT]
            self.shown.append(shown if len(shown) <= LONGEST_TEXT else shown[: LONGEST_TEXT - 1] + "…")
        return self._index[key]


def _columns(rows: list[TokenRow], shown: list[str], texts: _Texts) -> dict[str, Any]:
    return {
        "text": [texts.add(row.token, text) for row, text in zip(rows, shown, strict=True)],
        "id": [row.token_id for row in rows],
        "author": "".join(AUTHOR_LETTER[row.written_by] for row in rows),
        "student": [_scaled(row.student_logprob, MILLI) for row in rows],
        "teacher": [_scaled(row.teacher_logprob, MILLI) for row in rows],
        "ratio": [_ratio(row) for row in rows],
        "uniform": [_uniform(row) for row in rows],
        "student_entropy": [_scaled(row.student_entropy, MILLI) for row in rows],
        "teacher_entropy": [_scaled(row.teacher_entropy, MILLI) for row in rows],
        "rank": [row.teacher_rank for row in rows],
        "top": [_top(row, texts) for row in rows],
    }


def _view(name: str, sequences: list[Sequence]) -> dict[str, Any]:
    rows = [row for sequence in sequences for row in sequence.rows]
    soft = any(row.outlier_weight is not None for row in rows)
    return {
        "name": visible(name),
        "region": "".join(REGION_LETTER[row.region] for row in rows),
        "credit": [_scaled(row.credit, MILLI) for row in rows],
        "mass": [_scaled(row.credit_top_k_mass, MILLI) for row in rows],
        "weight": [round(row.weight_on_outlier * MILLI) for row in rows] if soft else None,
    }


def _sequence(sequence: Sequence) -> dict[str, Any]:
    prompt = None if sequence.prompt is None else visible(sequence.prompt)
    return {"index": sequence.index, "length": len(sequence.rows), "finish": sequence.finish, "prompt": prompt}


def _summary_numbers(summary: dict[str, Any]) -> dict[str, Any]:
    """What the page does not count itself."""
    names = (
        "acceptance", "log_ratio", "reverse_kl", "forward_kl", "forward_kl_method", "student_entropy",
        "teacher_entropy", "outlier_credit_share", "wanted_logprob", "repetition", "response_length", "finish", "advice",
    )  # fmt: skip
    return {name: summary[name] for name in names}


def _scaled(value: float | None, unit: int) -> int | None:
    return None if value is None else round(value * unit)


def _ratio(row: TokenRow) -> int | None:
    """R rounded down: a threshold that is a multiple of the unit then splits the tokens as the exact R does."""
    if row.log_ratio is not None:
        return math.floor(row.log_ratio * RATIO + 1e-9)
    return NEVER if row.p_trust == 0.0 else None


def _uniform(row: TokenRow) -> int | None:
    """u rounded to the side of P_trust on which the exact u lies, so that the page draws the same region."""
    if row.uniform is None or row.p_trust is None:
        return None
    ratio = _ratio(row)
    p_trust = 0.0 if ratio is None else math.exp(min(ratio / RATIO, 0.0))
    number = round(row.uniform * UNIFORM)
    edge = p_trust * UNIFORM
    if row.uniform < row.p_trust:
        return min(number, math.ceil(edge) - 1)
    return max(number, math.floor(edge) + 1) if p_trust < 1.0 else number


def _top(row: TokenRow, texts: _Texts) -> list[int]:
    """text, teacher's and student's probability of each choice, one after another."""
    flat: list[int] = []
    for choice in row.teacher_top_k:
        flat += [texts.add(choice.token, visible(choice.token)), _probability(choice.teacher_logprob)]
        flat.append(_probability(choice.student_logprob))
    return flat


def _probability(logprob: float | None) -> int:
    return 0 if logprob is None else round(math.exp(min(logprob, 0.0)) * PROBABILITY)
