"""`tropd inspect-regions` with models: its numbers equal transformers' full logits and a run's own recording."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from tropd_cli import inspected_models, launch
from tropd_cli.config import Config
from tropd_cli.data import PromptFormat, prompts_of_step
from tropd_cli.demo import STUDENT, TEACHER
from tropd_cli.inspected_models import ModelInspector
from tropd_cli.inspected_strategies import asked_strategies
from tropd_cli.main import app
from tropd_cli.models import LanguageModel, Vocabulary
from tropd_cli.pair import Pair
from tropd_cli.report.text import visible_tokens
from tropd_cli.scoring import CHUNK_BYTES

from .memory import allocations
from .test_distill import arguments, invoke
from .tiny import tiny_tokenizer

HOSTILE = "<script>alert(1)</script></style>\x1b[31mred\x1b[0m \u202eabc \U0001f600é &amp;\n\t\u2028end"
Rows = list[dict[str, Any]]


def inspect(*args: str, code: int = 0, text: str | None = None) -> Any:
    result = CliRunner().invoke(app, ["inspect-regions", *map(str, args)], input=text)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.stderr
    return result


def rows_of(text: str) -> Rows:
    return [json.loads(line) for line in text.splitlines()]


def models(pair: dict[str, Path]) -> list[str]:
    return ["--student", str(pair["student"]), "--teacher", str(pair["teacher"])]


@pytest.fixture(scope="module", name="run")
def recorded_run(tiny_pair: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps without guidance, every token of them recorded."""
    path = tmp_path_factory.mktemp("runs") / "run"
    options = {"record__every": 1, "record__sequences": 8, "guidance__enabled": False, "probe_rollouts": 0}
    invoke(*arguments(tiny_pair, path, steps=2, seed=3, **options))
    return path


# ── the numbers ─────────────────────────────────────────────────────────────────────────────────────────────────────


def largest_differences(rows: Rows, student: Path, teacher: Path) -> dict[str, float]:
    """Of rows from transformers' own full logits, model by model."""
    tokenizer = AutoTokenizer.from_pretrained(student)
    gaps: dict[str, float] = {}
    logprobs: dict[str, dict[int, torch.Tensor]] = {}
    sequences = sorted({row["sequence"] for row in rows})
    of = {index: [row for row in rows if row["sequence"] == index] for index in sequences}
    for role, path in (("student", student), ("teacher", teacher)):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        logprobs[role] = {}
        for index, part in of.items():
            prompt = tokenizer(part[0]["prompt"])["input_ids"]
            ids = torch.tensor([prompt + [row["token_id"] for row in part]])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
            logprobs[role][index] = logits.log_softmax(-1)

    def note(name: str, ours: float, theirs: torch.Tensor) -> None:
        gaps[name] = max(gaps.get(name, 0.0), abs(ours - float(theirs)))

    for index, part in of.items():
        for place, row in enumerate(part):
            p, q = logprobs["teacher"][index][place], logprobs["student"][index][place]
            token = row["token_id"]
            note("student_logprob", row["student_logprob"], q[token])
            note("teacher_logprob", row["teacher_logprob"], p[token])
            note("p_trust", row["p_trust"], (p[token] - q[token]).clamp_max(0).exp())
            note("student_entropy", row["student_entropy"], -(q.exp() * q).sum())
            note("teacher_entropy", row["teacher_entropy"], -(p.exp() * p).sum())
            note("first choice", row["teacher_top_k"][0]["teacher_logprob"], p.max())
            note("student on it", row["teacher_top_k"][0]["student_logprob"], q[int(p.argmax())])
            if row["teacher_rank"] == 0:
                note("rank 0", float(p[token]), p.max())
    return gaps


def test_numbers_equal_transformers_full_logits_on_the_demo_pair() -> None:
    result = inspect("--prompts", "3", "--format", "jsonl")
    rows = rows_of(result.stdout)
    assert {row["sequence"] for row in rows} == {0, 1, 2} and "built-in demo" in result.stderr
    gaps = largest_differences(rows, STUDENT, TEACHER)
    assert max(gaps.values()) < 1e-4, gaps
    assert all(row["region"] == ("trust" if row["uniform"] < row["p_trust"] else "outlier") for row in rows)
    assert {row["finish"] for row in rows if "finish" in row} <= {"eos", "length"}


@pytest.mark.real
def test_numbers_equal_transformers_full_logits_on_a_real_pair(tmp_path: Path) -> None:
    student, teacher = (Path(os.environ[f"TROPD_REAL_{role}"]) for role in ("STUDENT", "TEACHER"))
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "The capital of France is"}\n{"prompt": "To bake bread, first"}\n')
    pair = models({"student": student, "teacher": teacher})
    rows = rows_of(inspect(*pair, "--data", data, "--max-response-length", "40", "--format", "jsonl").stdout)
    gaps = largest_differences(rows, student, teacher)
    print(f"{len(rows)} tokens", {name: f"{gap:.2e}" for name, gap in gaps.items()})
    assert max(gaps.values()) < 1e-4, gaps


