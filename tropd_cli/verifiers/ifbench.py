"""`ifbench`: verifiable instructions (arXiv 2507.02833), checked by the functions that lighteval carries.

lighteval cannot be an extra: 0.13 pins latex2sympy2_extended 1.0.6 and math-verify pins another version. Its checkers
import without that dependency, so they are installed beside it.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from tropd_cli.errors import UserError

from .base import VERIFIERS, Verdict, no_answer

INSTALL = "pip install --no-deps lighteval==0.13.0 && pip install nltk emoji syllapy spacy"
DATA = "python -m nltk.downloader punkt_tab averaged_perceptron_tagger_eng stopwords"
CHECKERS = "lighteval.tasks.tasks.ifbench"


@VERIFIERS.register("ifbench")
@dataclass(frozen=True)
class IFBench:
    """Every instruction of the prompt is followed. `loose` also tries without first line, last line and asterisks,
    which is what the benchmark reports."""

    mode: Literal["loose", "strict"] = "loose"
    fields: ClassVar[tuple[str, ...]] = ("prompt", "instruction_id_list", "kwargs")
    optional: ClassVar[tuple[str, ...]] = ()
    executes_code: ClassVar[bool] = False

    def __post_init__(self) -> None:
        checkers()

    def verify(self, completion: str, reference: Any) -> Verdict:
        if not completion.strip():
            return no_answer(completion)
        library, names = checkers(), reference["instruction_id_list"]
        known = library.instructions_registry.INSTRUCTION_DICT
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"instructions {', '.join(unknown)} are unknown to the installed lighteval")
        options = [{k: v for k, v in kwargs.items() if v is not None} for kwargs in reference["kwargs"]]
        example = library.InputExample("0", names, reference["prompt"], options)
        check = getattr(library, f"test_instruction_following_{self.mode}")
        try:
            with no_downloads():
                followed = check(example, {reference["prompt"]: completion}).follow_instruction_list
        except LookupError as error:
            raise UserError(f"checking {', '.join(names)} needs NLTK's data, which is not installed: {DATA}") from error
        missed = [name for name, good in zip(names, followed, strict=True) if not good]
        reason = f"not followed: {', '.join(missed)}" if missed else f"followed: {', '.join(names)}"
        return Verdict(not missed, f"{len(names) - len(missed)} of {len(names)} instructions", reason)


def checkers() -> Any:
    """lighteval's module of checkers.

    Raises:
        UserError: it or something it imports is not installed; names the command.
    """
    try:
        with no_downloads():
            importlib.import_module(f"{CHECKERS}.instructions").RESOURCES_DOWNLOADED = True
            return importlib.import_module(f"{CHECKERS}.evaluation_lib")
    except ImportError as error:
        raise UserError(
            f"the verifier 'ifbench' needs the instruction checkers of lighteval ({error}): {INSTALL}. "
            f"25 of the 300 prompts also need NLTK's data: {DATA}"
        ) from error


@contextlib.contextmanager
def no_downloads() -> Iterator[None]:
    """The checkers fetch NLTK data on import and on every call; nothing is downloaded unasked."""
    nltk = importlib.import_module("nltk")
    download, nltk.download = nltk.download, lambda *_, **__: False
    try:
        yield
    finally:
        nltk.download = download
