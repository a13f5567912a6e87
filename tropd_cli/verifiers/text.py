"""`number`, `choice` and `exact`: verifiers that need nothing but the text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

from .answers import after_thinking, last_announced, last_box
from .base import VERIFIERS, Verdict, no_answer

NUMBER = re.compile(
    r"(?<![\w.])[-+\u2212]?\$?\s?(?:\d{1,3}(?:(?:,|\{,\}|\\,|[\u00a0\u202f])\d{3})+(?!\d)|\d+)?"
    r"(?:(?<=\d)\.\d+|(?<!\d)\.\d+)?(?:[eE][-+]?\d+)?(?:\s?/\s?\d+)?"
)
LATEX_FRACTION = re.compile(r"([-+\u2212]?)\s*\\[dt]?frac\s*\{\s*([\d,.]+)\s*\}\s*\{\s*([\d,.]+)\s*\}")
LETTER = r"\(?\\?(?:text|mathrm|textbf|mathbf)?\{?\(?([A-J])\)?\}?(?![\w'])"
CHOSEN = re.compile(
    r"(?i:answer|choice|option|choose|pick)\b(?:\s+is|\s+would\s+be|\s+must\s+be)?\s*:?\s*(?:option|choice)?[\s*_$`\"]*"
    + LETTER
)
CHOSEN_LOWER = re.compile(r"(?i)answer(?:\s+is)?\s*:?\s*\(?([a-j])\)?\s*[.!]?\s*$")
ONLY_LETTER = re.compile(r"^[\s*_$`\"(\[]*\(?([A-J])\)?[\s*_$`\".:)\]]*$")
LEADING_LETTER = re.compile(r"^\s*[*_]*\(?([A-J])(?:\)|[.:](?=\s|\*))")


@VERIFIERS.register("number")
@dataclass(frozen=True)
class Number:
    """The number that answers equals the reference exactly. Currency, units, per cent signs and commas are left out.

    It is the first one in the last box, else the first after the last "####" or "the answer is" (behind an equals
    sign, if there is one), else the last one of the text.
    """

    fields: ClassVar[tuple[str, ...]] = ("answer",)
    optional: ClassVar[tuple[str, ...]] = ()
    executes_code: ClassVar[bool] = False

    def verify(self, completion: str, reference: Any) -> Verdict:
        wanted = number_in(str(reference))
        if wanted is None:
            raise ValueError(f"reference {reference!r} has no number")
        found = number_in(completion)
        if found is None:
            return no_answer(completion)
        equal = found[1] == wanted[1]
        return Verdict(equal, found[0], "equal" if equal else f"{found[0]} is not {wanted[0]}")


def number_in(text: str) -> tuple[str, Fraction] | None:
    """The number that a text gives as its answer, as written and as a value; None without one."""
    text = after_thinking(text)
    for part in (last_box(text), last_announced(text)):
        numbers = numbers_of(part.rpartition("=")[2]) if part else []
        if numbers:
            return numbers[0]
    return (numbers_of(text) or [None])[-1]


def numbers_of(text: str) -> list[tuple[str, Fraction]]:
    """Every number of a text in order, as written and as a value."""
    text = LATEX_FRACTION.sub(r"\1\2/\3 ", text).replace("\\$", "$").replace("\\%", "%")
    found = []
    for match in NUMBER.finditer(text):
        written = match.group().strip()
        plain = re.sub(r"[,{}$\s\\\u00a0\u202f]", "", written).replace("\u2212", "-")
        if any(c.isdigit() for c in plain):
            try:
                found.append((written, Fraction(*map(Fraction, plain.split("/")))))
            except (ValueError, ZeroDivisionError):
                continue
    return found


@VERIFIERS.register("choice")
@dataclass(frozen=True)
class Choice:
    """A letter A to J, as a box, after "the answer is", alone on the last line or at the very beginning.

    The reference is a letter or the number of the option, counted from 0.
    """

    fields: ClassVar[tuple[str, ...]] = ("answer",)
    optional: ClassVar[tuple[str, ...]] = ()
    executes_code: ClassVar[bool] = False

    def verify(self, completion: str, reference: Any) -> Verdict:
        wanted = letter_of(reference)
        found = choice_in(after_thinking(completion))
        if found is None:
            return no_answer(completion)
        return Verdict(found == wanted, found, "equal" if found == wanted else f"{found} is not {wanted}")


def letter_of(reference: Any) -> str:
    """The option's letter of a reference: `C`, `(C)`, `2` or 2."""
    text = str(reference).strip().strip("()").upper()
    if text.isdigit() and int(text) < 10:
        return "ABCDEFGHIJ"[int(text)]
    if len(text) != 1 or text not in "ABCDEFGHIJ":
        raise ValueError(f"reference {reference!r} is no option: a letter A to J or a number from 0 to 9")
    return text


def choice_in(text: str) -> str | None:
    """The option that a text chooses, or None."""
    box = last_box(text)
    if box is not None:
        match = re.match(r"^\W*" + LETTER, box) or re.match(r"^\(?([a-j])\)?$", box)
        if match:
            return match.group(1).upper()
    chosen = CHOSEN.findall(text) or CHOSEN_LOWER.findall(text.strip())
    if chosen:
        return str(chosen[-1]).upper()
    lines = [line for line in text.strip().splitlines() if line.strip()]
    match = (ONLY_LETTER.match(lines[-1]) or LEADING_LETTER.match(lines[0])) if lines else None
    return match.group(1) if match else None


@VERIFIERS.register("exact")
@dataclass(frozen=True)
class Exact:
    """The whole completion equals the reference, or one of a list of references, apart from outer blanks."""

    ignore_case: bool = False
    fields: ClassVar[tuple[str, ...]] = ("answer",)
    optional: ClassVar[tuple[str, ...]] = ()
    executes_code: ClassVar[bool] = False

    def verify(self, completion: str, reference: Any) -> Verdict:
        accepted = reference if isinstance(reference, (list, tuple)) else [reference]
        found = " ".join(after_thinking(completion).split())
        if not found:
            return no_answer(completion)
        fold = str.casefold if self.ignore_case else str
        equal = fold(found) in {fold(" ".join(str(one).split())) for one in accepted}
        return Verdict(equal, found, "equal" if equal else f"not {' or '.join(map(repr, accepted))}")
