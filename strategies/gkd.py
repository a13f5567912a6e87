"""Generalised knowledge distillation: the exact Jensen-Shannon divergence over the whole vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .base import STRATEGIES
from .functional import full_jsd_credit
from .types import Credit, Needs, Scope, Signals


@STRATEGIES.register("gkd")
@dataclass(frozen=True)
class GKD:
    """Exact JSD between teacher and student at every student-written token, differentiated over the whole vocabulary.

    Loss per token: mix KL(p || m) + (1-mix) KL(q || m), m = mix p + (1-mix) q. Credit on log q_v, for every v:
    -(1-mix) q_v log(q_v / m_v). mix 0 is the forward KL(p || q), mix 1 the reverse KL(q || p), by definition.
    The sampled token plays no role, so there is no sampling noise; both distributions are needed, chunk by chunk.

    Options:
        mix: weight of the teacher in m, from 0 to 1.

    Source: arXiv 2306.13649 (on-policy data only), 0.5.
    """

    paper: ClassVar[str] = "arXiv 2306.13649"
    scope: ClassVar[Scope] = "token"
    ratio_clip: ClassVar[tuple[float, float] | None] = None

    mix: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.mix <= 1.0:
            raise ValueError(f"mix must be between 0 and 1, got {self.mix}")

    @property
    def needs(self) -> Needs:
        return Needs(full_distribution=True)

    def credit(self, signals: Signals) -> Credit:
        return Credit(
            sampled=torch.zeros_like(signals.student_logprob),
            full=full_jsd_credit(signals.student_logprobs, signals.teacher_logprobs, mix=self.mix),
        )
