"""Verifiers against a table of answer forms, and what each does at its edges."""

from __future__ import annotations

import json
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest

from strategies.registry import RegistryError
from tropd_cli import sandbox
from tropd_cli.errors import UserError
from tropd_cli.verifiers import VERIFIERS, Verdict, mathematics, reference_of
from tropd_cli.verifiers.answers import last_announced, last_box
from tropd_cli.verifiers.code import assemble, code_in

TABLE = Path(__file__).parent / "data" / "answer_forms.txt"


def rows() -> list[tuple[str, str, str, bool]]:
    found = []
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("# "):
            name, *middle, sign = line.split(" | ")
            completion, reference = (part.replace("⏎", "\n").replace("<nbsp>", "\u00a0") for part in middle)
            found.append((name, completion, reference, sign == "+"))
    return found


def test_the_table_has_two_hundred_forms() -> None:
    assert len(rows()) >= 200


@pytest.mark.parametrize("name", ["number", "choice", "exact", "demo"])
def test_answer_forms(name: str) -> None:
    check(name)


def test_answer_forms_of_mathematics() -> None:
    pytest.importorskip("math_verify")
    check("math")


def check(name: str) -> None:
    verifier = VERIFIERS.build(name)
    mine = [row for row in rows() if row[0] == name]
    wrong = [(*row, verdict) for row in mine if (verdict := verifier.verify(row[1], row[2])).correct is not row[3]]
    assert mine and not wrong


def test_verdicts_carry_what_was_extracted_and_why() -> None:
    assert VERIFIERS.build("number").verify("It is $1,200.", "12") == Verdict(False, "$1,200", "$1,200 is not 12")
    assert VERIFIERS.build("choice").verify("Answer: B", 2) == Verdict(False, "B", "B is not C")
    assert VERIFIERS.build("exact").verify("rome", ["Roma", "Rome"]).reason == "not 'Roma' or 'Rome'"
    assert VERIFIERS.build({"name": "exact", "ignore_case": True}).verify("rome", ["Roma", "Rome"]).correct
    assert VERIFIERS.build("number").verify("", "12") == Verdict(False, None, "empty completion")
    assert VERIFIERS.build("number").verify("none", "12") == Verdict(False, None, "no answer found")


@pytest.mark.parametrize(("name", "reference"), [("number", "none"), ("choice", "Z"), ("choice", "12"), ("choice", "")])
def test_a_reference_that_cannot_be_met_is_an_error_not_a_wrong_answer(name: str, reference: str) -> None:
    with pytest.raises(ValueError, match="reference"):
        VERIFIERS.build(name).verify("1", reference)


def test_boxes_and_announcements() -> None:
    assert last_box(r"\boxed{\frac{1}{2}} \boxed{a\}b}") == r"a\}b"
    assert last_box(r"\boxed{1} \boxed{2") == "1" and last_box(r"\boxed{ }") is None
    assert last_announced("The answer to the problem is **$x^2$**. Bye.") == "x^2"
    assert last_announced("the answer is $3.5$ m. It is long") == "3.5"
    assert last_announced("no") is None


def test_registry_suggests_and_checks_options() -> None:
    with pytest.raises(RegistryError, match="Did you mean 'number'"):
        VERIFIERS.build("nubmer")
    with pytest.raises(RegistryError, match="seconds"):
        VERIFIERS.build({"name": "code", "cpu_seconds": -1.0})
    assert VERIFIERS.names() == ["choice", "code", "demo", "exact", "ifbench", "math", "number"]


def test_reference_is_a_value_or_a_dict() -> None:
    assert reference_of(VERIFIERS.build("number"), {"answer": 3, "id": 1}) == 3
    row = {"tests": "t", "entry_point": None, "starter": "s", "answer": 1}
    assert reference_of(VERIFIERS.build("code"), row) == {"tests": "t", "starter": "s"}
    with pytest.raises(KeyError, match="tests"):
        reference_of(VERIFIERS.build("code"), {"answer": 1})


# math-verify in its process


def test_math_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mathematics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'tropd\[eval\]'"):
        VERIFIERS.build("math")


