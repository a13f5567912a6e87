"""TOP-D: a bounded reward from a teacher mixed with the student, credited along the sequence and normalised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import STRATEGIES
from .checks import check_mix
from .functional import mixture_reward
from .returns import group_normalized, mean_of_later_return
from .types import Credit, Needs, Scope, Signals


@STRATEGIES.register("top-d")
@dataclass(frozen=True)
class TOPD:
    """TOP-D (Trust Region Policy Distillation): z-normalised returns of the reward log(mix u + 1 - mix), u = p/q.

    The reward is bounded below by log(1 - mix). Return: own reward plus the mean of the later ones. Credit: the return
    minus its mean, over its standard deviation (unbiased, at least 1e-6), both over the student-written tokens of all
    rollouts of the prompt; zero for a single rollout and where all returns are equal. PPO range 0.2.

    Another project calls this reward "TROPD". It is not TrOPD, which is `trust-region`. The normalisation divides
    any signal by its own size: noise included, once student and teacher agree.

    Options:
        mix: weight of the teacher in the mixture, strictly between 0 and 1.

    Source: arXiv 2607.04751, mix 0.2.
    """

    paper: ClassVar[str] = "arXiv 2607.04751"
    scope: ClassVar[Scope] = "batch"
    ratio_clip: ClassVar[tuple[float, float] | None] = (0.2, 0.2)

    mix: float = 0.2

    def __post_init__(self) -> None:
        check_mix(self.mix)

    @property
    def needs(self) -> Needs:
        return Needs(teacher_logprob=True)

    def credit(self, signals: Signals) -> Credit:
        wrote = signals.student_wrote
        reward = mixture_reward(signals.student_logprob, signals.teacher_logprob, mix=self.mix)
        returns = mean_of_later_return(reward, wrote)
        return Credit(sampled=group_normalized(returns, wrote, signals.group))
