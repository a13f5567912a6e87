"""Every wrong input: one clear message that names the value and what to type, exit code 1, nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from tropd_cli.main import app

from .test_distill import arguments, invoke, metrics
from .tiny import tiny_model, tiny_tokenizer


def refused(*args: str, says: tuple[str, ...], output: Path | None = None) -> str:
    result = CliRunner().invoke(app, list(args))
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.count("error:") == 1 and "Traceback" not in result.stderr
    for text in says:
        assert text in result.stderr, result.stderr
    assert output is None or not output.exists()
    return result.stderr


def swap(args: list[str], flag: str, value: str) -> list[str]:
    args = list(args)
    args[args.index(flag) + 1] = value
    return args


@pytest.fixture
def good(tiny_pair: dict[str, Path], tmp_path: Path) -> list[str]:
    return arguments(tiny_pair, tmp_path / "run", steps=1)


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./no/such/folder", "neither a folder nor a hub name"),
        ("no-such-owner/no-such-model", "could not be loaded"),
    ],
)
def test_missing_model(good: list[str], tmp_path: Path, role: str, name: str, says: str) -> None:
    refused(*swap(good, f"--{role}", name), says=(role, name, says))


def test_folder_that_is_no_model(good: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(
        *swap(good, "--teacher", str(tmp_path / "empty")), says=("teacher", str(tmp_path / "empty"), "does not load")
    )


def other_tokenizer(folder: Path, words: list[str]) -> None:
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def test_different_tokenizers_name_the_first_differing_tokens(good: list[str], tmp_path: Path) -> None:
    words = ["<pad>", "<eos>", "<bos>", *(f"w{i}" for i in range(58))]
    words[10], words[11] = words[11], words[10]
    tiny_model("llama", seed=5).model.save_pretrained(tmp_path / "teacher")
    other_tokenizer(tmp_path / "teacher", words)
    refused(
        *swap(good, "--teacher", str(tmp_path / "teacher")),
        says=("different tokenizers", "'w7' (student 10, teacher 11)"),
    )


def test_the_same_tokenizer_with_another_padded_vocabulary_is_fine(good: list[str], tmp_path: Path) -> None:
    tiny_model("llama", seed=5, vocabulary=72).model.save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    invoke(*swap(good, "--teacher", str(tmp_path / "teacher")))


def test_a_smaller_padded_vocabulary_of_the_teacher_is_fine_too(good: list[str], tmp_path: Path) -> None:
    tiny_model("llama", seed=0, vocabulary=72).model.save_pretrained(tmp_path / "student")
    tiny_tokenizer().save_pretrained(tmp_path / "student")
    invoke(*swap(good, "--student", str(tmp_path / "student")))


def test_a_model_without_its_head_is_refused(good: list[str], tmp_path: Path) -> None:
    tiny_model("llama", seed=5).model.model.save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    refused(
        *swap(good, "--teacher", str(tmp_path / "teacher")), says=("no whole causal language model", "lm_head.weight")
    )


def test_truncated_weights_are_refused(good: list[str], tmp_path: Path) -> None:
    tiny_model("llama", seed=5).model.save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    weights = tmp_path / "teacher" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(*swap(good, "--teacher", str(tmp_path / "teacher")), says=("teacher folder", "does not load"))


def test_a_prompt_token_the_teacher_does_not_know(good: list[str], tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>"], special_tokens=True)
    tiny_model("llama", vocabulary=72).model.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    (tmp_path / "data.jsonl").write_text('{"prompt": "w1 <think> w2"}\n')
    args = swap(swap(good, "--student", str(tmp_path / "student")), "--data", str(tmp_path / "data.jsonl"))
    refused(*args, says=("line 1", "'<think>' (61)", "--teacher-chat-template own"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"prompt": "w1 w2"}\n{"prompt": oops}\n', ("line 2", "not JSON", "--skip-bad-rows")),
        ('{"prompt": "w1 w2"}\n[1, 2]\n', ("line 2", "a list, not an object")),
        ("", ("has no rows",)),
        ("\n\n", ("has no rows",)),
        ('{"question": "w1", "id": 3}\n', ("line 1", "no prompt", "question, id")),
        ('{"prompt": ""}\n', ("line 1", "no prompt")),
        ('{"prompt": "w1", "response": 5}\n', ("line 1", "`response` is int")),
        ('{"messages": [{"role": "user", "content": "w1"}]}\n', ("line 1", "no chat template")),
        ('{"prompt": "' + "w1 " * 17 + '"}\n', ("line 1", "17 tokens", "--max-prompt-length 16")),
    ],
)
def test_bad_data(good: list[str], tmp_path: Path, text: str, says: tuple[str, ...]) -> None:
    (tmp_path / "data.jsonl").write_text(text)
    refused(*swap(good, "--data", str(tmp_path / "data.jsonl")), says=says)


def test_bad_rows_are_counted_when_skipped(good: list[str], tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"prompt": "w1 w2"}\nnonsense\n{"promt": "w3"}\n{"prompt": "w4"}\n')
    result = invoke(*swap(good, "--data", str(tmp_path / "data.jsonl")), "--skip-bad-rows")
    assert "2 bad rows skipped" in result.stderr and "line 2" in result.stderr


def test_missing_data_file(good: list[str], tmp_path: Path) -> None:
    refused(*swap(good, "--data", "nothing.jsonl"), says=("'nothing.jsonl' does not exist",))


def test_prompts_on_standard_input(good: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, swap(good, "--data", "-"), input='{"prompt": "w1 w2"}\n')
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (
            ["--strategy", "trust-regoin"],
            ("unknown strategy 'trust-regoin'", "Did you mean 'trust-region'?", "tropd strategies"),
        ),
        (["--outlier", "forwrd-kl"], ("unknown outlier estimator 'forwrd-kl'", "Did you mean 'forward-kl'?")),
        (["--strategy", "opd", "--outlier", "mask"], ("'opd' has no outlier estimator", "trust-region")),
        (["--set", "strategy.treshold=-1"], ("unknown option 'treshold'", "Did you mean 'threshold'?")),
        (["--set", "strategy.region_rule=sfot"], ("'sfot'", "acceptance, soft, threshold")),
        (["--set", "strategy.outlier.top_k=0"], ("top_k must be at least 1, got 0",)),
        (["--set", "optimizer.epsilon=1e-6"], ("unknown option 'optimizer.epsilon'", "Did you mean 'optimizer.eps'?")),
        (["--set", "max_reponse_length=5"], ("unknown option 'max_reponse_length'", "max_response_length")),
        (["--set", "steps"], ("'steps' is no assignment", "--set optimizer.eps=1e-8")),
        (["--set", "steps=0"], ("'steps' is 0", "greater than or equal to 1")),
        (["--set", "learning_rate=-1"], ("'learning_rate' is -1", "greater than 0")),
        (["--temperature", "0"], ("'temperature' is 0.0",)),
        (["--set", "guidance.length=max"], ("guidance.length", "'uniform' or 'min'")),
        (["--set", "optimizer.betas=[0.9]"], ("optimizer.betas", "at least 2 items")),
        (["--set", "learning_rate=.inf"], ("learning_rate", "finite")),
        (["--set", "device=gpu"], ("'gpu'", "auto, cpu")),
        (["--set", "steps=many"], ("'steps' is 'many'",)),
        (["--set", "max_response_length=400"], ("416 tokens", "context of 256")),
        (["--set", "verifier=maths"], ("maths", "math")),
        (["--log-with", "tensorbord"], ("tensorbord",)),
        (["--preset", "no-such-row"], ("no-such-row", "tropd strategies --presets")),
        (["--config", "missing.yaml"], ("'missing.yaml' cannot be read",)),
        (["--plugin", "missing.py"], ("missing.py", "does not exist")),
        (["--teacher-chat-template", "missing.jinja"], ("missing.jinja",)),
        (["--lora-rank", "2", "--set", "lora_targets=[nothing]"], ("lora_targets", "nothing")),
    ],
)
def test_bad_options(good: list[str], tmp_path: Path, extra: list[str], says: tuple[str, ...]) -> None:
    base = [a for a in good if a not in ("--set",) and not a.startswith("strategy.outlier")] if "opd" in extra else good
    if base is not good:
        base = good[: good.index("--set")]
    refused(*base, *extra, says=says, output=tmp_path / "run")


def test_bad_yaml(good: list[str], tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    for text, says in (("a: [1", "is not YAML"), ("- 1", "must be a mapping"), ("stepz: 4", "Did you mean 'steps'?")):
        path.write_text(text)
        refused(*good, "--config", str(path), says=(says,), output=tmp_path / "run")


def test_only_some_of_student_teacher_data(tiny_pair: dict[str, Path]) -> None:
    refused("distill", "--student", str(tiny_pair["student"]), says=("--teacher and --data missing",))


def test_an_existing_run_is_refused_kept_or_replaced(good: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    invoke(*good)
    before = (run / "metrics.jsonl").read_bytes()
    refused(*good, says=(f"'{run}' exists already", f"tropd distill --resume {run}", "--overwrite"))
    assert (run / "metrics.jsonl").read_bytes() == before
    invoke(*good, "--overwrite")
    assert len(metrics(run)) == 2


def test_overwrite_never_deletes_what_is_no_run(good: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    refused(*good, "--overwrite", says=("is no run directory", "leaves it alone"))
    assert (tmp_path / "run" / "thesis.tex").exists()


def test_unwritable_output(good: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(*swap(good, "--output", str(tmp_path / "file" / "run")), says=("cannot be written", "--output"))


def test_resume_refuses_other_options_and_other_folders(good: list[str], tmp_path: Path) -> None:
    refused("distill", "--resume", str(tmp_path), says=("is no run directory",))
    invoke(*good)
    refused(
        "distill", "--resume", str(tmp_path / "run"), "--learning-rate", "1", says=("learning_rate is 0.01", "1.0 now")
    )


def test_resume_with_more_steps_goes_on(good: list[str], tmp_path: Path) -> None:
    invoke(*good)
    invoke("distill", "--resume", str(tmp_path / "run"), "--steps", "3")
    assert [row["step"] for row in metrics(tmp_path / "run")] == [0, 1, 2, 3]


def test_a_plug_in_of_a_run_must_be_named_again(good: list[str], tmp_path: Path) -> None:
    plugin = tmp_path / "rule.py"
    plugin.write_text("raise RuntimeError('boom')\n")
    refused(*good, "--plugin", str(plugin), says=("rule.py", "RuntimeError: boom"), output=tmp_path / "run")
    plugin.write_text("MARK = 1\n")
    invoke(*good, "--plugin", str(plugin))
    refused("distill", "--resume", str(tmp_path / "run"), says=("only if you name it again", "--plugin"))


def test_unknown_command_and_flag_exit_2() -> None:
    for args in (["distil"], ["distill", "--studnet", "x"]):
        assert CliRunner().invoke(app, args).exit_code == 2


def test_config_layers(tiny_pair: dict[str, Path], tmp_path: Path) -> None:
    import yaml

    path = tmp_path / "run.yaml"
    path.write_text(
        "steps: 7\nlearning_rate: 5e-6\nseed: 3\nstrategy: {name: trust-region, outlier: {name: clip, floor: -3}}\n"
    )
    args = ["distill", "--print-config", "--config", str(path), "--seed", "4", "--set", "optimizer.eps=1e-6"]
    shown: dict[str, Any] = yaml.safe_load(invoke(*args).stdout)
    assert (shown["steps"], shown["seed"], shown["learning_rate"], shown["optimizer"]["eps"]) == (7, 4, 5e-6, 1e-6)
    assert shown["strategy"]["outlier"] == {"name": "clip", "floor": -3.0} and shown["student"] == "demo:student"
    (tmp_path / "again.yaml").write_text(invoke(*args).stdout)
    again = yaml.safe_load(invoke("distill", "--print-config", "--config", str(tmp_path / "again.yaml")).stdout)
    assert again == shown
    replaced = yaml.safe_load(invoke(*args, "--outlier", "mask").stdout)
    assert replaced["strategy"]["outlier"] == {"name": "mask"}


def test_dry_run_trains_and_writes_nothing(good: list[str], tmp_path: Path) -> None:
    result = invoke(*good, "--dry-run", "--json")
    estimate = json.loads(result.stdout)
    assert not (tmp_path / "run").exists()
    assert estimate["tokens_per_step"] == 4 * 2 * 12 and estimate["seconds_per_step"] > 0
    assert estimate["training_bytes"] == 3 * estimate["student_bytes"]
    for text in (
        "first prompt, student",
        "tokenizers agree on 61 tokens",
        "memory beside activations",
        "nothing was trained",
    ):
        assert text in result.stderr


def test_debug_shows_the_traceback(good: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from tropd_cli.errors import UserError

    monkeypatch.setenv("TROPD_DEBUG", "1")
    result = CliRunner().invoke(app, swap(good, "--data", "nothing.jsonl"))
    assert isinstance(result.exception, UserError)


def test_json_of_a_resumed_finished_run(good: list[str], tmp_path: Path) -> None:
    invoke(*good)
    assert json.loads(invoke("distill", "--resume", str(tmp_path / "run"), "--json").stdout)["step"] == 1


def test_help_and_refusals_import_no_torch() -> None:
    import subprocess
    import sys

    program = (
        "import sys, tropd_cli.main, tropd_cli.commands, tropd_cli.config; "
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
