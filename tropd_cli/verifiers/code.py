"""`code`: the tests pass, in the sandbox."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from tropd_cli import sandbox

from .answers import after_thinking
from .base import VERIFIERS, Verdict, no_answer

FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
PYTHON_NAMES = ("", "python", "python3", "py")
FUNCTION_TESTS = """
import json

def plain(value):
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

function = {target}
for number, (arguments, expected) in enumerate(json.loads({cases!r}), 1):
    got = function(*arguments)
    assert plain(got) == expected, f"case {{number}}: {{got!r}} is not {{expected!r}}"
"""


@VERIFIERS.register("code")
@dataclass(frozen=True)
class Code:
    """The completion's program passes the reference's tests.

    `tests` is one of: Python source or a list of its lines, run against what the program defines; {"inputs", "outputs"}
    of a program that reads stdin; the same with "fn_name" for a function or a method of `Solution`, whose inputs are
    one JSON value per line and argument. `entry_point` is the function under test, also known to the tests as
    `candidate`; `starter` is code that the completion continues or that its function relies on.
    """

    cpu_seconds: float = 10.0
    wall_seconds: float = 30.0
    memory_mb: int = 1024
    fields: ClassVar[tuple[str, ...]] = ("tests",)
    optional: ClassVar[tuple[str, ...]] = ("entry_point", "starter")
    executes_code: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("cpu_seconds", "wall_seconds", "memory_mb"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")

    def verify(self, completion: str, reference: Any) -> Verdict:
        if not isinstance(reference, dict):
            reference = {"tests": reference}
        entry, starter = reference.get("entry_point"), reference.get("starter") or ""
        text = after_thinking(completion)
        if not text.strip():
            return no_answer(completion)
        code = code_in(text, entry)
        source = assemble(code, starter, entry)
        limits = sandbox.Limits(self.cpu_seconds, self.wall_seconds, self.memory_mb)
        tests = reference["tests"]
        if isinstance(tests, str) and tests.lstrip().startswith("{"):
            tests = json.loads(tests)
        if isinstance(tests, dict) and not tests.get("fn_name"):
            outcome = sandbox.run_program(source, stdin_cases(tests), limits)
        else:
            outcome = sandbox.run_tests(
                source,
                test_source(tests),
                setup=starter if entry else "",
                entry_point=entry,
                keep_lines=len(starter.splitlines()),
                limits=limits,
            )
        return Verdict(outcome.passed, code, outcome.reason)


def code_in(text: str, entry: str | None) -> str:
    """The last fenced block that defines the entry point, else the last Python block, else the whole text."""
    blocks = [body for language, body in FENCE.findall(text) if language.lower() in PYTHON_NAMES]
    if not blocks:
        return text
    defining = [body for body in blocks if entry and defines(body, entry)]
    return str((defining or blocks)[-1])


def defines(code: str, name: str) -> bool:
    return (
        re.search(rf"^(?:async\s+)?(?:def|class)\s+{re.escape(name)}\b|^{re.escape(name)}\s*=", code, re.M) is not None
    )


def assemble(code: str, starter: str, entry: str | None) -> str:
    """The program under test: the completion after the code that it continues or relies on."""
    if not starter:
        return code
    joined = entry is not None and defines(code, entry)
    return starter.rstrip("\n") + "\n\n" + code if joined else starter + code


def stdin_cases(tests: dict[str, Any]) -> list[tuple[str, str]]:
    inputs, outputs = tests["inputs"], tests["outputs"]
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(f"tests have {len(inputs)} inputs and {len(outputs)} outputs")
    return [(str(i), str(o)) for i, o in zip(inputs, outputs, strict=True)]


def test_source(tests: Any) -> str:
    """Tests as Python source."""
    if isinstance(tests, str):
        return tests
    if isinstance(tests, list):
        return "\n".join(map(str, tests))
    name = str(tests["fn_name"])
    if not name.isidentifier():
        raise ValueError(f"fn_name {name!r} is no name of a function")
    cases = [
        ([json.loads(line) for line in arguments.splitlines() if line.strip()], json.loads(expected))
        for arguments, expected in stdin_cases(tests)
    ]
    target = f"Solution().{name}" if tests.get("in_class", True) else name
    return FUNCTION_TESTS.format(target=target, cases=json.dumps(cases))
