"""Whole runs of `tropd distill` on tiny models: what they write, resume, interruption, trouble on the way."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tropd_cli import train
from tropd_cli.main import app
from tropd_cli.offload import Offload

from .tiny import tiny_model, tiny_tokenizer

VOLATILE = {"seconds_rollout", "seconds_teacher", "seconds_update", "tokens_per_second", "peak_memory_bytes"}
REQUIRED = set(
    "step loss reverse_kl forward_kl_outlier outlier_share guidance_share ignored_share acceptance reward_mean reward_min "
    "reward_max entropy grad_norm update_norm clip_share response_length truncated_share prefix_limit lr tokens "
    "tokens_per_second seconds_rollout seconds_teacher seconds_update peak_memory_bytes skipped_steps".split()
)


def arguments(pair: dict[str, Path], output: Path, **options: Any) -> list[str]:
    """A small run on the tiny pair; options are `--set` paths with dots written as two underscores."""
    small = {
        "steps": 4, "prompts_per_step": 4, "rollouts_per_prompt": 2, "max_prompt_length": 16, "max_response_length": 12,
        "learning_rate": 1e-2, "probe_rollouts": 4, "strategy__outlier__top_k": 5, "record__every": 2, "record__sequences": 3,
    } | options  # fmt: skip
    sets = [x for key, value in small.items() for x in ("--set", f"{key.replace('__', '.')}={json.dumps(value)}")]
    models = ["--student", str(pair["student"]), "--teacher", str(pair["teacher"]), "--data", str(pair["data"])]
    return ["distill", *models, "--output", str(output), *sets]


def invoke(*args: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(args))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.stderr
    return result


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def lasting(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in VOLATILE} for row in rows]


def test_a_run_leaves_everything_behind(tiny_pair: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = invoke(*arguments(tiny_pair, run, eval_data=str(tiny_pair["data"]), checkpoint_every=2))
    assert result.stdout.strip() == str(run)
    rows = metrics(run)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(row.keys() >= REQUIRED for row in rows[1:])
    assert rows[0]["probe_responses"] == 4 and rows[0]["eval_reverse_kl"] > 0 and "eval_forward_kl" in rows[-1]
    assert rows[1]["prefix_limit"] == 12 and rows[-1]["prefix_limit"] == 1
    recorded = [json.loads(line) for line in (run / "rollouts" / "step-000002.jsonl").read_text().splitlines()]
    assert {row["sequence"] for row in recorded} == {0, 1, 2}
    for row in recorded:
        wanted = min(1.0, math.exp(row["teacher_logprob"] - row["student_logprob"]))
        assert row["p_trust"] == pytest.approx(wanted, rel=1e-5)
        if row["written_by"] == "student":
            assert row["region"] == ("trust" if row["uniform"] < row["p_trust"] else "outlier")
        else:
            assert row["region"] == "guidance" and row["credit"] == pytest.approx(0.001)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    model = AutoModelForCausalLM.from_pretrained(run / "student")
    weights = load_file(run / "checkpoints" / "step-000004" / "student.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[f"model.{name}"])
    assert "tropd" in (run / "student" / "README.md").read_text()


def test_metrics_agree_with_the_recorded_tokens(tiny_pair: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    invoke(*arguments(tiny_pair, run, steps=2, record__every=1, record__sequences=8, guidance__weight=0.5))
    row = metrics(run)[2]
    tokens = [json.loads(line) for line in (run / "rollouts" / "step-000002.jsonl").read_text().splitlines()]
    student = [t for t in tokens if t["written_by"] == "student"]
    rewards = [t["teacher_logprob"] - t["student_logprob"] for t in student]
    outliers = [t for t in student if t["region"] == "outlier"]
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    assert row["tokens"] == len(tokens)
    assert row["reward_mean"] == pytest.approx(mean(rewards), rel=1e-5)
    assert row["reward_min"] == pytest.approx(min(rewards), rel=1e-5)
    assert row["outlier_share"] == pytest.approx(len(outliers) / len(student))
    assert row["guidance_share"] == pytest.approx(1 - len(student) / len(tokens))
    assert row["acceptance"] == pytest.approx(mean([t["p_trust"] for t in student]), rel=1e-5)
    assert row["entropy"] == pytest.approx(mean([t["student_entropy"] for t in student]), rel=1e-5)
    last = {t["sequence"]: t["finish"] for t in tokens if "finish" in t}
    assert row["truncated_share"] == mean([finish == "length" for finish in last.values()])


@pytest.mark.parametrize("lora", [0, 2], ids=["full", "lora"])
def test_resume_after_sigterm_is_bit_identical(
    tiny_pair: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: int
) -> None:
    rows = [json.loads(line) for line in tiny_pair["data"].read_text().splitlines()]
    heldout = tmp_path / "heldout.jsonl"  # without answers the best student is the one of the least reverse KL
    heldout.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    options = {"steps": 20, "checkpoint_every": 7, "log_with": ["tensorboard"], "eval_data": str(heldout)}
    options |= {"eval_every": 5, "keep_best": True, "lora_rank": lora}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    invoke(*arguments(tiny_pair, whole, **options))
    finish = train.finish_step

    def finish_and_signal(t: Any, row: dict[str, Any]) -> None:
        finish(t, row)
        if t.completed == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train, "finish_step", finish_and_signal)
    stopped = invoke(*arguments(tiny_pair, parts, **options), code=130)
    assert f"tropd distill --resume {parts}" in stopped.stderr
    assert not (parts / "student").exists() and metrics(parts)[-1]["step"] == 10
    monkeypatch.setattr(train, "finish_step", finish)
    with (parts / "metrics.jsonl").open("a") as file:  # what a kill in the middle of a line leaves
        file.write('{"step": 11, "lo')
    invoke("distill", "--resume", str(parts))
    assert lasting(metrics(whole)) == lasting(metrics(parts))
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    for folder in ("student", "best"):
        mine, theirs = load_file(whole / folder / name), load_file(parts / folder / name)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    for path in sorted((whole / "rollouts").iterdir()):
        assert path.read_bytes() == (parts / "rollouts" / path.name).read_bytes()


def test_ctrl_c_saves_and_says_how_to_go_on(
    tiny_pair: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = train.finish_step
    monkeypatch.setattr(train, "finish_step", lambda t, row: (finish(t, row), os.kill(os.getpid(), signal.SIGINT)))
    result = invoke(*arguments(tiny_pair, tmp_path / "run"), code=130)
    assert "interrupted; everything is saved" in result.stderr and "--resume" in result.stderr
    assert (tmp_path / "run" / "checkpoints" / "step-000001").is_dir()


def test_more_steps_on_resume_are_kept_for_the_next_resume(tiny_pair: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    invoke(*arguments(tiny_pair, run, steps=1))
    invoke("distill", "--resume", str(run), "--steps", "3")
    assert "steps: 3" in (run / "config.yaml").read_text()
    invoke("distill", "--resume", str(run))
    assert metrics(run)[-1]["step"] == 3


def test_a_damaged_checkpoint_is_passed_over(tiny_pair: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    invoke(*arguments(tiny_pair, run, checkpoint_every=2))
    before = lasting(metrics(run))
    weights = run / "checkpoints" / "step-000004" / "student.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7] + b"garbage")
    shutil.rmtree(run / "student")
    result = invoke("distill", "--resume", str(run))
    assert "damaged checkpoint passed over" in result.stderr and "step-000002" in result.stderr
    assert lasting(metrics(run)) == before and (run / "student").is_dir()


def test_micro_batching_changes_nothing_that_matters(tiny_pair: dict[str, Path], tmp_path: Path) -> None:
    runs = []
    for name, budget in (("one", 100_000), ("many", 40)):
        invoke(*arguments(tiny_pair, tmp_path / name, micro_batch_tokens=budget, rollout_batch_tokens=budget))
        runs.append(lasting(metrics(tmp_path / name)))
    for first, second in zip(*runs, strict=True):
        known = [name for name, value in first.items() if value is not None]
        assert [first[n] for n in known] == pytest.approx([second[n] for n in known], rel=1e-4, abs=1e-5)


def test_lora_with_merge_saves_both_and_they_agree(tiny_pair: dict[str, Path], tmp_path: Path) -> None:
    from peft import PeftModel

    run = tmp_path / "run"
    invoke(*arguments(tiny_pair, run, lora_rank=3, merge=True))
    base = AutoModelForCausalLM.from_pretrained(tiny_pair["student"])
    ids = torch.arange(5, 15)[None]
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, run / "student")(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(run / "student-merged")(ids).logits
    torch.testing.assert_close(adapted, merged, atol=1e-4, rtol=1e-4)
    assert (adapted - before).abs().max() > 1e-2
    start = load_file(tiny_pair["student"] / "model.safetensors")
    untouched = AutoModelForCausalLM.from_pretrained(run / "student-merged").state_dict()
    assert torch.equal(start["model.embed_tokens.weight"], untouched["model.embed_tokens.weight"])


def test_several_updates_on_one_rollout(tiny_pair: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = {"updates_per_rollout": 3, "steps": 7, "checkpoint_every": 2, "strategy": {"name": "opd"}}
    args = arguments(tiny_pair, run, **options)
    cut = [i for i, a in enumerate(args) if a.startswith("strategy.outlier")]
    for i in reversed(cut):
        del args[i - 1 : i + 1]
    invoke(*args)
    rows = metrics(run)[1:]
    assert [row["step"] for row in rows] == list(range(1, 8))
    # The rewards of a rollout are those of rollout time, so three updates share them; the weights move on.
    assert rows[0]["reward_mean"] == rows[1]["reward_mean"] == rows[2]["reward_mean"] != rows[3]["reward_mean"]
    assert rows[0]["loss"] != rows[1]["loss"]


def test_ten_non_finite_steps_in_a_row_stop_the_run(
    tiny_pair: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, update = tmp_path / "run", train.apply_update
    monkeypatch.setattr(
        train, "apply_update", lambda t, loss, norm: update(t, math.nan if t.completed >= 2 else loss, norm)
    )
    result = invoke(*arguments(tiny_pair, run, steps=30, checkpoint_every=2), code=1)
    assert "10 steps in a row had a non-finite loss" in result.stderr and "--learning-rate" in result.stderr
    rows = metrics(run)
    assert rows[-1]["step"] == 12 and rows[-1]["skipped_steps"] == 10 and rows[-1]["update_norm"] == 0.0
    first = load_file(run / "checkpoints" / "step-000010" / "student.safetensors")
    assert all(torch.isfinite(value).all() for value in first.values())


def test_a_damaged_teacher_is_refused_by_name(tiny_pair: dict[str, Path], tmp_path: Path) -> None:
    teacher = tiny_model("llama", seed=5)
    teacher.model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    teacher.model.save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    pair = tiny_pair | {"teacher": tmp_path / "teacher"}
    result = invoke(*arguments(pair, tmp_path / "run"), code=1)
    assert str(tmp_path / "teacher") in result.stderr and "not finite on plain text" in result.stderr


NAN_ONCE = """
from dataclasses import dataclass
import torch
from strategies import STRATEGIES, Credit, Needs

