"""On-policy distillation with any f-divergence, with the reward that gives its exact gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import STRATEGIES
from .checks import check_mix
from .functional import Divergence, f_divergence_weight
from .types import Credit, Needs, Scope, Signals


@STRATEGIES.register("opd-plus")
@dataclass(frozen=True)
class OPDPlus:
    """Policy gradient on u f'(u) - f(u), u = p(x)/q(x): in expectation minus the gradient of sum_v q_v f(p_v / q_v).

    f is normalised to f(1) = f'(1) = 0, so that the reward is 0 where teacher and student agree.

    Options:
        divergence: "jsd", reward (1-mix) log(mix u + 1 - mix), bounded below; "reverse-kl", log u (this is `opd`);
            "forward-kl", u - 1, bounded below but heavy above; "hellinger", sqrt(u) - 1; "total-variation",
            sign(u - 1) / 2.
        mix: of the JSD only, weight of the teacher in its mixture, strictly between 0 and 1.

    Source: arXiv 2606.01039.
    """

    paper: ClassVar[str] = "arXiv 2606.01039"
    scope: ClassVar[Scope] = "token"
    ratio_clip: ClassVar[tuple[float, float] | None] = None

    divergence: Divergence = "jsd"
    mix: float = 0.5

    def __post_init__(self) -> None:
        check_mix(self.mix)

    @property
    def needs(self) -> Needs:
        return Needs(teacher_logprob=True)

    def credit(self, signals: Signals) -> Credit:
        weight = f_divergence_weight(
            signals.student_logprob, signals.teacher_logprob, divergence=self.divergence, mix=self.mix
        )
        return Credit(sampled=weight)
