"""Grading, result objects, tables and comparisons, against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest

from tropd_cli import comparison, grading, sandbox
from tropd_cli.errors import UserError
from tropd_cli.grading import Completion, Graded, grade, read_completions, summarize
from tropd_cli.verifiers import VERIFIERS

NUMBER = VERIFIERS.build("number")


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def row(identity: Any, completion: Any, answer: Any = "4", **more: Any) -> dict[str, Any]:
    return {"id": identity, "completion": completion, "answer": answer, **more}


def test_rows_become_graded_samples_in_order(tmp_path: Path) -> None:
    file = write(
        tmp_path / "out.jsonl",
        row(1, "#### 4"),
        row("a", "5", tokens=3, truncated=True),
        row(1, "none"),
        "",
        row(1, ""),
    )
    graded = [g.as_row() for g in grade(read_completions(file), NUMBER)]
    keys = "id sample completion extracted correct reason".split()
    assert [list(g) for g in graded] == [keys, [*keys, "tokens", "truncated"], keys, keys]
    assert [(g["id"], g["sample"], g["extracted"], g["correct"], g["reason"]) for g in graded] == [
        ("1", 0, "4", True, "equal"),
        ("a", 0, "5", False, "5 is not 4"),
        ("1", 1, None, False, "no answer found"),
        ("1", 2, None, False, "empty completion"),
    ]


def test_rows_without_a_reference_take_the_benchmarks(tmp_path: Path) -> None:
    file = write(tmp_path / "out.jsonl", {"id": "7", "completion": "4"}, {"id": "8", "completion": "4"})
    references = {"7": {"answer": "4"}, "8": {"answer": "5"}}
    assert [g.correct for g in grade(read_completions(file, references), NUMBER)] == [True, False]
    with pytest.raises(UserError, match="line 1: id '7' is none of the benchmark's 1 problems"):
        list(read_completions(file, {"8": {}}))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], 'has no completions. A row: {"id"'),
        ([row(1, "4"), {"id": 2}], "line 2: field 'completion' is missing; the row has id"),
        ([{"completion": "4"}], "line 1: field 'id' is missing"),
        ([row(1, 4)], "line 1: 'completion' is int; it must be text"),
        ([row(1, "4", sample=0), row(1, "5", sample=0)], "line 2: sample 0 of id '1' is no new number"),
        ([row(1, "4", sample="x")], "line 1: sample 'x'"),
        ([{"id": 1, "completion": "4"}], "line 1: field 'answer' is missing, the verifier needs it"),
        ([row(1, "4", "none")], "line 1: reference 'none' has no number"),
        (["{"], "line 1: no JSON"),
    ],
)
def test_bad_rows_are_named(rows: list[Any], message: str, tmp_path: Path) -> None:
    file = write(tmp_path / "out.jsonl", *rows)
    with pytest.raises(UserError, match=message):
        list(grade(read_completions(file), NUMBER))


def test_stdin_and_a_missing_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(row(1, "4")) + "\n"))
    assert [g.correct for g in grade(read_completions("-"), NUMBER)] == [True]
    with pytest.raises(UserError, match=r"no\.jsonl cannot be read"):
        list(read_completions("no.jsonl"))


def test_code_is_not_run_unless_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    code = VERIFIERS.build("code")
    grading.check_allowed(NUMBER, False)
    with pytest.raises(UserError, match=r"--allow-code-execution.*against faulty and ordinary hostile code"):
        grading.check_allowed(code, False)

    def unavailable() -> None:
        raise sandbox.SandboxUnavailable("no namespaces")

    monkeypatch.setattr(sandbox, "available", unavailable)
    with pytest.raises(sandbox.SandboxUnavailable, match="no namespaces"):
        grading.check_allowed(code, True)


@dataclasses.dataclass(frozen=True)
class Slow:
    """A verifier that runs code, as far as `grade` can see; the earlier, the slower."""

    fields = ("answer",)
    optional = ()
    executes_code = True

    def verify(self, completion: str, reference: Any) -> Any:
        import time

        from tropd_cli.verifiers import Verdict

        time.sleep(0.05 / (1 + int(completion)))
        return Verdict(completion == reference, completion, "")


def test_several_workers_keep_the_order_and_report_errors() -> None:
    rows = [Completion(str(i), 0, str(i), {"answer": str(i)}, f"line {i}") for i in range(30)]
    assert [g.id for g in grade(rows, Slow(), workers=3)] == [str(i) for i in range(30)]
    bad = [*rows[:3], Completion("x", 0, "x", {"answer": "x"}, "line 3")]
    with pytest.raises(UserError, match="line 3: invalid literal"):
        list(grade(bad, Slow(), workers=3))


def graded(identity: str, *verdicts: str) -> list[Graded]:
    """Samples of one problem: `+` correct, `-` no answer, any other letter a wrong answer."""
    return [
        Graded(identity, i, "text", {"+": "4", "-": None}.get(v, v), v == "+", "", tokens=10 * i, truncated=v == "-")
        for i, v in enumerate(verdicts)
    ]


def test_result_by_hand() -> None:
    samples = [*graded("a", *"++++"), *graded("b", *"+x-x"), *graded("c", *"--yz")]
    result = summarize(samples, benchmark="toy", model="m", sampling={"temperature": 1.0}, prompt_hash="abc")
    assert result["schema"] == "tropd-eval/1" and (result["benchmark"], result["model"]) == ("toy", "m")
    assert result["accuracy"] == round((1 + 0.25 + 0) / 3, 6)
    assert (result["problems"], result["samples"], result["samples_per_problem"]) == (3, 12, 4)
    # b has one correct of 4: pass@2 = 1 - C(3, 2) / C(4, 2) = 1/2; majority@4 of b: x wins 2 to 1
    assert result["pass_at_k"] == {"1": round(1.25 / 3, 6), "2": 0.5, "4": round(2 / 3, 6)}
    assert result["majority_at_k"]["4"] == round(1 / 3, 6) and result["majority_at_k"]["1"] == result["accuracy"]
    assert result["no_answer_share"] == result["truncated_share"] == 0.25
    assert result["mean_length"] == 15
    assert result["per_problem"]["b"] == {"correct": 1, "samples": 4}
    assert (result["sampling"], result["prompt_hash"]) == ({"temperature": 1.0}, "abc")
    low, high = result["ci95"]
    assert 0 <= low < result["accuracy"] < high <= 1
    json.dumps(result)


def test_result_of_uneven_samples_weighs_problems_equally() -> None:
    result = summarize([*graded("a", "+"), *graded("b", *"----")], benchmark="t", model="m", votes=False)
    assert result["accuracy"] == 0.5 and result["samples_per_problem"] is None and result["pass_at_k"] == {"1": 0.5}
    assert result["majority_at_k"] is None
    plain = summarize([Graded("a", 0, "4", "4", True, "equal")], benchmark="t", model="m")
    assert plain["truncated_share"] is None and plain["mean_length"] is None and plain["ci95"] == [0, 1]


def result(model: str, accuracy: float, benchmark: str = "gsm8k", **more: Any) -> dict[str, Any]:
    problems = 20
    right = round(accuracy * problems)
    samples = [s for i in range(problems) for s in graded(str(i), "+" if i < right else "x")]
    made = summarize(samples, benchmark=benchmark, model=model, sampling={"temperature": 0.6, "samples": 1})
    return made | {"prompt_hash": "p"} | more


def test_markdown_table_marks_the_best() -> None:
    results = [result("student", 0.25), result("tropd", 0.5), result("student", 0.1, "aime24")]
    text, warnings = comparison.table([*results, result("tropd", 0.05, "aime24")])
    assert warnings == []
    lines = text.splitlines()
    assert lines[:2] == ["| model | gsm8k | aime24 | avg |", "|---|---:|---:|---:|"]
    assert lines[2].startswith("| student | 25.00 [") and "**10.00** [" in lines[2] and lines[2].endswith("| 17.50 |")
    assert lines[3].startswith("| tropd | **50.00** [") and lines[3].endswith("| **27.50** |")


def test_table_does_not_rank_what_was_not_made_alike() -> None:
    hot = result("tropd", 0.5, sampling={"temperature": 1.0, "samples": 32})
    text, warnings = comparison.table([result("student", 0.25), hot])
    assert "**" not in text
    assert warnings == ["gsm8k: not made alike, so no best is marked (temperature: 0.6 and 1.0)"]
    more_samples = result("tropd", 0.5, sampling={"temperature": 0.6, "samples": 32})
    assert comparison.table([result("student", 0.25), more_samples])[1] == []
    other_prompts = comparison.table([result("student", 0.25), result("tropd", 0.5, prompt_hash="q")])
    assert "prompts: p and q" in other_prompts[1][0]


def test_table_with_gaps_repeats_and_plain_style() -> None:
    text, _ = comparison.table([result("m", 0.5), result("m", 0.25), result("n", 0.5, "aime24")], "plain")
    lines = text.splitlines()
    assert lines[0].split() == ["model", "gsm8k", "aime24", "avg"] and "**" not in text
    assert lines[2].startswith("m (2)") and lines[3].split()[:2] == ["n", "50.00"]
    with pytest.raises(UserError, match="'latex' is none of: markdown, plain"):
        comparison.table([], "latex")


def test_comparison_of_two_results() -> None:
    found = comparison.compare(result("a", 0.25), result("b", 0.75))
    assert found["difference"] == 0.5 and found["probability"] > 0.99 and found["differs"] == []
    assert found["ci95"][0] > 0.2 and found["problems"] == 20 and found["models"] == ["a", "b"]
    unlike = comparison.compare(result("a", 0.25), result("b", 0.75, sampling=None))
    assert unlike["differs"] == ["temperature: 0.6 and None"]
    with pytest.raises(UserError, match="different benchmarks cannot be compared: benchmark: gsm8k and aime24"):
        comparison.compare(result("a", 0.25), result("b", 0.75, "aime24"))
    with pytest.raises(UserError, match="no problem in common"):
        comparison.compare(result("a", 0.25), result("b", 0.5) | {"per_problem": {"z": {"correct": 1, "samples": 1}}})


def test_results_are_read_from_json_and_json_lines(tmp_path: Path) -> None:
    pretty = tmp_path / "a.json"
    pretty.write_text(json.dumps(result("a", 0.25), indent=2))
    lines = write(tmp_path / "b.jsonl", result("b", 0.5), result("b", 0.5, "aime24"))
    assert [r["model"] for r in comparison.load_results([str(pretty), lines])] == ["a", "b", "b"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no results. Make some with"),
        ([{"accuracy": 1}], "schema None is not 'tropd-eval/1'"),
        ([{"schema": "tropd-eval/1", "benchmark": "b"}], "without model, accuracy"),
    ],
)
def test_files_that_hold_no_results(rows: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        comparison.load_results([write(tmp_path / "x.jsonl", *rows)])
    with pytest.raises(UserError, match="cannot be read"):
        comparison.load_results([str(tmp_path / "missing.json")])
