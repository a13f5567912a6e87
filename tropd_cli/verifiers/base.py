"""What a verifier is, and the registry of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from strategies.registry import Registry


@dataclass(frozen=True)
class Verdict:
    """`extracted` is what was taken for the answer, None where none was found; `reason` is one line."""

    correct: bool
    extracted: str | None
    reason: str


@runtime_checkable
class Verifier(Protocol):
    """A frozen dataclass whose fields are its options.

    fields: the row fields that make the reference. With one field the reference is its value, with several a dict.
    optional: further fields that go into the dict where a row has them.
    executes_code: True for a verifier that runs what a model wrote; it is refused unless the user allows it.
    """

    fields: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]]
    executes_code: ClassVar[bool]

    def verify(self, completion: str, reference: Any) -> Verdict: ...


VERIFIERS: Registry[Verifier] = Registry("verifier", "tropd.verifiers", "tropd eval --help")


def reference_of(verifier: Verifier, row: Mapping[str, Any]) -> Any:
    """What `verify` wants as its reference, out of a row.

    Raises:
        KeyError: the first missing field.
    """
    needed = {name: row[name] for name in verifier.fields}
    if len(verifier.fields) == 1 and not verifier.optional:
        return needed[verifier.fields[0]]
    return needed | {name: row[name] for name in verifier.optional if row.get(name) is not None}


def no_answer(completion: str) -> Verdict:
    return Verdict(False, None, "no answer found" if completion.strip() else "empty completion")
