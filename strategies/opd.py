"""Plain on-policy distillation: the K1 reverse-KL reward on every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import STRATEGIES
from .functional import k1_reward
from .types import Credit, Needs, Scope, Signals


@STRATEGIES.register("opd")
@dataclass(frozen=True)
class OPD:
    """Policy gradient on R = log p - log q at every student-written token, discount 0.

    Its expectation over x ~ q is minus the gradient of KL(q || p). R is unbounded below.

    Source: Thinking Machines, "On-Policy Distillation" (2025).
    """

    paper: ClassVar[str] = "Thinking Machines 2025"
    scope: ClassVar[Scope] = "token"
    ratio_clip: ClassVar[tuple[float, float] | None] = None

    @property
    def needs(self) -> Needs:
        return Needs(teacher_logprob=True)

    def credit(self, signals: Signals) -> Credit:
        return Credit(sampled=k1_reward(signals.student_logprob, signals.teacher_logprob))
