"""Verifiers: is this completion right? Pure functions of text and reference, in a registry like the strategies'.

A plug-in is a frozen dataclass with a `verify(completion, reference)` that returns a `Verdict`, registered under the
entry-point group `tropd.verifiers`.
"""

from . import code, demo, ifbench, mathematics, text
from .base import VERIFIERS, Verdict, Verifier, reference_of

__all__ = ["VERIFIERS", "Verdict", "Verifier", "code", "demo", "ifbench", "mathematics", "reference_of", "text"]
