"""The PNG figure: it is drawn with and without curves, and says what to install when matplotlib is absent."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest

from tropd_cli.errors import UserError
from tropd_cli.report.figure import write_png
from tropd_cli.report.inspection import Inspection

from .report_rows import chain_rows, hostile_rows

METRICS = [
    {"step": step, "entropy": 1 / (1 + step), "grad_norm": float("nan") if step == 3 else 0.5, "outlier_share": None}
    for step in range(6)
]


def size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def test_a_run_gets_a_second_row_of_curves(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_png(Inspection(chain_rows(4)), tmp_path / "plain.png", dpi=40)
    write_png(Inspection(chain_rows(4), metrics=METRICS), tmp_path / "run.png", dpi=40)
    assert size(tmp_path / "plain.png") == (360, 120)
    assert size(tmp_path / "run.png") == (360, 216)


def test_hostile_and_absent_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_png(Inspection(hostile_rows(), facts={"student": "$\\frac{"}), tmp_path / "hostile.png", dpi=30)
    write_png(Inspection([]), tmp_path / "empty.png", dpi=30)
    with pytest.raises(UserError, match="cannot be written"):
        write_png(Inspection([]), tmp_path / "nowhere" / "x.png", dpi=30)


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"pip install 'tropd\[plot\]'"):
        write_png(Inspection([]), tmp_path / "x.png")
