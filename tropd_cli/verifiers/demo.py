"""`demo`: the answer of the built-in task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tropd_cli.demo import task

from .base import VERIFIERS, Verdict, no_answer


@VERIFIERS.register("demo")
@dataclass(frozen=True)
class Demo:
    """The two digits that a response of the demo task ends with."""

    fields: ClassVar[tuple[str, ...]] = ("answer",)
    optional: ClassVar[tuple[str, ...]] = ()
    executes_code: ClassVar[bool] = False

    def verify(self, completion: str, reference: Any) -> Verdict:
        found = task.extract_answer(completion)
        if found is None:
            return no_answer(completion)
        correct = task.is_correct(completion, str(reference))
        return Verdict(correct, found, "equal" if correct else f"{found} is not {reference}")
