"""The token row: one JSON object per response token, written by recorders and read by every report. Units: nats.

    sequence            int    index of the response in its file
    position            int    index of the token in the response, from 0
    token_id, token     int, str; bytes that are no whole UTF-8 character appear as <0xF0>
    written_by          "student" | "teacher" (guidance prefix)
    student_logprob     log q(x)
    teacher_logprob     log p(x)
    p_trust             min(p/q, 1)
    region              "trust" | "outlier" | "guidance" | "ignored"
    credit              credit on log q(x); with top-k credit beside it in credit_top_k_mass (their sum)
    student_entropy, teacher_entropy
    teacher_rank        0: the token is the teacher's first choice
    teacher_top_k       [{token, teacher_logprob, student_logprob}], the teacher's most likely tokens, descending

Left out where they say nothing:

    strategy            which strategy gave region and credit, when several were asked for
    uniform             the U(0, 1) number the region was drawn with: trust where uniform < p_trust
    outlier_weight      the estimator's weight, where it is not 1 for an outlier and 0 for the others (soft regions)
    credit_absolute     sum of |credit| over all log-probabilities, where it is not |credit| + |credit_top_k_mass|
    prompt, group, sample   on a sequence's first token: its prompt as text, the prompt's place among those of its step or
                        file, which of its rollouts
    finish              on a sequence's last token: "eos", "length" (cut at the cap) or "given" (scored, not sampled)

A number that was not computed, or is infinite, is null.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Author = Literal["student", "teacher"]
RegionName = Literal["trust", "outlier", "guidance", "ignored"]
Finish = Literal["eos", "length", "given"]

REGIONS: tuple[RegionName, ...] = get_args(RegionName)
REQUIRED = ("sequence", "position", "token", "student_logprob", "teacher_logprob", "region")
#: Digits that survive: float32 log-probabilities come back exactly, so that regions can be drawn again from them.
EXACT, ROUNDED = 9, 6


class RowError(ValueError):
    """A JSON value that is no token row; the message names the field."""


@dataclass(slots=True)
class Choice:
    """One of the teacher's most likely tokens at a position."""

    token: str
    teacher_logprob: float | None
    student_logprob: float | None


@dataclass(slots=True)
class TokenRow:
    """One response token. The module's docstring is the schema."""

    sequence: int
    position: int
    token_id: int | None
    token: str
    student_logprob: float | None
    teacher_logprob: float | None
    region: RegionName
    written_by: Author = "student"
    p_trust: float | None = None
    credit: float | None = None
    credit_top_k_mass: float | None = None
    student_entropy: float | None = None
    teacher_entropy: float | None = None
    teacher_rank: int | None = None
    teacher_top_k: list[Choice] = field(default_factory=list)
    strategy: str | None = None
    uniform: float | None = None
    outlier_weight: float | None = None
    credit_absolute: float | None = None
    prompt: str | None = None
    group: int | None = None
    sample: int | None = None
    finish: Finish | None = None

    def __post_init__(self) -> None:
        if self.p_trust is None and self.log_ratio is not None:
            self.p_trust = math.exp(min(self.log_ratio, 0.0))
        if self.outlier_weight == float(self.region == "outlier"):
            self.outlier_weight = None  # said by the region already; what is left tells soft regions from drawn ones

    @property
    def log_ratio(self) -> float | None:
        """R = log p(x) - log q(x), or None where one of them is missing or infinite."""
        if self.student_logprob is None or self.teacher_logprob is None:
            return None
        ratio = self.teacher_logprob - self.student_logprob
        return ratio if math.isfinite(ratio) else None

    @property
    def weight_on_outlier(self) -> float:
        """1 - w: 0 or 1, between them with soft regions."""
        return float(self.region == "outlier") if self.outlier_weight is None else self.outlier_weight

    @property
    def total_credit(self) -> float:
        """Sum of |credit| over the sampled token and all others."""
        if self.credit_absolute is not None:
            return self.credit_absolute
        return abs(self.credit or 0.0) + abs(self.credit_top_k_mass or 0.0)

    def to_json(self) -> dict[str, Any]:
        """The row as JSON values in the schema's order."""
        row: dict[str, Any] = {
            "sequence": self.sequence,
            "position": self.position,
            "token_id": self.token_id,
            "token": _well_formed(self.token),
            "written_by": self.written_by,
            "student_logprob": _number(self.student_logprob, EXACT),
            "teacher_logprob": _number(self.teacher_logprob, EXACT),
            "p_trust": _number(self.p_trust, EXACT),
            "region": self.region,
            "credit": _number(self.credit),
            "credit_top_k_mass": _number(self.credit_top_k_mass),
            "student_entropy": _number(self.student_entropy),
            "teacher_entropy": _number(self.teacher_entropy),
            "teacher_rank": self.teacher_rank,
            "teacher_top_k": [
                {
                    "token": _well_formed(choice.token),
                    "teacher_logprob": _number(choice.teacher_logprob, EXACT),
                    "student_logprob": _number(choice.student_logprob, EXACT),
                }
                for choice in self.teacher_top_k
            ],
        }
        return row | {name: value for name, value in self._optional().items() if value is not None}

    def _optional(self) -> dict[str, Any]:
        implied_weight = self.outlier_weight is None or self.outlier_weight == float(self.region == "outlier")
        sampled_and_listed = abs(self.credit or 0.0) + abs(self.credit_top_k_mass or 0.0)
        implied_credit = self.credit_absolute is None or math.isclose(
            self.credit_absolute, sampled_and_listed, rel_tol=1e-5, abs_tol=1e-12
        )
        return {
            "strategy": self.strategy,
            "uniform": _number(self.uniform, 17),
            "outlier_weight": None if implied_weight else _number(self.outlier_weight),
            "credit_absolute": None if implied_credit else _number(self.credit_absolute),
            "prompt": None if self.prompt is None else _well_formed(self.prompt),
            "group": self.group,
            "sample": self.sample,
            "finish": self.finish,
        }


