"""Jensen-Shannon distillation, split into a differentiated top-k part and a policy-gradient part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import STRATEGIES
from .checks import check_mix, check_top_k
from .functional import jsd_direct_credit, mixture_reward
from .types import Credit, Needs, Scope, Signals


@STRATEGIES.register("jsd")
@dataclass(frozen=True)
class JSD:
    """Jensen-Shannon divergence as the paper's baseline splits it, m = mix p + (1 - mix) q, u = p(x)/q(x).

    The teacher's half mix * sum_{v in V_k} p_v log(p_v / m_v) is differentiated: credit mix (1-mix) p_v q_v / m_v on
    log q_v. The student's half is a policy gradient: credit (1-mix) log(mix u + 1 - mix) on log q(x).

    As published this is the gradient of no objective. The policy-gradient part alone already has the whole JSD's
    gradient in expectation (it is `opd-plus`); the differentiated part comes on top.

    Options:
        mix: weight of the teacher in m, strictly between 0 and 1.
        top_k: size of V_k, the teacher's most likely tokens.

    Source: arXiv 2606.01249, table 1, mix 0.5, k = 64.
    """

    paper: ClassVar[str] = "arXiv 2606.01249"
    scope: ClassVar[Scope] = "token"
    ratio_clip: ClassVar[tuple[float, float] | None] = None

    mix: float = 0.5
    top_k: int = 64

    def __post_init__(self) -> None:
        check_mix(self.mix)
        check_top_k(self.top_k)

    @property
    def needs(self) -> Needs:
        return Needs(teacher_logprob=True, teacher_top_k=self.top_k)

    def credit(self, signals: Signals) -> Credit:
        reward = mixture_reward(signals.student_logprob, signals.teacher_logprob, mix=self.mix)
        return Credit(
            sampled=(1.0 - self.mix) * reward,
            top_k=jsd_direct_credit(signals.student_topk_logprob, signals.teacher_topk_logprob, mix=self.mix),
        )