def test_teacher_equal_to_student_is_seen_and_said(tiny_pair: dict[str, Path]) -> None:
    same = models(tiny_pair | {"teacher": tiny_pair["student"]})
    short = [
        *same,
        "--data",
        tiny_pair["data"],
        "--max-response-length",
        "16",
        "--max-prompt-length",
        "16",
        "--prompts",
        "4",
    ]
    rows = rows_of(inspect(*short, "--format", "jsonl").stdout)
    assert min(row["p_trust"] for row in rows) > 1 - 1e-4 and {row["region"] for row in rows} == {"trust"}
    summary = json.loads(inspect(*short, "--summary").stdout)
    assert summary["acceptance"] > 1 - 1e-4
    assert any("same model" in line for line in summary["advice"])


def test_models_at_the_first_key_give_what_the_run_recorded(run: Path, tiny_pair: dict[str, Path]) -> None:
    lines = tiny_pair["data"].read_text().splitlines()
    order = prompts_of_step(len(lines), 4, 0, seed=3)
    text = "".join(lines[index] + "\n" for index in order)
    ours = rows_of(inspect("--config", run / "config.yaml", "--data", "-", "--format", "jsonl", text=text).stdout)
    recorded = rows_of((run / "rollouts" / "step-000001.jsonl").read_text())
    assert len(ours) == len(recorded) > 50 and {row["region"] for row in ours} == {"trust", "outlier"}
    for mine, theirs in zip(ours, recorded, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            if name == "teacher_top_k":
                assert [c["token"] for c in mine[name]] == [c["token"] for c in theirs[name]]
            elif isinstance(mine[name], float) and name != "uniform":
                assert mine[name] == pytest.approx(theirs[name], abs=1e-5, rel=1e-4), name
            else:
                assert mine[name] == theirs[name], name


def test_twenty_thousand_tokens_never_hold_more_than_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 64 * 2**20)  # so that the bound below is far under the logits
    vocabulary, length, texts = 16_000, 1000, 20
    tokenizer = tiny_tokenizer(vocabulary)

    def small(seed: int) -> LanguageModel:
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=1024, tie_word_embeddings=True,
        )  # fmt: skip
        return LanguageModel(Qwen2ForCausalLM(config), f"small-{seed}", vocabulary, GenerationConfig(eos_token_id=1))

    allowed = torch.ones(vocabulary, dtype=torch.bool)
    pair = Pair(
        small(0), small(1), None, tokenizer, Vocabulary(allowed, (1,), 0), PromptFormat(tokenizer, tokenizer, 16),
        torch.device("cpu"), torch.float32,
    )  # fmt: skip
    monkeypatch.setattr(inspected_models, "load_pair", lambda *_: pair)
    words = [f"w{i}" for i in range(3, 3 + length)]
    data = tmp_path / "texts.jsonl"
    data.write_text((json.dumps({"prompt": "w1 w2", "response": " ".join(words)}) + "\n") * texts)
    asked = asked_strategies(None, [], outlier=None, assignments=[], plugins=[])
    counts: dict[str, int] = {}

    def look() -> list[int]:
        inspector = ModelInspector(
            Config(data=str(data)), asked, most_prompts=None, accelerator=Accelerator(cpu=True), warn=print
        )
        counts["tokens"] = sum(1 for _ in inspector.rows())
        return []

    held = allocations(look)
    assert counts["tokens"] == 20_000
    weights = {p.numel() * 4 for p in pair.student.model.parameters()}
    assert held.largest(apart_from=weights) <= CHUNK_BYTES["cpu"]
    assert held.peak < 6 * CHUNK_BYTES["cpu"] < 20_000 * vocabulary * 4 / 3  # less than a third of one [N, V] tensor