@STRATEGIES.register("nan-once")
@dataclass(frozen=True)
class NanOnce:
    scope = "token"
    ratio_clip = None
    paper = ""
    needs = Needs(teacher_logprob=True)

    def credit(self, signals):
        reward = signals.teacher_logprob - signals.student_logprob
        return Credit(reward * torch.nan if signals.progress == 0.25 else reward)
"""


def test_a_nan_gradient_skips_its_step_alone(tiny_pair: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "rule.py").write_text(NAN_ONCE)
    args = arguments(tiny_pair, tmp_path / "run", strategy={"name": "nan-once"}, checkpoint_every=1, keep_checkpoints=4)
    start = next(i for i, a in enumerate(args) if a.startswith("strategy.outlier")) - 1
    invoke(*args[:start], *args[start + 2 :], "--plugin", str(tmp_path / "rule.py"))
    rows = metrics(tmp_path / "run")
    assert [row["skipped_steps"] for row in rows[1:]] == [0, 1, 1, 1]
    assert rows[2]["loss"] is None and rows[2]["grad_norm"] is None and rows[3]["grad_norm"] > 0
    weights = [load_file(tmp_path / f"run/checkpoints/step-00000{i}/student.safetensors") for i in (1, 2, 3)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not all(torch.equal(weights[1][k], weights[2][k]) for k in weights[0])


def test_a_full_disk_costs_the_checkpoint_not_the_run(
    tiny_pair: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tropd_cli import checkpoint

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    run = tmp_path / "run"
    result = invoke(*arguments(tiny_pair, run))
    assert "no checkpoint at step 4" in result.stderr and "No space left" in result.stderr
    assert list((run / "checkpoints").iterdir()) == []


def test_out_of_memory_halves_the_batch_and_goes_on(
    tiny_pair: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = train.score

    def limited(t: Any, rollout: Any, budget: int) -> Any:
        if budget > 200:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: 12 GB")
        return score(t, rollout, budget)

    monkeypatch.setattr(train, "score", limited)
    result = invoke(*arguments(tiny_pair, tmp_path / "run", micro_batch_tokens=800))
    assert "going on with micro_batch_tokens: 200" in result.stderr
    monkeypatch.setattr(train, "score", lambda *_: limited(*_[:2], 999))
    result = invoke(*arguments(tiny_pair, tmp_path / "other", micro_batch_tokens=800), code=1)
    assert "out of memory" in result.stderr and "gradient_checkpointing" in result.stderr


def test_teacher_equal_to_student_is_said(tiny_pair: dict[str, Path], tmp_path: Path) -> None:
    pair = tiny_pair | {"teacher": tiny_pair["student"]}
    result = invoke(*arguments(pair, tmp_path / "run", steps=1))
    assert "there will be no signal" in result.stderr and "agree before training" in result.stderr
    assert metrics(tmp_path / "run")[0]["acceptance"] == pytest.approx(1.0, abs=1e-4)


def test_offloaded_models_are_never_used_while_they_are_away(
    tiny_pair: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Away means here: without weights. Prefixes, probe, scores and held-out measurement all bring them back."""
    options = {"eval_data": str(tiny_pair["data"]), "eval_every": 2, "steps": 2, "chunk_tokens": 5}
    away = 0

    def hide(self: Offload) -> None:
        nonlocal away
        away += 1
        for model, _ in self.homes:
            kept = [(parameter, parameter.data) for parameter in model.model.parameters()]
            for parameter, data in kept:
                parameter.data = data.new_empty(0)
            model.model.to = lambda _, kept=kept: [setattr(p, "data", data) for p, data in kept]

    invoke(*arguments(tiny_pair, tmp_path / "here", **options))
    monkeypatch.setattr(Offload, "_send_away", hide)
    invoke(*arguments(tiny_pair, tmp_path / "away", teacher_offload=True, **options))
    assert lasting(metrics(tmp_path / "away")) == lasting(metrics(tmp_path / "here"))
    assert away >= 1 + 1 + 2 + 2  # at first, after the probe, after two evaluations, after scoring two rollouts
    arguments_of_gkd = arguments(tiny_pair, tmp_path / "gkd", teacher_offload=True)
    start = next(i for i, a in enumerate(arguments_of_gkd) if a.startswith("strategy.outlier")) - 1
    del arguments_of_gkd[start : start + 2]
    result = invoke(*arguments_of_gkd, "--strategy", "gkd", code=1)
    assert (
        "teacher_offload does not go with strategy 'gkd'" in result.stderr and "--teacher-device cpu" in result.stderr
    )


def test_json_prints_the_last_metrics(tiny_pair: dict[str, Path], tmp_path: Path) -> None:
    result = invoke(*arguments(tiny_pair, tmp_path / "run", steps=1), "--json")
    last = json.loads(result.stdout)
    assert last["run"] == str(tmp_path / "run") and last["step"] == 1


@pytest.mark.parametrize("lora", [0, 2], ids=["full", "lora"])
def test_bfloat16_trains_float32_masters_and_records(tiny_pair: dict[str, Path], tmp_path: Path, lora: int) -> None:
    options = {"steps": 2, "lora_rank": lora, "guidance__enabled": False, "strategy": {"name": "opd"}}
    args = arguments(tiny_pair, tmp_path / "low", dtype="bfloat16", **options)
    start = next(i for i, a in enumerate(args) if a.startswith("strategy.outlier")) - 1
    del args[start : start + 2]
    invoke(*args)
    row = metrics(tmp_path / "low")[1]
    tokens = [json.loads(line) for line in (tmp_path / "low/rollouts/step-000002.jsonl").read_text().splitlines()]
    assert math.isfinite(row["grad_norm"]) and row["grad_norm"] > 0 and tokens
    weights = load_file(tmp_path / "low/checkpoints/step-000002/student.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
