"""Extrapolated on-policy distillation: towards the teacher and past it, away from a reference model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import STRATEGIES
from .checks import check_not_negative
from .functional import k1_reward
from .types import Credit, Needs, Scope, Signals


@STRATEGIES.register("exopd")
@dataclass(frozen=True)
class ExOPD:
    """ExOPD: policy gradient on R + (scale - 1) (log p - log ref), R = log p - log q.

    Its expectation is minus the gradient of KL(q || p^scale ref^(1-scale)), the teacher extrapolated away from the
    reference model (the initial student unless another is named). scale 1 is `opd`.

    Options:
        scale: above 1 extrapolates, below 1 interpolates.

    Source: G-OPD / ExOPD, arXiv 2602.12125, 1.25.
    """

    paper: ClassVar[str] = "arXiv 2602.12125"
    scope: ClassVar[Scope] = "token"
    ratio_clip: ClassVar[tuple[float, float] | None] = None

    scale: float = 1.25

    def __post_init__(self) -> None:
        check_not_negative("scale", self.scale)

    @property
    def needs(self) -> Needs:
        return Needs(teacher_logprob=True, reference_logprob=True)

    def credit(self, signals: Signals) -> Credit:
        reward = k1_reward(signals.student_logprob, signals.teacher_logprob)
        beyond = k1_reward(signals.reference_logprob, signals.teacher_logprob)
        return Credit(sampled=reward + (self.scale - 1.0) * beyond)