def test_math_survives_answers_that_hang_and_works_in_threads() -> None:
    pytest.importorskip("math_verify")
    verifier = VERIFIERS.build({"name": "math", "seconds": 1.0})
    hung = verifier.verify(r"\boxed{9^{9^{9^9}}}", "5")
    assert not hung.correct and "longer than 1 s" in hung.reason
    answers: list[Verdict] = []
    patient = VERIFIERS.build("math")
    threads = [threading.Thread(target=lambda: answers.append(patient.verify(r"\boxed{1/2}", "0.5"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [verdict.correct for verdict in answers] == [True] * 4


def test_math_refuses_a_reference_without_expression_and_endless_answers() -> None:
    pytest.importorskip("math_verify")
    verifier = VERIFIERS.build({"name": "math", "seconds": 2.0})
    with pytest.raises(ValueError, match="reference ''"):
        verifier.verify("5", "")
    assert verifier.verify(r"\boxed{" + "(" * 3000 + "}", "5").reason == "the answer has 3000 characters"
    assert not verifier.verify(r"\boxed{" + "{" * 900 + "}" * 900 + "}", "5").correct


# code


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("    return 1", "    return 1"),
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```python\ndef f(): pass\n```\n```python\nf()\n```", "def f(): pass\n"),
        ("```\na\n```\n```bash\nls\n```", "a\n"),
        ("```python\nx = 1", "x = 1"),
        ("```bash\nls\n```", "```bash\nls\n```"),
    ],
)
def test_code_in_a_completion(completion: str, code: str) -> None:
    assert code_in(completion, "f") == code


def test_starter_is_continued_or_put_before() -> None:
    starter = "from typing import List\ndef f(x: List):\n    '''Doc.'''\n"
    assert assemble("    return x", starter, "f") == starter + "    return x"
    assert assemble("def f(x):\n    return x", starter, "f") == starter + "\ndef f(x):\n    return x"


@pytest.fixture
def code() -> Any:
    try:
        sandbox.available()
    except sandbox.SandboxUnavailable as error:
        pytest.skip(str(error))
    return VERIFIERS.build("code")


def test_code_with_tests_in_each_form(code: Any) -> None:
    add = "```python\ndef add(a, b):\n    return a + b\n```"
    assert code.verify(add, "assert add(1, 2) == 3").correct
    assert code.verify(add, {"tests": ["assert add(1, 2) == 3", "assert add(1, 2) == 3"]}).reason == "passed, 2 calls"
    function = {"inputs": ["1\n2", "[1]\n[2]"], "outputs": ["3", "[1, 2]"], "fn_name": "add", "in_class": False}
    assert code.verify(add, {"tests": function}).correct
    method = "class Solution:\n    def add(self, a, b):\n        return (a, b)"
    verdict = code.verify(method, {"tests": json.dumps({"inputs": ["1\n2"], "outputs": ["[1, 3]"], "fn_name": "add"})})
    assert not verdict.correct and verdict.reason.startswith("AssertionError: case 1: (1, 2) is not [1, 3]")
    program = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}
    assert code.verify("print(sum(map(int, input().split())))", {"tests": program}).reason == "passed, 2 cases"
    assert not code.verify("", {"tests": program}).correct


def test_human_eval_style(code: Any) -> None:
    starter = "def half(x):\n    '''Half of an even number.'''\n"
    tests = "def check(candidate):\n    assert candidate(4) == 2\n    assert candidate(0) == 0"
    reference = {"tests": tests, "entry_point": "half", "starter": starter}
    assert code.verify("    return x // 2\n\nprint('more text", reference).correct
    assert code.verify("Sure!\n```python\ndef half(x):\n    return x // 2\n```", reference).correct
    assert not code.verify(starter, reference).correct
    assert not code.verify("    return x", reference).correct
    other = code.verify("```python\ndef other(x): return 1\n```", reference)
    assert not other.correct


@pytest.mark.parametrize(
    "tests",
    [
        {"inputs": [], "outputs": []},
        {"inputs": ["1"], "outputs": []},
        {"inputs": ["1"], "outputs": ["1"], "fn_name": "a b"},
    ],
)
def test_code_refuses_tests_that_test_nothing(code: Any, tests: Any) -> None:
    with pytest.raises(ValueError):
        code.verify("x = 1", {"tests": tests})


# ifbench, with a stand-in for the library


def test_ifbench_names_the_commands_where_the_checkers_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(UserError, match=r"pip install --no-deps lighteval.*nltk.downloader"):
        VERIFIERS.build("ifbench")


@pytest.fixture
def checkers(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A library with one instruction, `words`, that needs at least `n` words, and one that needs NLTK's data."""
    library = types.ModuleType("evaluation_lib")

    def check(example: Any, responses: dict[str, str]) -> Any:
        if "data" in example.instruction_id_list:
            raise LookupError("punkt_tab")
        text = responses[example.prompt]
        return types.SimpleNamespace(follow_instruction_list=[len(text.split()) >= o["n"] for o in example.kwargs])

    library.InputExample = lambda key, ids, prompt, kwargs: types.SimpleNamespace(  # type: ignore[attr-defined]
        instruction_id_list=ids, prompt=prompt, kwargs=kwargs
    )
    library.instructions_registry = types.SimpleNamespace(INSTRUCTION_DICT={"words": 1, "data": 2})  # type: ignore
    library.test_instruction_following_loose = check  # type: ignore[attr-defined]
    modules = {
        "nltk": types.SimpleNamespace(download=lambda *_: pytest.fail("downloads")),
        "lighteval.tasks.tasks.ifbench.instructions": types.SimpleNamespace(),
        "lighteval.tasks.tasks.ifbench.evaluation_lib": library,
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("importlib.import_module", lambda name: modules[name])
    return library


def test_ifbench_needs_every_instruction(checkers: types.ModuleType) -> None:
    verifier = VERIFIERS.build("ifbench")
    reference = {"prompt": "p", "instruction_id_list": ["words", "words"], "kwargs": [{"n": 1, "m": None}, {"n": 3}]}
    assert verifier.verify("one two three", reference) == Verdict(True, "2 of 2 instructions", "followed: words, words")
    assert verifier.verify("one two", reference) == Verdict(False, "1 of 2 instructions", "not followed: words")
    assert verifier.verify(" ", reference).reason == "empty completion"
    with pytest.raises(ValueError, match="instructions dance are unknown"):
        verifier.verify("one", reference | {"instruction_id_list": ["dance"]})
    with pytest.raises(UserError, match=r"python -m nltk.downloader punkt_tab"):
        verifier.verify("one", reference | {"instruction_id_list": ["data"]})
