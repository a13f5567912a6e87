"""`tropd inspect-regions` on recordings: as they are, under other strategies, in every format, without torch."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tropd_cli.report.rows import dump_row

from .report_rows import chain_rows
from .test_inspect_regions import inspect, recorded_run, rows_of  # noqa: F401


@pytest.fixture(scope="module")
def made_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of invented rows, large enough to fill a pipe."""
    path = tmp_path_factory.mktemp("made")
    (path / "rollouts").mkdir()
    for step in (10, 20):
        rows = "".join(dump_row(row) + "\n" for row in chain_rows(60, seed=step))
        (path / "rollouts" / f"step-{step:06d}.jsonl").write_text(rows)
    (path / "config.yaml").write_text("strategy: {name: trust-region, region_rule: acceptance}\nsteps: 40\n")
    return path


def test_a_recording_asked_under_its_own_strategy_says_the_same(run: Path) -> None:
    recorded = rows_of((run / "rollouts" / "step-000002.jsonl").read_text())
    plain = inspect(run, "--format", "jsonl")
    assert rows_of(plain.stdout) == recorded
    again = inspect(run, "--strategy", "trust-region", "--format", "jsonl")
    assert again.stderr == "" and rows_of(again.stdout) == recorded
    cut = inspect(run, "--strategy", "trust-region", "--set", "strategy.outlier.top_k=64", "--format", "jsonl")
    assert "reads the teacher's top 64; the recording holds 5" in cut.stderr


def test_a_recording_under_other_strategies(run: Path, tmp_path: Path) -> None:
    page = tmp_path / "compare.html"
    result = inspect(run, "--step", "1", "--strategy", "trust-region", "--strategy", "entropy", "-o", page)
    assert "written:" in result.stderr and page.read_text().startswith("<!doctype html>")
    assert "looks across a batch" in page.read_text()
    rows = rows_of(inspect(run, "--outlier", "mask", "--format", "jsonl").stdout)
    assert all(row["credit"] == 0 == row["credit_top_k_mass"] for row in rows if row["region"] == "outlier")
    both = json.loads(inspect(run, "--strategy", "opd", "--strategy", "reopold", "--summary").stdout)
    assert list(both) == ["opd", "reopold"] and both["opd"]["outlier_share"] == 0
    assert "whole distributions" in inspect(run, "--strategy", "gkd", code=1).stderr
    assert "a reference model" in inspect(run, "--strategy", "exopd", code=1).stderr
    assert "Did you mean 'trust-region'" in inspect(run, "--strategy", "trust-regoin", code=1).stderr


@pytest.mark.parametrize("form", ["terminal", "jsonl", "csv", "html", "png"])
def test_every_format_of_a_recording(made_run: Path, tmp_path: Path, form: str) -> None:
    name = tmp_path / f"out.{'txt' if form == 'terminal' else form}"
    inspect(made_run, "-o", name)
    content = name.read_bytes()
    if form == "png":
        assert content.startswith(b"\x89PNG")
        assert "-o regions.png" in inspect(made_run, "--format", "png", code=1).stderr
        return
    shown = inspect(made_run, "--format", form).stdout
    if form == "terminal":
        assert "60 sequences" in shown and "52 more sequences" in shown and "most frequent outliers" in shown
    elif form == "csv":
        assert len(list(csv.DictReader(io.StringIO(shown)))) == len(content.splitlines()) - 1
    else:
        assert shown == content.decode()
    if form == "jsonl":  # what it wrote is what it reads
        assert (
            inspect(name, "--format", "jsonl").stdout == shown == inspect("-", "--format", "jsonl", text=shown).stdout
        )


def test_what_a_recording_cannot_do_is_said(made_run: Path, tmp_path: Path) -> None:
    assert "no recording of step 15. Recorded: 10, 20" in inspect(made_run, "--step", "15", code=1).stderr
    assert "is no run directory" in inspect(tmp_path / "none", code=1).stderr
    (tmp_path / "rollouts").mkdir()
    assert "has recorded no sequences" in inspect(tmp_path, code=1).stderr
    assert f"--student {made_run / 'student'} --teacher T" in inspect(made_run, "--seed", "1", code=1).stderr
    assert "is one of: terminal, jsonl" in inspect(made_run, "--format", "xml", code=1).stderr
    assert "--summary prints JSON" in inspect(made_run, "--summary", "--format", "csv", code=1).stderr
    assert "--step chooses" in inspect("--step", "3", code=1).stderr
    missing = tmp_path / "no" / "where.html"
    assert "cannot be written: No such file" in inspect(made_run, "-o", missing, code=1).stderr


def test_a_recording_is_shown_without_torch_in_under_two_seconds(made_run: Path) -> None:
    script = (
        "import sys, time\nfrom tropd_cli.main import app\n"
        f"app(['inspect-regions', {str(made_run)!r}, '--summary'], standalone_mode=False)\n"
        "heavy = [m for m in ('torch', 'transformers', 'strategies') if m in sys.modules]\n"
        "print(heavy, time.process_time(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    heavy, seconds = done.stderr.strip().rsplit(" ", 1)
    assert heavy == "[]" and float(seconds) < 2.0
    assert json.loads(done.stdout)["sequences"] == 60


@pytest.mark.parametrize("form", ["jsonl", "terminal", "html"])
def test_a_reader_who_leaves_is_no_error(made_run: Path, form: str) -> None:
    command = [sys.executable, "-m", "tropd_cli.main", "inspect-regions", str(made_run), "--format", form]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(10)
        process.stdout.close()
        complaint = process.stderr.read()
        assert process.wait() == 0 and "Broken" not in complaint and "Traceback" not in complaint
