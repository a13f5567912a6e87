"""`tropd eval`: every form on tiny models, interruption, and agreement with other ways to the same numbers."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tropd_cli.config import build_config
from tropd_cli.data import load_prompts
from tropd_cli.evaluation import loop
from tropd_cli.evaluation.subject import Subject, load_subject
from tropd_cli.heldout import HeldOut, measure
from tropd_cli.judging import judge_for
from tropd_cli.main import app
from tropd_cli.rollout import TransformersGenerator

from .test_distill import arguments, invoke, metrics
from .tiny import tiny_tokenizer

FIELDS = set(
    "schema benchmark model accuracy ci95 problems samples pass_at_k truncated_share mean_length per_problem sampling "
    "prompt_hash".split()
)


def evaluate(*args: str, code: int = 0, text: str | None = None) -> Any:
    result = CliRunner().invoke(app, ["eval", *args], input=text)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.stderr
    return result


def results(*args: str, text: str | None = None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in evaluate(*args, "--json", text=text).stdout.splitlines()]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def on_data(tiny_pair: dict[str, Path]) -> list[str]:
    """The tiny student on twelve prompts with answers, several batches."""
    model = ["--model", str(tiny_pair["student"]), "--data", str(tiny_pair["data"]), "--verifier", "number"]
    return [*model, "--samples", "3", "--max-response-length", "10", "--set", "rollout_batch_tokens=80"]


# ── forms ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_arguments_evaluate_the_demo_and_agree_with_the_runs_own_measure() -> None:
    student, teacher = results("--limit", "6", "--samples", "2")
    assert student.keys() >= FIELDS and (student["model"], teacher["model"]) == ("demo:student", "demo:teacher")
    assert teacher["accuracy"] > student["accuracy"] and "divergence" not in teacher
    pair = load_subject(Subject(build_config({"student": "demo:student", "teacher": "demo:teacher"}), "demo"))
    prompts, _ = load_prompts("demo:heldout", pair.prompt_format)
    task = HeldOut(list(enumerate(prompts[:6])), judge_for("demo", None), 2, 64, 1.0, 4096)
    generator = TransformersGenerator(pair.student, pair.vocabulary, 0, "evaluation", 1.0, 32768)
    other = measure(pair, generator, task)
    assert student["accuracy"] == pytest.approx(other["accuracy"])
    assert student["mean_length"] == pytest.approx(other["response_length"], rel=1e-5)
    for name in ("reverse_kl", "acceptance", "agreement"):
        assert student["divergence"]["on_samples"][name] == pytest.approx(other[name], rel=1e-4)


@pytest.mark.parametrize("lora", [0, 2], ids=["full", "lora"])
def test_a_run_gives_its_own_numbers_again(tiny_pair: dict[str, Path], tmp_path: Path, lora: int) -> None:
    run = tmp_path / "run"
    options = {
        "steps": 2,
        "lora_rank": lora,
        "eval_data": str(tiny_pair["data"]),
        "eval_samples": 2,
        "verifier": "number",
    }
    invoke(*arguments(tiny_pair, run, **options))
    for row, flags in ((metrics(run)[-1], []), (metrics(run)[0], ["--before"])):
        (result,) = results(str(run), *flags)
        assert result["model"] == str(run) + (" (before)" if flags else "") and result["split"] is None
        assert result["accuracy"] == pytest.approx(row["eval_accuracy"])
        assert result["mean_length"] == pytest.approx(row["eval_response_length"], rel=1e-5)
        for name in ("reverse_kl", "acceptance", "agreement"):
            assert result["divergence"]["on_samples"][name] == pytest.approx(row[f"eval_{name}"], rel=1e-4)
    adapter = ["--model", str(run / "student"), "--data", str(tiny_pair["data"]), "--verifier", "number"]
    (named,) = results(*adapter, "--samples", "2", "--max-response-length", "12")
    assert named["per_problem"] == results(str(run), "--metrics", "accuracy")[0]["per_problem"]


def test_a_run_without_held_out_data_is_measured_on_training_prompts(
    tiny_pair: dict[str, Path], tmp_path: Path
) -> None:
    invoke(*arguments(tiny_pair, tmp_path / "run", steps=1))
    (result,) = results(str(tmp_path / "run"), "--limit", "5")
    assert result["split"] == "train" and result["accuracy"] is None and result["problems"] == 5
    assert result["divergence"]["on_samples"]["tokens"] == pytest.approx(5 * result["mean_length"])
    assert "(train prompts)" in evaluate(str(tmp_path / "run"), "--limit", "2").stdout
    shutil.rmtree(tmp_path / "run" / "student")
    assert "tropd distill --resume" in evaluate(str(tmp_path / "run"), code=1).stderr


def test_divergences_against_full_distributions(tiny_pair: dict[str, Path], tmp_path: Path) -> None:
    data = write(tmp_path / "given.jsonl", [{"prompt": "w3 w4 w5", "response": "w6 w7 w8 w9"}, {"prompt": "w5"}])
    models = ["--model", str(tiny_pair["student"]), "--teacher", str(tiny_pair["teacher"]), "--data", data]
    (result,) = results(*models, "--metrics", "divergence", "--max-response-length", "6")
    assert result["accuracy"] is None and result["teacher"] == str(tiny_pair["teacher"])
    found = result["divergence"]["on_responses"]
    subject = build_config({"student": str(tiny_pair["student"]), "teacher": str(tiny_pair["teacher"])})
    pair = load_subject(Subject(subject, "x"))
    words = [*pair.tokenizer("w3 w4 w5 w6 w7 w8 w9")["input_ids"], 1]
    with torch.no_grad():
        q, p = (
            m.model(torch.tensor([words])).logits[0, 2:-1].double().log_softmax(-1)
            for m in (pair.student, pair.teacher)
        )
    chosen = torch.tensor(words[3:])[:, None]
    ratio = (p.gather(1, chosen) - q.gather(1, chosen)).clamp_max(0).exp()
    assert found["tokens"] == 5
    assert found["reverse_kl"] == pytest.approx(float((q.exp() * (q - p)).sum(-1).mean()), rel=1e-4)
    assert found["forward_kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found["acceptance"] == pytest.approx(1 - float((p.exp() - q.exp()).abs().sum(-1).mean()) / 2, rel=1e-4)
    assert found["agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=1e-6)
    assert found["outlier_share"] == pytest.approx(1 - float(ratio.mean()), rel=1e-4)
    assert found["teacher_perplexity"] == pytest.approx(math.exp(-float(p.gather(1, chosen).mean())), rel=1e-4)


def test_benchmarks_use_the_chat_template_if_there_is_one(tiny_pair: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "chat"
    shutil.copytree(tiny_pair["student"], folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "w1 {{ messages[0]['content'] }} w2"
    tokenizer.save_pretrained(folder)
    spec = {"title": "Own", "fields": {"question": "q", "answer": "a"}, "prompt": "{question}", "verifier": "exact"}
    (tmp_path / "own.yaml").write_text(json.dumps(spec | {"sampling": {"max_response_length": 4}}))
    rows = write(tmp_path / "rows.jsonl", [{"q": "w5 w6", "a": "w7"}])
    args = ["--model", str(folder), "--benchmark", f"{tmp_path / 'own.yaml'}={rows}"]
    seen = []
    for flag in ([], ["--no-chat"]):
        (result,) = results(*args, *flag)
        seen.append((result["sampling"]["chat_template"], result["mean_length"], result["prompt_hash"]))
    assert [chat for chat, *_ in seen] == [True, False] and seen[0][2] == seen[1][2]


def test_completions_from_standard_input_and_with_a_benchmarks_references(tmp_path: Path) -> None:
    rows = [{"id": i, "completion": c, "answer": "4"} for i, c in ((1, "#### 4"), (1, "5"), (2, "4"))]
    (result,) = results("--completions", "-", "--verifier", "number", text="\n".join(map(json.dumps, rows)))
    assert (result["benchmark"], result["accuracy"], result["samples"]) == ("stdin", 0.75, 3)
    assert result["majority_at_k"] == {"1": 0.75} and result["prompt_hash"] is None
    questions = write(tmp_path / "questions.jsonl", [{"question": "2 + 2?", "answer": "so\n#### 4"}])
    made = write(tmp_path / "made.jsonl", [{"id": "0", "completion": "It is 4."}])
    graded = tmp_path / "graded.jsonl"
    args = ["--completions", made, "--benchmark", f"gsm8k={questions}", "--output", str(graded)]
    (result,) = results(*args, "--model", "elsewhere")
    assert result["accuracy"] == 1.0 and result["benchmark"] == "gsm8k" and result["model"] == "elsewhere"
    assert json.loads(graded.read_text()).keys() == set("id sample completion extracted correct reason".split())
    assert "exists already" in evaluate(*args, code=1).stderr


def test_results_side_by_side(on_data: list[str], tmp_path: Path) -> None:
    for name, seed in (("a", "0"), ("b", "1")):
        (tmp_path / f"{name}.json").write_text(evaluate(*on_data, "--seed", seed, "--json").stdout)
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    shown = evaluate(*files, "--table", "markdown")
    assert shown.stdout.startswith("| model | prompts |") and shown.stderr == ""
    (compared,) = results(*files)
    assert compared["schema"] == "tropd-comparison/1" and compared["problems"] == 12 and compared["differs"] == []
    changed = json.loads((tmp_path / "b.json").read_text())
    changed["sampling"]["temperature"] = 0.1
    (tmp_path / "b.json").write_text(json.dumps(changed))
    assert "temperature: 1.0 and 0.1" in " ".join(evaluate(*files, "--table", "plain").stderr.split())


# ── samples on disk ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_torn_samples_file_is_continued_to_the_same_bytes(on_data: list[str], tmp_path: Path) -> None:
    whole = results(*on_data, "--output", str(tmp_path / "whole"))
    source = tmp_path / "whole" / "prompts.samples.jsonl"
    content = source.read_bytes()
    rows = [json.loads(line) for line in content.splitlines()]
    assert len(rows) == 36 and set("id sample completion extracted correct reason".split()) < rows[0].keys()
    for cut in (
        0,
        len(content) // 3,
        len(content) - 1,
    ):  # nothing, the middle of a line and of a batch, a lost line break
        folder = tmp_path / f"cut-{cut}"
        shutil.copytree(tmp_path / "whole", folder)
        (folder / "results.jsonl").unlink()
        (folder / source.name).write_bytes(content[:cut])
        assert results(*on_data, "--output", str(folder)) == whole
        assert (folder / source.name).read_bytes() == content
        assert json.loads((folder / "results.jsonl").read_text()) == whole[0]


def test_nothing_is_sampled_again_and_other_settings_are_refused(
    on_data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*on_data, "--output", str(tmp_path / "x.jsonl")]
    whole = results(*args)
    monkeypatch.setattr(loop, "sample_batch", lambda *_: pytest.fail("sampled again"))
    again = evaluate(*args, "--json")
    assert [json.loads(again.stdout)] == whole and "36 of 36 samples are there already" in again.stderr
    refused = evaluate(*args, "--seed", "7", code=1).stderr
    assert "sampling was" in refused and "--overwrite" in refused
    (tmp_path / "x.settings.json").unlink()
    assert "says how it was made" in evaluate(*args, code=1).stderr


def test_a_sample_does_not_depend_on_how_many_are_made(on_data: list[str], tmp_path: Path) -> None:
    few, many = tmp_path / "few.jsonl", tmp_path / "many.jsonl"
    evaluate(*on_data, "--samples", "1", "--limit", "4", "--output", str(few))
    evaluate(*on_data, "--output", str(many), "--temperature", "1")
    rows = {(r["id"], r["sample"]): r for r in map(json.loads, many.read_text().splitlines())}
    assert all(rows[r["id"], r["sample"]] == r for r in map(json.loads, few.read_text().splitlines()))


def test_empty_generations_are_wrong_and_no_accident(
    on_data: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(TransformersGenerator, "__call__", lambda self, requests: [[1] for _ in requests])
    teacher = ["--teacher", on_data[1]]
    (result,) = results(*on_data, *teacher, "--output", str(tmp_path / "empty.jsonl"))
    assert (result["accuracy"], result["mean_length"], result["truncated_share"]) == (0.0, 1.0, 0.0)
    row = json.loads((tmp_path / "empty.jsonl").read_text().splitlines()[0])
    assert (row["completion"], row["extracted"], row["reason"]) == ("", None, "empty completion")


# ── bad input ───────────────────────────────────────────────────────────────────────────────────────────────────────

BAD: list[tuple[list[str], list[str]]] = [
    (["--model", "{student}", "--benchmark", "gsm9k"], ["unknown benchmark 'gsm9k'", "gsm8k"]),
    (["--model", "{student}", "--benchmark", "gsm8k"], ["gsm8k", "--benchmark gsm8k=FILE.jsonl"]),
    (["--model", "{student}", "--data", "{data}", "--verifier", "numbr"], ["'numbr'", "number"]),
    (["--model", "{student}", "--data", "{rows}", "--verifier", "number"], ["line 2", "'answer'", "number"]),
    (["--model", "{student}", "--data", "{prompts}"], ["no `answer`", "--teacher"]),
    (["--model", "{student}", "--data", "nowhere.jsonl"], ["nowhere.jsonl", "does not exist"]),
    (["--model", "nowhere/at-all", "--data", "{data}"], ["model 'nowhere/at-all", "could not be loaded"]),
    (["--model", "{student}"], ["on what?", "--benchmark"]),
    (["--data", "{data}"], ["--model missing"]),
    (["--model", "{student}", "--data", "{data}", "--metrics", "divergence"], ["--teacher"]),
    (["--model", "{student}", "--data", "{data}", "--metrics", "speed"], ["'speed'", "accuracy, divergence"]),
    (
        ["--model", "{student}", "--data", "{data}", "--max-response-length", "300"],
        ["line 3", "leaves room", "--max-response-length 251"],
    ),
    (["--completions", "{data}", "--verifier", "number"], ["line 1", "'id'"]),
    (["--completions", "{data}"], ["--verifier NAME"]),
    (["--completions", "{data}", "--verifier", "code"], ["--allow-code-execution"]),
    (["--completions", "{data}", "--verifier", "number", "--samples", "2"], ["--samples", "--completions"]),
    (["{data}"], ["no result of `tropd eval`"]),
    (["nowhere"], ["neither a run directory nor a result file"]),
    (["{student}"], ["no run directory", "--model"]),
    (["--before"], ["--before needs a run"]),
    (["--samples", "0"], ["--samples 0", "1 or more"]),
    (["--temperature", "-1"], ["--temperature -1", "0 (greedy)"]),
    (["--top-p", "0"], ["--top-p 0", "at most 1"]),
    (["--table", "html"], ["'html'", "markdown, plain"]),
    (["--set", "eval_samples=2"], ["--set eval_samples=2", "--samples"]),
    (["--set", "tmperature=1"], ["unknown option 'tmperature'", "temperature"]),
]


@pytest.mark.parametrize(("args", "says"), BAD, ids=[" ".join(args) for args, _ in BAD])
def test_bad_input(args: list[str], says: list[str], tiny_pair: dict[str, Path], tmp_path: Path) -> None:
    places = {name: str(path) for name, path in tiny_pair.items()}
    places["rows"] = write(tmp_path / "rows.jsonl", [{"prompt": "w3", "answer": "1"}, {"prompt": "w4", "label": "2"}])
    places["prompts"] = write(tmp_path / "prompts.jsonl", [{"prompt": "w3"}])
    result = evaluate(*(arg.format(**places) for arg in args), code=1)
    assert result.stdout == "" and result.stderr.count("error:") == 1 and "Traceback" not in result.stderr
    for text in says:
        assert text in result.stderr, result.stderr


def test_code_is_graded_in_the_sandbox_when_allowed(tmp_path: Path) -> None:
    from tropd_cli import sandbox

    try:
        sandbox.available()
    except sandbox.SandboxUnavailable as error:
        pytest.skip(str(error))
    tests = {"tests": "def check(f):\n    assert f(2) == 4\n", "entry_point": "f"}
    rows = [{"id": i, "completion": f"```python\ndef f(x):\n    return x * {i}\n```", **tests} for i in (2, 3)]
    made = write(tmp_path / "made.jsonl", rows)
    (result,) = results("--completions", made, "--verifier", "code", "--allow-code-execution")
    assert result["accuracy"] == 0.5 and result["majority_at_k"] is None
