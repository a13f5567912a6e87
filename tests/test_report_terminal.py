"""Terminal reports: golden output with and without colours, and hostile text that stays text.

After a wanted change: UPDATE_GOLDEN=1 pytest tests/test_report_terminal.py, and look at the difference.
"""

from __future__ import annotations

import io
import os
import re
import unicodedata
from pathlib import Path

import pytest
from rich.console import Console

from tropd_cli.report.inspection import Inspection
from tropd_cli.report.rows import TokenRow
from tropd_cli.report.terminal import render

from .report_rows import HOSTILE, chain_rows, hostile_rows, with_strategy

GOLDEN = Path(__file__).parent / "golden"
FACTS = {"student": "tropd/student", "teacher": "tropd/teacher", "step": "10", "strategy": "trust-region"}


def rendered(inspection: Inspection, *, width: int = 80, colours: str | None = None, **options: object) -> str:
    """What a terminal gets: colours "standard", "256", "truecolor", or None for a pipe."""
    stream = io.StringIO()
    environment = {"NO_COLOR": "1"} if colours == "no-color" else {}
    console = Console(
        file=stream, width=width, highlight=False, force_terminal=colours is not None, _environ=environment,
        color_system="256" if colours == "no-color" else colours, legacy_windows=False,
    )  # fmt: skip
    render(inspection, console, **options)
    return stream.getvalue()


def golden_inspection() -> Inspection:
    """Four chains, one guided, one cut, one token ignored."""
    rows = chain_rows(4)
    rows[20].region = "ignored"
    return Inspection(
        rows, facts=dict(FACTS), notes=["The last line of step-000010.jsonl is incomplete and was skipped."]
    )


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("colours", [None, "standard", "truecolor"])
def test_golden(width: int, colours: str | None) -> None:
    text = rendered(golden_inspection(), width=width, colours=colours).replace("\x1b", "␛")
    path = GOLDEN / f"regions-{width}-{colours or 'marks'}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_no_color_uses_marks() -> None:
    text = rendered(golden_inspection(), colours="no-color")
    assert "«Take» " in text and "{|" in text and "(|" in text
    assert not re.search(r"\x1b\[[0-9;]*(3[0-9]|4[0-9]|9[0-7])[0-9;]*m", text), "a colour in spite of NO_COLOR"


@pytest.mark.parametrize("colours", [None, "no-color", "standard", "truecolor"])
def test_hostile_text_neither_acts_nor_disappears(colours: str | None) -> None:
    inspection = Inspection(hostile_rows(), facts={"student": "\x1b[2J\u202e[red]x"}, notes=["\x1b[0m"])
    text = rendered(inspection, colours=colours)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)  # Rich's own colours
    assert not [c for c in plain if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")]
    for shown in ("<script>", "⟨ESC⟩[31mred⟨ESC⟩", "⟨U+202E⟩", "[bold", "😀", "{{DATA}}"):
        assert shown in plain.replace("\n", "").replace("«", "").replace("»", ""), shown
    assert "\x1b[31mred" not in text


def test_four_thousand_tokens_on_one_line_stay_within_the_width() -> None:
    rows = [TokenRow(0, place, 7, "7x"[place % 2], -0.1, -0.1 - place % 5, "trust") for place in range(4000)]
    text = rendered(Inspection(rows))
    assert max(map(len, text.splitlines())) <= 80
    assert "7x" * 1000 in text.replace("\n", "")


def test_line_breaks_break_after_their_sign() -> None:
    rows = [TokenRow(0, place, 1, token, -0.1, -0.1, "trust") for place, token in enumerate(["a", "\n\n", "b"])]
    rows[1].region, rows[1].teacher_logprob = "outlier", -3.0
    assert "a«⏎\n⏎»\nb" in rendered(Inspection(rows))


def test_strategies_are_shown_one_below_the_other() -> None:
    rows = chain_rows(2)
    both = Inspection(with_strategy(rows, "opd") + with_strategy(rows, "floor", floor=-2.0))
    text = rendered(both)
    different = sum(row.written_by == "student" and row.log_ratio < -2.0 for row in rows)
    assert "summary: opd" in text and "summary: floor" in text
    assert f"The strategies disagree on the region of {different} of {len(rows)} tokens." in text


def test_texts_can_be_limited_and_nothing_is_fine() -> None:
    text = rendered(Inspection(chain_rows(3)), most_sequences=1)
    assert "sequence 0" in text and "sequence 1" not in text and "2 more sequences" in text
    assert "0 sequences, 0 tokens" in rendered(Inspection([]))


def test_every_hostile_text_is_listed_once() -> None:
    assert len(set(HOSTILE)) == len(HOSTILE)
