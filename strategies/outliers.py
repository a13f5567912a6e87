"""Outlier estimators: what a token the teacher rejects is supervised with. Units: nats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .checks import check_below_zero, check_top_k
from .functional import Renormalize, k1_reward, reward_floor, topk_forward_kl_credit
from .registry import Registry
from .types import Credit, Needs, OutlierEstimator, Signals

OUTLIERS: Registry[OutlierEstimator] = Registry(
    "outlier estimator", "tropd.outliers", "tropd strategies", attributes=("needs", "estimate")
)


@OUTLIERS.register("forward-kl")
@dataclass(frozen=True)
class ForwardKL:
    """Top-k forward KL, back-propagated through the student: credit p_v on each of the teacher's top-k tokens.

    Source: arXiv 2606.01249, k = 64.

    Options:
        top_k: how many of the teacher's most likely tokens.
        tail: one more bucket for the mass outside them, which makes it a true KL.
        renormalize: "none" (the paper), "teacher" or "both".
    """

    paper: ClassVar[str] = "arXiv 2606.01249"

    top_k: int = 64
    tail: bool = False
    renormalize: Renormalize = "none"

    def __post_init__(self) -> None:
        check_top_k(self.top_k)
        if self.tail and self.renormalize != "none":
            raise ValueError(f"tail: true and renormalize: {self.renormalize} exclude each other")

    @property
    def needs(self) -> Needs:
        return Needs(teacher_top_k=self.top_k)

    def estimate(self, signals: Signals) -> Credit:
        top_k = topk_forward_kl_credit(
            signals.student_topk_logprob,
            signals.teacher_topk_logprob,
            tail=self.tail,
            renormalize=self.renormalize,
        )
        return Credit(sampled=torch.zeros_like(signals.student_logprob), top_k=top_k)


@OUTLIERS.register("mask")
@dataclass(frozen=True)
class Mask:
    """No credit at all: outliers teach nothing.

    Source: arXiv 2606.01249, the "Mask" rows.
    """

    paper: ClassVar[str] = "arXiv 2606.01249"

    @property
    def needs(self) -> Needs:
        return Needs()

    def estimate(self, signals: Signals) -> Credit:
        return Credit(sampled=torch.zeros_like(signals.student_logprob))


@OUTLIERS.register("clip")
@dataclass(frozen=True)
class Clip:
    """The reward with a floor: credit max(R, floor) on the sampled token.

    Source: arXiv 2606.01249, the "Clip" rows.

    Options:
        floor: nats, below zero. The paper gives none; the default is REOPOLD's log(0.2) / 0.8 = -2.0118.
    """

    paper: ClassVar[str] = "arXiv 2606.01249"

    floor: float = reward_floor(0.2)

    def __post_init__(self) -> None:
        check_below_zero("floor", self.floor)

    @property
    def needs(self) -> Needs:
        return Needs(teacher_logprob=True)

    def estimate(self, signals: Signals) -> Credit:
        reward = k1_reward(signals.student_logprob, signals.teacher_logprob)
        return Credit(sampled=reward.clamp_min(self.floor), floored=reward < self.floor)
