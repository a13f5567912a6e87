"""Which verifier decides, during a run, whether a response to a prompt with an answer is right."""

from __future__ import annotations

import importlib.util
from typing import Any

from strategies.registry import RegistryError

from .errors import UserError
from .heldout import Judge
from .verifiers import VERIFIERS

#: Verifiers that run programs or need a whole row: they belong to `tropd eval`.
ONLY_IN_EVAL = ("code", "ifbench")


def resolve_verifier(verifier: str, data: str | None) -> str:
    """A verifier's name; "auto" becomes the demo's own check on demo data, else `math` or, without math-verify, `number`."""
    if verifier != "auto":
        return verifier
    by_extra = "math" if importlib.util.find_spec("math_verify") else "number"
    return "demo" if str(data).startswith("demo:") else by_extra


def judge_for(verifier: str, data: str | None) -> Judge:
    """(response text, reference) -> correct.

    Args:
        verifier: a registered name, or "auto"; see `resolve_verifier`.

    Raises:
        UserError: unknown verifier, or one that training does not run.
    """
    verifier = resolve_verifier(verifier, data)
    if verifier in ONLY_IN_EVAL:
        raise UserError(
            f"verifier '{verifier}' does not run during training. Train without it, then: tropd eval RUN --verifier {verifier}"
        )
    try:
        chosen = VERIFIERS.build(verifier)
    except RegistryError as error:
        raise UserError(str(error)) from error

    def judge(text: str, reference: Any) -> bool:
        return chosen.verify(text, reference).correct

    return judge
