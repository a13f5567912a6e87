"""The token row, model text made harmless, and what a run directory recorded."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tropd_cli.errors import UserError
from tropd_cli.report.inspection import Inspection
from tropd_cli.report.rows import Choice, RowError, TokenRow, dump_row, parse_row
from tropd_cli.report.source import read_metrics, read_rows, read_run, recorded_steps
from tropd_cli.report.text import PART, token_text, visible, visible_tokens
from tropd_cli.report.writers import COLUMNS, JSON_COLUMNS, write_csv, write_jsonl

from .report_rows import HOSTILE, chain_rows, hostile_rows, with_strategy

ACTING = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")
any_text = st.text(st.characters(codec=None), max_size=30)


def test_reports_import_without_torch_and_matplotlib() -> None:
    modules = "rows text source inspection summary terminal html figure writers".split()
    script = (
        "import sys;" + "".join(f"import tropd_cli.report.{name};" for name in modules) + "print([m for m in"
        " ('torch', 'transformers', 'strategies', 'matplotlib', 'numpy', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ── rows ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_row_has_the_documented_fields_in_order() -> None:
    row = TokenRow(0, 3, 17, "x", -0.5, -1.5, "outlier", teacher_top_k=[Choice("y", -0.1, -2.0)])
    assert json.loads(dump_row(row)) == {
        "sequence": 0,
        "position": 3,
        "token_id": 17,
        "token": "x",
        "written_by": "student",
        "student_logprob": -0.5,
        "teacher_logprob": -1.5,
        "p_trust": 0.367879441,  # exp(-1)
        "region": "outlier",
        "credit": None,
        "credit_top_k_mass": None,
        "student_entropy": None,
        "teacher_entropy": None,
        "teacher_rank": None,
        "teacher_top_k": [{"token": "y", "teacher_logprob": -0.1, "student_logprob": -2.0}],
    }
    assert list(row.to_json()) == list(COLUMNS[:15])


def test_rows_survive_a_round_trip() -> None:
    rows = chain_rows(5)
    rows[3].outlier_weight, rows[4].credit_absolute, rows[5].strategy = 0.25, 3.5, "opd"
    again = [parse_row(json.loads(dump_row(row))) for row in rows]
    assert [dump_row(row) for row in again] == [dump_row(row) for row in rows]
    assert [row.uniform for row in again] == [row.uniform for row in rows]
    assert again[3].weight_on_outlier == 0.25 and again[4].total_credit == 3.5


def test_implied_values_are_left_out() -> None:
    row = TokenRow(0, 0, 1, "x", -1.0, -2.0, "outlier", credit=-0.5, credit_top_k_mass=0.25)
    row.outlier_weight, row.credit_absolute = 1.0, 0.75
    assert not {"outlier_weight", "credit_absolute", "strategy", "prompt", "finish"} & set(row.to_json())


def test_float32_log_probabilities_come_back_exactly() -> None:
    value = -0.10000000149011612  # float32(-0.1)
    row = parse_row(json.loads(dump_row(TokenRow(0, 0, 1, "x", value, value, "trust"))))
    assert row.student_logprob is not None and math.isclose(row.student_logprob, value, rel_tol=2**-26)


def test_infinite_and_missing_numbers_are_null() -> None:
    row = TokenRow(0, 0, None, "x", -1.0, -math.inf, "outlier", p_trust=0.0, credit=math.nan)
    values = json.loads(dump_row(row))
    assert values["teacher_logprob"] is None and values["credit"] is None and values["p_trust"] == 0.0
    assert row.log_ratio is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"region": "nowhere"}, "region = \"nowhere\", which is not one of trust, outlier, guidance, ignored"),
        ({"position": "3"}, "position = \"3\", which is not an integer"),
        ({"credit": [1]}, "credit = [1], which is not a number"),
        ({"teacher_top_k": ["a"]}, "teacher_top_k"),
        ({"token": 5}, "token = 5, which is not a text"),
        ({"position": True}, "position = true"),
    ],
)  # fmt: skip
def test_odd_values_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(RowError) as error:
        parse_row(chain_rows(1)[0].to_json() | change)
    assert message in str(error.value)


def test_missing_field_and_wrong_kind_are_named() -> None:
    with pytest.raises(RowError, match="has no 'region'"):
        parse_row(dict.fromkeys(("sequence", "position", "token", "student_logprob", "teacher_logprob"), 0))
    with pytest.raises(RowError, match="is a list, not an object"):
        parse_row([])


@settings(max_examples=200, deadline=None)
@given(any_text)
def test_any_text_is_one_ascii_line_of_json(text: str) -> None:
    line = dump_row(TokenRow(0, 0, 1, text, -1.0, -1.0, "trust", prompt=text, teacher_top_k=[Choice(text, -1.0, -1.0)]))
    assert all(" " <= character <= "~" for character in line)
    assert parse_row(json.loads(line)).token == text.encode("utf-8", "replace").decode()


# ── text ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("then ", "then "),
        (" ", "·"),
        ("a  b", "a··b"),
        ("\n\t", "⏎⇥"),
        ("\x1b[31m", "⟨ESC⟩[31m"),
        ("\x7f\x00", "⟨DEL⟩⟨NUL⟩"),
        ("\x9b", "⟨U+009B⟩"),
        ("\u202eabc", "⟨U+202E⟩abc"),
        ("\u2028", "⟨U+2028⟩"),
        ("\xa0", "⟨U+00A0⟩"),
        ("\u0301", "◌\u0301"),
        ("e" + "\u0301" * 5, "e" + "\u0301" * 3 + "⟨U+0301⟩⟨U+0301⟩"),
        ("שלום 你好 é", "שלום 你好 é"),
    ],
)
def test_acting_characters_become_signs(text: str, shown: str) -> None:
    assert visible(text) == shown


@settings(max_examples=300, deadline=None)
@given(any_text)
def test_nothing_visible_acts(text: str) -> None:
    assert not [c for c in visible(text) + "".join(visible_tokens([text])) if unicodedata.category(c) in ACTING]


def test_characters_split_across_tokens_are_put_together() -> None:
    raw = " 😀!".encode()
    tokens = [token_text(raw[:3]), token_text(raw[3:4]), token_text(raw[4:])]
    assert tokens == [" <0xF0><0x9F>", "<0x98>", "<0x80>!"]
    assert visible_tokens(tokens) == [" 😀", PART, "!"]
    assert visible_tokens(["<0x98>", "ab", "<0xF0>", "c"]) == ["⟨98⟩", "ab", "⟨F0⟩", "c"]
    assert visible_tokens(["", "x"]) == [PART, "x"]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=8), st.lists(st.integers(0, 30), max_size=4))
def test_bytes_cut_anywhere_show_the_whole_text(text: str, cuts: list[int]) -> None:
    raw = text.encode("utf-8", "replace")
    edges = [0, *sorted(min(cut, len(raw)) for cut in cuts), len(raw)]
    tokens = [token_text(raw[a:b]) for a, b in itertools.pairwise(edges)]
    joined = "".join(shown for shown in visible_tokens(tokens) if shown != PART)
    for sign in ("·", " ", "◌"):  # spaces look different alone, and a mark that starts a token stands on a circle
        joined, text = joined.replace(sign, ""), text.replace(sign, "")
    assert "⟨U+0301⟩" in joined or joined == visible(raw.decode()).replace("·", "").replace(" ", "").replace("◌", "")


# ── data formats ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_hostile_jsonl_is_one_line_per_token() -> None:
    stream = io.StringIO()
    write_jsonl(hostile_rows(), stream)
    lines = stream.getvalue().splitlines()
    assert [json.loads(line)["token"] for line in lines] == [t.encode("utf-8", "replace").decode() for t in HOSTILE]


def test_csv_texts_are_json_and_no_formulas() -> None:
    stream = io.StringIO()
    write_csv(hostile_rows(), stream)
    assert all(c == "\n" or " " <= c <= "~" for c in stream.getvalue())
    header, *lines = csv.reader(io.StringIO(stream.getvalue()))
    assert tuple(header) == COLUMNS and len(lines) == len(HOSTILE)
    for line, text in zip(lines, HOSTILE, strict=True):
        cells = dict(zip(header, line, strict=True))
        assert json.loads(cells["token"]) == text.encode("utf-8", "replace").decode()
        assert all(not cells[name] or cells[name][0] in '"[' for name in JSON_COLUMNS)


# ── run directories ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two recordings, three metrics and a configuration."""
    (tmp_path / "rollouts").mkdir()
    for step in (10, 20):
        with (tmp_path / "rollouts" / f"step-{step:06d}.jsonl").open("w") as stream:
            write_jsonl(chain_rows(2, seed=step), stream)
    (tmp_path / "metrics.jsonl").write_text('{"step":0}\n{"step":1,"entropy":NaN}\n{"step":2,"entropy":0.5}\n')
    (tmp_path / "config.yaml").write_text(
        "student: S\nteacher: T\nstrategy: {name: trust-region, region_rule: threshold, threshold: -1.5,"
        " outlier: {name: mask}}\n"
    )
    return tmp_path


