"""The benchmarks of speed and memory run, at toy sizes, and their page is written from what they measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from .benchmarks import bucketing, gpu, growth, report
from .benchmarks.process import write_results

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_gpu_benchmark_runs_its_four_parts_anywhere() -> None:
    cases = list(gpu.measure(gpu.TINY, "cpu", None, checkpointing=True))
    assert {case["part"] for case in cases} == {"step", "rollout", "credit loss"}
    losses = {case["who"]: case for case in cases if case["part"] == "credit loss"}
    assert losses.keys() == {"ours", "bare products", "full log_softmax"}
    assert all(case["seconds"] > 0 and case["peak_bytes"] > 0 for case in losses.values())


def test_without_a_gpu_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit, match=r"no CUDA device here.*--tiny --device cpu"):
        gpu.main()


def test_results_become_tables_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, arguments in (
        (bucketing, "--rows 3 --lengths 4 20 --layers 1 --token-budget 64"),
        (growth, "--lengths 8 16 --vocabulary 500 1000 --rows 1 --hidden 64 --layers 1"),
    ):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(sys, "argv", [name, *arguments.split(), "--out", str(tmp_path / f"{name}.json")])
        module.main()
    stage = {"cpu_seconds": 2.0, "seconds": 1.0, "growth": 1 << 20}
    medians = {side: dict.fromkeys(("rollout", "score_update", "step"), stage) for side in ("ours", "peer")}
    ratios = dict.fromkeys(("rollout_cpu_seconds", "score_update_cpu_seconds", "step_cpu_seconds"), 1.0)
    shape = {"vocabulary": 9, "hidden": 8, "layers": 1, "responses": 2, "length": 3, "prompt": 2, "threads": 1}
    case = {
        **shape,
        "strategy": "opd",
        "repeats": 1,
        "medians": medians,
        "ratios": {**ratios, "score_update_growth": 0.5},
    }
    monkeypatch.setattr(sys, "argv", ["step", "--peer-python", str(tmp_path / "python"), "--out", "there"])
    write_results(tmp_path / "step.json", "step", [case])
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    report.main(results=tmp_path, page=page)
    text = page.read_text()
    assert "| **ours / peer** | **1.00** | **1.00** | **1.00** | **0.50** |" in text
    assert "python -m tests.benchmarks.step --peer-python PATH\n" in text and str(tmp_path) not in text
    assert text.index("beside a peer") < text.index("### Micro-batches") < text.index("### Growth of memory")
    pictures = sorted(path.name for path in (page.parent / "images").iterdir())
    assert pictures == ["bench-growth.png", "bench-micro-batches.png", "bench-step.png"]
    assert json.loads((tmp_path / "growth.json").read_text())["cases"][1]["ratio"] > 0