def dump_row(row: TokenRow) -> str:
    """One line of JSON in printable ASCII, without the line break: nothing in it can end a line or steer a terminal."""
    return dump_json(row.to_json())


def dump_json(value: Any) -> str:
    """Compact JSON in printable ASCII. DEL is the one control character that `json` leaves as it is."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("\x7f", "\\u007f")


def parse_row(value: Any) -> TokenRow:
    """A token row from a decoded JSON value. Unknown fields are ignored, so that newer files stay readable.

    Raises:
        RowError: a field is missing or of the wrong kind.
    """
    if not isinstance(value, dict):
        raise RowError(f"is a {type(value).__name__}, not an object")
    missing = [name for name in REQUIRED if name not in value]
    if missing:
        raise RowError(f"has no '{missing[0]}'")
    return TokenRow(
        sequence=_integer(value, "sequence", required=True) or 0,
        position=_integer(value, "position", required=True) or 0,
        token_id=_integer(value, "token_id"),
        token=_text(value, "token") or "",
        student_logprob=_float(value, "student_logprob"),
        teacher_logprob=_float(value, "teacher_logprob"),
        region=_one_of(value, "region", REGIONS),
        written_by=_one_of(value, "written_by", get_args(Author)) or "student",
        p_trust=_float(value, "p_trust"),
        credit=_float(value, "credit"),
        credit_top_k_mass=_float(value, "credit_top_k_mass"),
        student_entropy=_float(value, "student_entropy"),
        teacher_entropy=_float(value, "teacher_entropy"),
        teacher_rank=_integer(value, "teacher_rank"),
        teacher_top_k=_choices(value.get("teacher_top_k") or []),
        strategy=_text(value, "strategy"),
        uniform=_float(value, "uniform"),
        outlier_weight=_float(value, "outlier_weight"),
        credit_absolute=_float(value, "credit_absolute"),
        prompt=_text(value, "prompt"),
        group=_integer(value, "group"),
        sample=_integer(value, "sample"),
        finish=_one_of(value, "finish", get_args(Finish)),
    )


# ── values ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _number(value: float | None, digits: int = ROUNDED) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")


def _well_formed(text: str) -> str:
    """Lone surrogates are no characters and break strict JSON readers."""
    return text.encode("utf-8", "replace").decode() if any("\ud800" <= c <= "\udfff" for c in text) else text


def _wrong(name: str, value: Any, expected: str) -> RowError:
    return RowError(f"has {name} = {json.dumps(value)[:40]}, which is not {expected}")


def _integer(row: dict[str, Any], name: str, *, required: bool = False) -> int | None:
    value = row.get(name)
    if (value is None and not required) or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise _wrong(name, value, "an integer")


def _float(row: dict[str, Any], name: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _wrong(name, value, "a number")
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _text(row: dict[str, Any], name: str) -> str | None:
    value = row.get(name)
    if value is None or isinstance(value, str):
        return value
    raise _wrong(name, value, "a text")


def _one_of(row: dict[str, Any], name: str, allowed: tuple[Any, ...]) -> Any:
    value = row.get(name)
    if value in allowed or (value is None and name != "region"):
        return value
    raise _wrong(name, value, f"one of {', '.join(allowed)}")


def _choices(value: Any) -> list[Choice]:
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise _wrong("teacher_top_k", value, "a list of objects")
    return [
        Choice(_text(item, "token") or "", _float(item, "teacher_logprob"), _float(item, "student_logprob"))
        for item in value
    ]