def test_the_last_recording_is_read_unless_another_is_asked_for(run: Path) -> None:
    assert recorded_steps(run) == [10, 20]
    inspection = read_run(run)
    assert inspection.facts["step"] == "20" and read_run(run, 10).facts["step"] == "10"
    assert inspection.facts["strategy"] == "trust-region, region_rule threshold, threshold -1.5, outlier mask"
    assert (inspection.rule.kind, inspection.rule.threshold) == ("threshold", -1.5)
    assert [dump_row(row) for row in inspection.rows] == [dump_row(row) for row in chain_rows(2, seed=20)]
    assert [entry["step"] for entry in inspection.metrics] == [0, 1, 2]


def test_a_torn_last_line_is_skipped_and_said(run: Path) -> None:
    path = run / "rollouts" / "step-000020.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-40])
    inspection = read_run(run)
    assert len(inspection.rows) == len(whole.splitlines()) - 1
    assert inspection.notes == ["The last line of step-000020.jsonl is incomplete and was skipped."]
    (run / "metrics.jsonl").write_text('{"step":1}\n{"st')
    assert read_metrics(run) == [{"step": 1}]


def test_a_broken_line_elsewhere_is_an_error(run: Path) -> None:
    path = run / "rollouts" / "step-000020.jsonl"
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(UserError, match=r"step-000020\.jsonl, line 1 has no 'sequence'"):
        read_run(run)
    with pytest.raises(UserError, match="-, line 2 is no JSON"):
        list(read_rows([dump_row(chain_rows(1)[0]) + "\n", "{oops"], "-"))
    with pytest.raises(UserError, match="is no JSON"):
        list(read_rows(["[" * 100_000 + "\n"], "-"))


def test_what_is_missing_is_said_with_the_next_step(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no recording of step 15\. Recorded: 10, 20"):
        read_run(run, 15)
    with pytest.raises(UserError, match="is no run directory"):
        read_run(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has recorded no sequences"):
        read_run(tmp_path / "empty")


def test_strategies_must_speak_of_the_same_tokens() -> None:
    rows = chain_rows(2)
    both = Inspection(with_strategy(rows, "opd") + with_strategy(rows, "floor", floor=-2.0))
    assert both.strategies == ["opd", "floor"]
    with pytest.raises(UserError, match="strategy 'floor' speaks of other tokens than 'opd'"):
        _ = Inspection(with_strategy(rows, "opd") + with_strategy(rows[1:], "floor", floor=-2.0)).strategies
    with pytest.raises(UserError, match="occurs twice"):
        _ = Inspection(rows + rows[:1]).strategies
