"""Top-k forward KL on every student token: the ablation that the trust region is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import STRATEGIES
from .functional import Renormalize, topk_forward_kl
from .outliers import ForwardKL
from .types import Credit, Needs, Scope, Signals


@STRATEGIES.register("fkl")
@dataclass(frozen=True)
class FKL:
    """Top-k forward KL on every student-written token, back-propagated through the student.

    Loss per token: sum_{v in V_k} p_v (log p_v - log q_v). Credit: p_v on log q_v. The sampled token plays no role.

    Options:
        top_k: size of V_k, the teacher's most likely tokens.
        tail: one more bucket for the mass outside V_k, which makes it a true KL.
        renormalize: "none" (the paper), "teacher" or "both".
        as_reward: use minus the KL as the reward of the sampled token, credit -KL on log q(x), instead of
            differentiating it. A cautionary variant, there to be measured: the reward does not depend on x, so its
            expected gradient is zero whatever the teacher says, and what is left is noise.

    Source: arXiv 2606.01249, table 1, k = 64.
    """

    paper: ClassVar[str] = "arXiv 2606.01249"
    scope: ClassVar[Scope] = "token"
    ratio_clip: ClassVar[tuple[float, float] | None] = None

    top_k: int = 64
    tail: bool = False
    renormalize: Renormalize = "none"
    as_reward: bool = False

    def __post_init__(self) -> None:
        _ = self.estimator  # its checks are ours

    @property
    def estimator(self) -> ForwardKL:
        """The outlier estimator that this strategy applies everywhere."""
        return ForwardKL(self.top_k, self.tail, self.renormalize)

    @property
    def needs(self) -> Needs:
        return self.estimator.needs

    def credit(self, signals: Signals) -> Credit:
        if not self.as_reward:
            return self.estimator.estimate(signals)
        student, teacher = signals.student_topk_logprob, signals.teacher_topk_logprob
        kl = topk_forward_kl(student, teacher, tail=self.tail, renormalize=self.renormalize)
        return Credit(sampled=-kl)