# ── texts and data ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_given_texts_are_scored_as_they_are() -> None:
    lines = [{"prompt": "What is 1+1?\n", "response": HOSTILE}, {"prompt": "What is 2+2?\n"}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    demo = ["--student", "demo:student", "--teacher", "demo:teacher", "--data", "-", "--max-prompt-length", "64"]
    result = inspect(*demo, "--max-response-length", "12", "--samples", "2", "--format", "jsonl", text=text)
    assert "Given texts count as the student's own" in result.stderr
    assert result.stdout.isascii() and "\x1b" not in result.stdout and "\x7f" not in result.stdout
    rows = rows_of(result.stdout)
    given = [row for row in rows if row["sequence"] == 0]
    assert given[-1]["finish"] == "given" and {row["sequence"] for row in rows} == {0, 1, 2}
    assert any(row["token"].startswith("<0x") for row in given)
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    assert tokenizer.decode([row["token_id"] for row in given]) == HOSTILE
    shown = "".join(visible_tokens([row["token"] for row in given]))
    assert "<script>alert(1)</script></style>⟨ESC⟩[31mred" in shown and "\U0001f600" in shown
    page = inspect(*demo, "--max-response-length", "12", "--prompts", "1", "--format", "html", text=text).stdout
    assert "<script>alert" not in page and "\x1b" not in page and "\u202e" not in page


def test_texts_that_do_not_fit_are_refused(tiny_pair: dict[str, Path]) -> None:
    small = [*models(tiny_pair), "--data", "-", "--max-prompt-length", "16", "--max-response-length", "16"]
    empty = inspect(*small, text='{"prompt": "w1", "response": ""}\n', code=1)
    assert "row 1: `response` is empty" in empty.stderr
    long = json.dumps({"prompt": "w1", "response": "w1 " * 300}) + "\n"
    assert "have 301 tokens" in inspect(*small, text=long, code=1).stderr
    assert "--teacher and --data missing" in inspect("--student", "demo:student", code=1).stderr
    broken = inspect(*small, text='{"prompt": "w1"\n', code=1).stderr
    assert "standard input, line 1: not JSON" in broken and "Traceback" not in broken


def test_several_strategies_see_the_same_tokens(tiny_pair: dict[str, Path]) -> None:
    short = ["--max-prompt-length", "16", "--max-response-length", "8", "--data", tiny_pair["data"], "--prompts", "3"]
    soft = "{name: trust-region, region_rule: soft, outlier: mask}"
    names = ["trust-region", "reopold", "gkd", "entropy", soft]
    asked = [part for name in names for part in ("--strategy", name)]
    result = inspect(*models(tiny_pair), *short, *asked, "--outlier", "clip", "--format", "jsonl")
    assert "entropy looks across a batch: its quantiles and baselines are those of the 3 sequences" in result.stderr
    by_strategy: dict[str, Rows] = {}
    for row in rows_of(result.stdout):
        by_strategy.setdefault(row["strategy"], []).append(row)
    labels = ["trust-region (region_rule acceptance)", "reopold", "gkd", "entropy", "trust-region (region_rule soft)"]
    assert list(by_strategy) == labels
    tokens = [
        [(r["sequence"], r["position"], r["token_id"], r["p_trust"]) for r in rows] for rows in by_strategy.values()
    ]
    assert all(part == tokens[0] for part in tokens)
    hard, floored, full, _, blended = by_strategy.values()
    assert all(row["credit_top_k_mass"] != 0 for row in full)
    for one, two, three in zip(hard, floored, blended, strict=True):
        ratio = one["teacher_logprob"] - one["student_logprob"]
        assert two["credit"] == pytest.approx(max(ratio, math.log(0.2) / 0.8), rel=1e-4)
        weight = 1 - three["p_trust"]
        assert three.get("outlier_weight", weight) == pytest.approx(weight, abs=1e-5)
        assert one["region"] == three["region"]


def test_a_rate_of_samples_and_a_seed(tiny_pair: dict[str, Path]) -> None:
    short = [*models(tiny_pair), "--max-prompt-length", "16", "--max-response-length", "8", "--data", tiny_pair["data"]]
    runs = [
        rows_of(inspect(*short, "--prompts", "1", "--samples", "2", "--top-k", "3", *more, "--format", "jsonl").stdout)
        for more in ((), ("--seed", "0"), ("--seed", "1"))
    ]
    assert runs[0] == runs[1] and [r["uniform"] for r in runs[0]][:8] != [r["uniform"] for r in runs[2]][:8]
    assert {row["sequence"] for row in runs[0]} == {0, 1}
    assert all(len(row["teacher_top_k"]) == 3 for row in runs[0])


# ── many processes ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_workers_are_started_for_models_and_for_nothing_else(
    tiny_pair: dict[str, Path], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they then make is compared in tests/test_processes.py."""
    started: list[int] = []
    monkeypatch.setattr(launch, "launch", lambda count, *_, **__: started.append(count) or 7)
    on_data = [*models(tiny_pair), "--data", tiny_pair["data"]]
    inspect(*on_data, "--num-processes", "2", code=7)
    inspect(*on_data, "--set", "num_processes=3", code=7)
    assert started == [2, 3]
    (tmp_path / "trained.yaml").write_text("num_processes: 4\nshard: full\nlog_with: [tensorboard]\n")
    short = ["--max-prompt-length", "16", "--max-response-length", "4", "--prompts", "1"]
    inspect(*on_data, *short, "--config", tmp_path / "trained.yaml")
    assert "they share none" in inspect(*models(tiny_pair), "--data", "-", "--num-processes", "2", code=1).stderr
    assert "--num-processes does not apply. Leave it out" in inspect(run, "--num-processes", "2", code=1).stderr
    assert "'num_processes' is 0" in inspect(*on_data, "--num-processes", "0", code=1).stderr
    assert "unknown strategy" in inspect(*on_data, "--num-processes", "2", "--strategy", "nope", code=1).stderr
    assert started == [2, 3]


def test_of_several_processes_the_first_one_shows_a_recording(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, shown in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        result = inspect(run, "--summary")
        assert bool(result.stdout) == shown and not result.stderr
