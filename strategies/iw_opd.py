"""On-policy distillation that trusts the early tokens of a response more than the late ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import STRATEGIES
from .checks import check_not_negative
from .functional import k1_reward
from .returns import early_weight
from .types import Credit, Needs, Scope, Signals


@STRATEGIES.register("iw-opd")
@dataclass(frozen=True)
class IWOPD:
    """IW-OPD: policy gradient on w R, R = log p - log q, with a weight that falls as disagreement accumulates.

    w_t = 1 + strength (1 - sum_{s<t} |R_s| / max(sum_s |R_s|, 1e-8)) over the student-written tokens of the sequence:
    1 + strength at the first one, 1 once all disagreement lies behind. The sum runs over later tokens too, so this is
    the gradient of no objective.

    Options:
        strength: extra weight of the first token, at least 0; 0 is `opd`.

    Source: arXiv 2606.22600, 0.5.
    """

    paper: ClassVar[str] = "arXiv 2606.22600"
    scope: ClassVar[Scope] = "batch"
    ratio_clip: ClassVar[tuple[float, float] | None] = None

    strength: float = 0.5

    def __post_init__(self) -> None:
        check_not_negative("strength", self.strength)

    @property
    def needs(self) -> Needs:
        return Needs(teacher_logprob=True)

    def credit(self, signals: Signals) -> Credit:
        wrote = signals.student_wrote
        reward = k1_reward(signals.student_logprob, signals.teacher_logprob).masked_fill(~wrote, 0.0)
        return Credit(sampled=early_weight(reward, wrote, strength=self.strength) * reward)
