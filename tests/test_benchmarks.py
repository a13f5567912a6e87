"""Benchmark files, local data in place of the hub, and every way in which they can be wrong."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import pickle
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import pytest

from tropd_cli import benchmarks
from tropd_cli.errors import UserError
from tropd_cli.verifiers import VERIFIERS

EXPECTED = "aime24 aime25 amc23 demo gpqa-diamond gsm8k humaneval ifbench livecodebench-v6 math500 mmlu-redux".split()


def jsonl(path: Path, *rows: Any) -> str:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return str(path)


def test_every_built_in_benchmark_has_a_valid_file_and_a_known_verifier() -> None:
    assert benchmarks.names() == EXPECTED
    for name in EXPECTED:
        spec = benchmarks.load(name).spec
        verifier = VERIFIERS.get(spec.verifier if isinstance(spec.verifier, str) else spec.verifier["name"])
        provided = {*spec.fields, *(["answer"] if spec.choices else []), *(["tests"] if spec.decode else [])}
        assert set(verifier.fields) <= provided, name
        assert spec.hub or spec.builtin


ROWS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "gsm8k": ({"question": "1+1?", "answer": "1+1=2\n#### 2"}, "1+1?\n\nPlease reason", {"answer": "1+1=2\n#### 2"}),
    "math500": ({"unique_id": "a/1", "problem": "x?", "answer": "\\frac12"}, "x?", {"answer": "\\frac12"}),
    "aime24": ({"id": 60, "problem": "x?", "solution": "\\boxed{204}"}, "x?", {"answer": "\\boxed{204}"}),
    "aime25": ({"id": "0", "problem": "x?", "answer": "70"}, "within \\boxed{}.", {"answer": "70"}),
    "amc23": ({"id": 0, "question": "x?", "answer": 27.0}, "x?", {"answer": 27.0}),
    "mmlu-redux": (
        {"question": "x?", "choices": ["p", "q"], "answer": 1, "error_type": "ok"},
        "x?\n\nA. p\nB. q",
        {"answer": "B"},
    ),
    "humaneval": (
        {"task_id": "H/0", "prompt": "def f():\n", "test": "assert f()", "entry_point": "f", "canonical_solution": ""},
        "```python\ndef f():\n```",
        {"starter": "def f():\n", "tests": "assert f()", "entry_point": "f"},
    ),
    "ifbench": (
        {"key": "1", "prompt": "Say {x}.", "instruction_id_list": ["a"], "kwargs": [{}]},
        "Say {x}.",
        {"prompt": "Say {x}.", "instruction_id_list": ["a"], "kwargs": [{}]},
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_become_prompts_and_references(name: str, tmp_path: Path) -> None:
    row, part, reference = ROWS[name]
    problems = benchmarks.load(f"{name}={jsonl(tmp_path / 'rows.jsonl', row)}").problems()
    assert len(problems) == 1 and part in problems[0].prompt and problems[0].reference == reference
    assert problems[0].id == str(row.get("id", row.get("unique_id", row.get("task_id", row.get("key", 0)))))


def test_rows_whose_annotation_is_wrong_are_left_out(tmp_path: Path) -> None:
    good = {"question": "x?", "choices": ["p", "q"], "answer": 0, "error_type": "ok"}
    file = jsonl(tmp_path / "rows.jsonl", good | {"error_type": "wrong_groundtruth"}, good)
    (problem,) = benchmarks.load(f"mmlu-redux={file}").problems()
    assert problem.id == "0" and problem.reference == {"answer": "A"}


def test_options_are_shuffled_the_same_way_every_time_and_the_answer_follows(tmp_path: Path) -> None:
    rows = [
        {"Record ID": str(i), "Question": f"q{i}", "Correct Answer": f"right {i}\n"}
        | {f"Incorrect Answer {k}": f"wrong {k} {i}" for k in (1, 2, 3)}
        for i in range(40)
    ]
    file = jsonl(tmp_path / "rows.jsonl.gz", *rows)
    problems = benchmarks.load(f"gpqa-diamond={file}").problems()
    for i, problem in enumerate(problems):
        assert f"{problem.reference['answer']}. right {i}" in problem.prompt.splitlines()
    assert problems == benchmarks.load(f"gpqa-diamond={file}").problems()
    assert {problem.reference["answer"] for problem in problems} == set("ABCD")


def livecodebench_row(private: str, function: str | None = None) -> dict[str, Any]:
    return {
        "question_id": "q1",
        "question_content": "Add.",
        "starter_code": "class Solution:" if function else "",
        "public_test_cases": json.dumps([{"input": "1 2", "output": "3", "testtype": "stdin"}]),
        "private_test_cases": private,
        "metadata": json.dumps({"func_name": function} if function else {}),
    }


def test_livecodebench_tests_are_decoded_without_running_anything(tmp_path: Path) -> None:
    more = json.dumps([{"input": "3 4", "output": "7", "testtype": "stdin"}])
    packed = base64.b64encode(zlib.compress(pickle.dumps(more))).decode()
    for private in (more, packed):
        file = jsonl(tmp_path / "rows.jsonl", livecodebench_row(private))
        (problem,) = benchmarks.load(f"livecodebench-v6={file}").problems()
        assert problem.reference["tests"] == {"inputs": ["1 2", "3 4"], "outputs": ["3", "7"]}
        assert "reads from stdin" in problem.prompt
    file = jsonl(tmp_path / "rows.jsonl", livecodebench_row(more, "add"))
    (problem,) = benchmarks.load(f"livecodebench-v6={file}").problems()
    assert problem.reference["tests"]["fn_name"] == "add" and "class Solution:" in problem.prompt

    class Bomb:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    evil = base64.b64encode(zlib.compress(pickle.dumps(Bomb()))).decode()
    with pytest.raises(UserError, match=r"line 1: private_test_cases cannot be decoded: it contains \w+.system"):
        benchmarks.load(f"livecodebench-v6={jsonl(tmp_path / 'rows.jsonl', livecodebench_row(evil))}").problems()
    assert not (tmp_path / "ran").exists()


def test_demo_is_built_in_and_limited() -> None:
    problems = benchmarks.load("demo").problems(limit=5)
    verifier = VERIFIERS.build("demo")
    assert len(problems) == 5 and problems == benchmarks.load("demo").problems()[:5]
    assert verifier.verify(f"The answer is {problems[0].reference['answer']}.", problems[0].reference["answer"]).correct


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text(
        "title: Mine\nfields: {question: q, answer: a | b}\nprompt: 'Q: {question} {other}'\nverifier: exact\n"
    )
    file = jsonl(tmp_path / "rows.jsonl", {"q": "1?", "b": "2"}, "", {"q": "3?", "a": "4", "b": "5"})
    one, other = benchmarks.load(f"{own}={file}").problems()
    assert (one.prompt, one.reference, other.reference) == ("Q: 1? {other}", {"answer": "2"}, {"answer": "4"})
    with pytest.raises(UserError, match="names no data set: give a file"):
        benchmarks.load(str(own)).problems()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("titel: x\nfields: {}\nprompt: p\nverifier: exact", "Did you mean 'title'"),
        ("title: x\nfields: {}\nprompt: p", "key 'verifier': field required"),
        ("title: [", "is no YAML"),
        ("title: x\nfields: {}\nprompt: p\nverifier: exact\ndecode: zip", "decode 'zip' is none of livecodebench"),
        ("title: x\nfields: {}\nprompt: p\nverifier: exact\nsampling: {samples: 0}", "key 'sampling.samples'"),
    ],
)
def test_a_bad_yaml_file(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        benchmarks.load(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], "rows.jsonl line 1: no JSON"),
        (["[1]"], "line 1: not an object but list"),
        (
            [{"question": "a", "answer": "1"}, {"question": "b"}],
            "line 2: field 'answer' is missing; the row has question",
        ),
        ([], "benchmark 'gsm8k' has no problems in"),
    ],
)
def test_bad_rows_are_named(rows: list[Any], message: str, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(UserError, match=message):
        benchmarks.load(f"gsm8k={file}").problems()


def test_an_id_used_twice_is_refused(tmp_path: Path) -> None:
    row = {"id": 1, "problem": "x?", "answer": "1"}
    with pytest.raises(UserError, match="line 2: the id '1' is used twice"):
        benchmarks.load(f"aime24={jsonl(tmp_path / 'rows.jsonl', row, row)}").problems()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gsm9k", "unknown benchmark 'gsm9k'. Did you mean 'gsm8k'"),
        ("gsm8k=/no/such/file", "file '/no/such/file' of benchmark 'gsm8k' does not exist"),
        ("no.yaml", "benchmark file 'no.yaml' does not exist"),
        ("demo,demo", "names demo twice"),
        (",", "names no benchmark"),
    ],
)
def test_bad_names(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        benchmarks.load_all(text)


def test_stdin_in_place_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('{"question": "1?", "answer": "1"}\n{"question": "2?"}\n'))
    with pytest.raises(UserError, match="stdin line 2: field 'answer' is missing"):
        benchmarks.load("gsm8k=-").problems()


def hub(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    module = types.ModuleType("datasets")
    module.load_dataset = load  # type: ignore[attr-defined]
    module.get_dataset_config_names = lambda path, revision: ["b", "a"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_the_hub_is_asked_for_what_the_file_says(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*args: Any, **named: Any) -> list[dict[str, Any]]:
        asked.append((args, named))
        return [{"question": "x?", "choices": ["p"], "answer": 0, "error_type": "ok"}]

    hub(monkeypatch, load)
    assert [p.id for p in benchmarks.load("mmlu-redux").problems()] == ["0", "1"]
    assert [args[1] for args, _ in asked] == ["a", "b"]
    assert all("trust_remote_code" not in named for _, named in asked)


def test_without_network_or_library_the_error_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub\nmore")

    hub(monkeypatch, load)
    with pytest.raises(UserError, match=r"Couldn't reach 'openai/gsm8k' on the Hub\).*--benchmark gsm8k=FILE.jsonl"):
        benchmarks.load("gsm8k").problems()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'tropd\[data\]'"):
        benchmarks.load("gsm8k").problems()


def test_prompt_hash_changes_with_prompts_and_order() -> None:
    one, other = benchmarks.Problem("1", "p", {"answer": 1}), benchmarks.Problem("2", "q", {"answer": 2})
    assert benchmarks.prompt_hash([one, other]) == benchmarks.prompt_hash([one, other])
    assert benchmarks.prompt_hash([one, other]) != benchmarks.prompt_hash([other, one])
    assert benchmarks.prompt_hash([one]) == "c31c28ac63f4"  # fixed, so that old results stay comparable
