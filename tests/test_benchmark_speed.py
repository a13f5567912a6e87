"""The benchmarks of speed and memory run, at toy sizes, and their page is written from what they measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from .benchmarks import bucketing, credit_loss, gpu, growth, report, rollout
from .benchmarks.process import write_results

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_limit_is_the_fastest_chunk_of_the_bare_products(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = credit_loss.random_heads(6, 20, 4)
    monkeypatch.setattr(credit_loss, "BARE_CHUNKS", (1, 4, 9))
    times = iter([3.0, 1.0, 2.0])
    chunk, action = credit_loss.fastest_bare(heads, lambda action: (action(), next(times))[1])
    assert chunk == 4
    action()


def test_without_a_gpu_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit, match=r"no CUDA device here.*--tiny --device cpu"):
        gpu.main()


def test_results_become_tables_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, arguments in (
        (bucketing, "--rows 3 --lengths 4 20 --layers 1 --token-budget 64"),
        (growth, "--lengths 8 16 --vocabulary 500 1000 --rows 1 --hidden 64 --layers 1"),
        (credit_loss, "--tokens 8 16 --vocabulary 300 --hidden 16 --repeats 1"),
        (
            rollout,
            "--vocabulary 300 --hidden 64 --layers 1 --prompts 2 --samples 2 --prompt 4 --long-prompt 8 --length 6",
        ),
        (gpu, "--tiny --device cpu"),
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
    titles = [line for line in text.splitlines() if line.startswith("### ")]
    assert [title.split()[-1] for title in titles] == [
        "peer",
        "products",
        "`generate`",
        "Micro-batches",
        "memory",
        "GPU",
    ]
    pictures = {path.stem.removeprefix("bench-") for path in (page.parent / "images").iterdir()}
    assert pictures == {"credit-loss", "growth", "micro-batches", "rollout", "step"}
    losses = json.loads((tmp_path / "credit_loss.json").read_text())["cases"]
    assert [case["fraction_of_limit"] for case in losses] == [c["bare_cpu_seconds"] / c["cpu_seconds"] for c in losses]
    assert all(f"| {case['fraction_of_limit']:.2f} |" in text for case in losses)
    assert json.loads((tmp_path / "growth.json").read_text())["cases"][1]["ratio"] > 0
    cases = json.loads((tmp_path / "gpu.json").read_text())["cases"]
    assert {case["part"] for case in cases} == {"step", "rollout", "credit loss"}
    found = {case["who"]: case for case in cases if case["part"] == "credit loss"}
    assert found.keys() == {"ours", "bare products", "full log_softmax"}
    assert all(case["seconds"] > 0 and case["peak_bytes"] > 0 for case in found.values())
