"""Runs killed, interrupted, short of disk and corrupted at random moments: after resume nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPTIONS = {
    "prompts_per_step": 3, "rollouts_per_prompt": 2, "max_prompt_length": 16, "max_response_length": 8,
    "learning_rate": 1e-2, "probe_rollouts": 2, "strategy.outlier.top_k": 5, "record.every": 3, "record.sequences": 3,
    "checkpoint_every": 2, "keep_checkpoints": 2,
}  # fmt: skip


def chaos(pair: dict[str, Path], folder: Path, *, moments: int, seed: int) -> list[dict[str, object]]:
    """The lines of tests/chaos.py."""
    sets = [x for key, value in OPTIONS.items() for x in ("--set", f"{key}={json.dumps(value)}")]
    models = ["--student", str(pair["student"]), "--teacher", str(pair["teacher"]), "--data", str(pair["data"])]
    command = [sys.executable, "-m", "tests.chaos", str(folder), str(moments), str(seed), "--", *models, *sets]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_killed_run_resumes_to_the_same_bits(tiny_pair: dict[str, Path], tmp_path: Path) -> None:
    results = chaos(tiny_pair, tmp_path, moments=3, seed=1)
    assert [result["same"] for result in results] == [True] * 3


@pytest.mark.slow
def test_thirty_random_moments(tiny_pair: dict[str, Path], tmp_path: Path) -> None:
    results = chaos(tiny_pair, tmp_path, moments=30, seed=2)
    assert sum(bool(result["same"]) for result in results) == 30
