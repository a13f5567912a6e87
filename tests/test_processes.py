"""The same result however the work is split, and a job of several processes that lives and dies as one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from strategies import STRATEGIES

from .forked import start
from .split_update import SOME, SPLITS
from .test_distill import lasting, metrics

ROOT = Path(__file__).parent.parent
DEMO = (
    "--steps 10 --prompts-per-step 3 --rollouts-per-prompt 2 --max-response-length 16 --set eval_prompts=4 "
    "--set probe_rollouts=4 --set record.every=5 --set record.sequences=4 --set checkpoint_every=0"
).split()
#: Numbers that describe the machine's work, not the training.
MACHINE = {"seconds_rollout", "seconds_teacher", "seconds_update", "tokens_per_second", "peak_memory_bytes"}


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that tests/split_update.py fills, in one spawn."""
    folder = tmp_path_factory.mktemp("splits")
    command = [sys.executable, "-m", "tests.split_update", str(folder), *DEMO]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "said").open("w") as said:
        script = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        with suppress(subprocess.TimeoutExpired):
            script.wait(900)
        if script.returncode is None:
            os.killpg(script.pid, signal.SIGKILL)  # the processes it has forked, too
    if script.returncode != 0:
        pytest.fail(what_failed(folder, script.returncode))
    return folder


def what_failed(folder: Path, code: int | None) -> str:
    """What the script and the workers of its last job said, the reason in the first line: pytest's summary shows no other."""
    said = (folder / "said").read_text(errors="replace")
    log = max(folder.glob("*.log"), key=lambda path: path.stat().st_mtime, default=None)
    reason = next((line for line in said.splitlines() if " ended with " in line), f"the script's exit code is {code}")
    if code is None:
        reason = f"the script was still running after 900 s, its last log is {log}"
    worker = log.read_text(errors="replace") if log is not None and " ended with " not in said else ""
    return f"{reason}\n{said}\n{worker}\nEverything is in {folder}"


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", STRATEGIES.names())
def test_an_update_does_not_depend_on_how_it_is_split(splits: Path, name: str, lora: bool) -> None:
    """Not on three processes either, nor when memory runs out on one of two: all go on in smaller micro-batches."""
    chosen = [split for split, (_, _, names) in SPLITS.items() if name in names]
    results = {split: torch.load(splits / f"{split}.pt")[name, lora] for split in chosen}
    assert len(results) == (5 if name in SOME else 3)
    whole, weights = results.pop("one")
    assert len(whole) == 4 and any(row["grad_norm"] for row in whole)
    for split, (rows, other_weights) in results.items():
        # The model's norms and softmax compute in float32 even here: a factor of 2 commutes with their rounding, 3 does not.
        loose = 1e4 if split == "three" else 1.0
        for row, other in zip(whole, rows, strict=True):
            known = [key for key, value in row.items() if key not in MACHINE and value is not None]
            close = pytest.approx([other[k] for k in known], rel=1e-9 * loose, abs=1e-11 * loose)
            assert [row[k] for k in known] == close, split
        for key, value in weights.items():
            torch.testing.assert_close(value, other_weights[key], rtol=1e-7 * loose, atol=1e-9 * loose)


def same_run(first: Path, second: Path) -> None:
    """Metrics within 1e-5, and the same recorded sequences."""
    for one, two in zip(lasting(metrics(first)), lasting(metrics(second)), strict=True):
        known = [key for key, value in one.items() if value is not None]
        assert [one[k] for k in known] == pytest.approx([two[k] for k in known], rel=1e-4, abs=1e-5), one["step"]
    for path in (first / "rollouts").iterdir():
        tokens = [[json.loads(line)["token_id"] for line in p.read_text().splitlines()] for p in
                  (path, second / "rollouts" / path.name)]  # fmt: skip
        assert tokens[0] == tokens[1]


@pytest.mark.parametrize("name", ["run-2", "run-12", "run-21", "sharded-12", "sharded-21"])
def test_a_sampled_run_does_not_depend_on_the_number_of_processes(splits: Path, name: str) -> None:
    """Also when it was stopped, and resumed on another number, with its weights in pieces before or after."""
    same_run(splits / "run-1", splits / name)


def test_a_student_in_pieces_is_saved_whole(splits: Path) -> None:
    whole, sharded = (load_file(splits / name / "student" / "model.safetensors") for name in ("run-1", "sharded-12"))
    assert whole.keys() == sharded.keys()
    for name, value in whole.items():
        torch.testing.assert_close(sharded[name], value, rtol=1e-3, atol=1e-4)
    AutoModelForCausalLM.from_pretrained(splits / "sharded-12" / "student")


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A token row with the fields of the teacher's choices beside the others."""
    choices = enumerate(row["teacher_top_k"])
    return {name: value for name, value in row.items() if name != "teacher_top_k"} | {
        f"{name} {place}": value for place, choice in choices for name, value in choice.items()
    }


def test_an_inspection_does_not_depend_on_the_number_of_processes(splits: Path) -> None:
    """Order, tokens, regions, and what a strategy that looks at the rows of all processes makes of them."""
    one, two = (
        [json.loads(line) for line in (splits / f"inspect-{count}.jsonl").read_text().splitlines()] for count in (1, 2)
    )
    assert {row["sequence"] for row in one} == set(range(12)) and {row["strategy"] for row in one} == {
        "trust-region",
        "entropy",
    }
    assert {row["region"] for row in one} >= {"trust", "outlier", "ignored"}
    for mine, theirs in zip(map(flat, one), map(flat, two), strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            close = pytest.approx(theirs[name], rel=1e-4, abs=1e-5) if isinstance(value, float) else theirs[name]
            assert value == close, name
    assert (splits / "inspect-2.log").read_text().count("12 responses of") == 1


def test_an_evaluation_does_not_depend_on_the_number_of_processes(splits: Path) -> None:
    first, second = ({p.name: p.read_bytes() for p in (splits / f"eval-{count}").iterdir()} for count in (1, 2))
    assert len(first) == 5 and first == second


@pytest.mark.parametrize("name", ["exchange", "short-sharded"])
def test_memory_that_runs_out_where_another_process_waits_ends_the_job(splits: Path, name: str) -> None:
    """While gradients are exchanged, and in any forward of a student in pieces. With the reason, and at once."""
    said = (splits / f"{name}.log").read_text()
    assert (
        "terminate called" not in said
        and "error: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB)" in said
    )


def test_a_failed_job_shows_what_its_workers_said_and_where_they_stood(tmp_path: Path) -> None:
    def wait() -> None:
        os.write(1, b"a worker's words\n")
        if os.environ["RANK"] == "1":
            threading.Event().wait()

    log = tmp_path / "job.log"
    assert start(2, wait, log).wait(1.0) == [0, None]
    (tmp_path / "said").write_text("job on 2: 1.0 s\n")
    told = what_failed(tmp_path, None)
    assert told.splitlines()[0] == f"the script was still running after 900 s, its last log is {log}"
    assert told.count("a worker's words") == 2 and "in wait" in told  # the stack of the one that hung
    (tmp_path / "said").write_text(f"job ended with [0, None]:\n{log.read_text()}")
    assert what_failed(tmp_path, 1).startswith("job ended with [0, None]:\njob ended") and "in wait" in told


def test_a_sharded_student_is_updated_and_sampled_like_a_whole_one(splits: Path) -> None:
    """The comparison is made by the processes themselves; a difference ends the script with an error."""
    assert "Error" not in (splits / "sharded.log").read_text()
