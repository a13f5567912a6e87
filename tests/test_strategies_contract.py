"""One contract over every registered name and the variants that change what a strategy reads or looks across."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from strategies import OUTLIERS, STRATEGIES, Credit, MissingSignal, Needs, Signals
from strategies.functional import k1_reward
from strategies.guidance import apply_guidance
from strategies.testing import check_at_rest, check_contract, expected_gradient, logit_gradient, random_batch

VARIANTS: list[object] = [
    {"name": "reopold", "stages": 2},
    {"name": "reopold", "stages": 2, "switch_at": 1.0},  # still in its first stage
    *(
        {"name": "trust-region", "region_rule": rule, "outlier": outlier}
        for rule in ("acceptance", "soft", "threshold")
        for outlier in OUTLIERS.names()
    ),
    {"name": "trust-region", "outlier": {"name": "forward-kl", "top_k": 3, "tail": True}},
    {"name": "fkl", "top_k": 1},
    {"name": "fkl", "tail": True, "top_k": 4},
    {"name": "fkl", "renormalize": "both", "top_k": 4},
    {"name": "eopd", "renormalize": "none"},
    {"name": "aopd", "average": True, "top_k": 4},
    {"name": "gkd", "mix": 0.0},
    {"name": "gkd", "mix": 1.0},
    {"name": "jsd", "mix": 0.1},
    *({"name": "opd-plus", "divergence": d} for d in ("reverse-kl", "forward-kl", "hellinger", "total-variation")),
]
ALL = [*STRATEGIES.names(), *VARIANTS]

#: Their expected gradient is exactly zero where teacher, student and reference agree, whatever k is.
AT_REST = [
    "opd trust-region trust-region-aopd entropy reopold top-d iw-opd opd-plus exopd gkd aopd".split(),
    [{"name": "reopold", "stages": 2}, {"name": "trust-region", "region_rule": "soft"}],
]


@pytest.mark.parametrize("spec", ALL, ids=str)
def test_contract(spec: object) -> None:
    check_contract(STRATEGIES.build(spec))  # type: ignore[arg-type]


@pytest.mark.parametrize("spec", [s for group in AT_REST for s in group], ids=str)  # type: ignore[attr-defined]
def test_nothing_to_learn_from_oneself(spec: object) -> None:
    logits = torch.randn(80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradient, variance = expected_gradient(STRATEGIES.build(spec), logits, logits, logits)  # type: ignore[arg-type]
    assert float(gradient.abs().max()) < 1e-6
    assert variance < 1e-12


@pytest.mark.parametrize("name", ["fkl", "jsd", "eopd"])
def test_truncated_forward_kl_pulls_even_then(name: str) -> None:
    """So the bound of the contract is no empty promise: something of the left-out mass's size is there."""
    logits = torch.randn(80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    strategy = STRATEGIES.build({"name": name, "top_k": 16})
    assert float(expected_gradient(strategy, logits, logits, logits)[0].abs().max()) > 1e-3
    check_at_rest(strategy)


@pytest.mark.parametrize("name", ["top-d", "iw-opd", "entropy"])
def test_batch_scope_does_look_across_tokens(name: str) -> None:
    """Whoever declares batch scope needs it: token by token the credit would differ."""
    strategy = STRATEGIES.build(name)
    signals = random_batch().signals(strategy)
    whole = strategy.credit(signals).sampled
    alone = torch.zeros_like(whole)
    for b, t in signals.student_wrote.nonzero().tolist():
        cell = {n: signals._read(n)[b : b + 1, t : t + 1] for n in signals if n not in ("group", "progress")}
        alone[b, t] = strategy.credit(Signals(group=signals.group[b : b + 1], **cell)).sampled
    assert strategy.scope == "batch" and not torch.allclose(alone, whole)


def test_one_rollout_per_prompt_gets_no_credit_from_top_d() -> None:
    strategy = STRATEGIES.build("top-d")
    batch = replace(random_batch(), group=torch.arange(6))
    assert strategy.credit(batch.signals(strategy)).sampled.abs().max() == 0.0


def test_guidance_overwrites_every_kind_of_credit() -> None:
    for name in ("opd", "jsd", "gkd", "eopd"):
        strategy = STRATEGIES.build(name)
        batch = random_batch()
        signals = batch.signals(strategy)
        credit = apply_guidance(strategy.credit(signals), signals, weight=0.25)
        wrote = signals.mask & signals.teacher_wrote
        assert (credit.sampled[wrote] == 0.25).all() and (credit.sampled[~signals.mask] == 0.0).all()
        assert credit.region is not None and (credit.region[wrote] == 3).all()
        nll = logit_gradient(credit, batch)[wrote]
        x = torch.nn.functional.one_hot(batch.token_ids[wrote], 12)
        torch.testing.assert_close(nll, 0.25 * (batch.student_logits.softmax(-1)[wrote] - x))


# ── the contract can be broken ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Plug:
    """A minimal third-party strategy, from which each broken one below departs in one line."""

    scope: ClassVar[str] = "token"
    ratio_clip: ClassVar[tuple[float, float] | None] = None

    @property
    def needs(self) -> Needs:
        return Needs(teacher_logprob=True)

    def reward(self, signals: Signals) -> Tensor:
        return k1_reward(signals.student_logprob, signals.teacher_logprob)

    def credit(self, signals: Signals) -> Credit:
        return Credit(sampled=self.reward(signals))


class Undeclared(Plug):
    def reward(self, signals: Signals) -> Tensor:
        return super().reward(signals) * signals.student_entropy


class AcrossTokens(Plug):
    def reward(self, signals: Signals) -> Tensor:
        reward = super().reward(signals)
        return reward - reward[signals.student_wrote].sum()


class SeesPadding(Plug):
    scope = "batch"

    def reward(self, signals: Signals) -> Tensor:
        return super().reward(signals) * signals.student_logprob.mean()


class SeesGuidance(Plug):
    scope = "batch"

    def reward(self, signals: Signals) -> Tensor:
        return super().reward(signals) * signals.student_logprob[signals.mask].sum()


class IgnoresTeacher(Plug):
    def reward(self, signals: Signals) -> Tensor:
        return signals.student_logprob


class NotFinite(Plug):
    def reward(self, signals: Signals) -> Tensor:
        return super().reward(signals).exp().log1p().exp().sub(1.0)


class InPlace(Plug):
    def reward(self, signals: Signals) -> Tensor:
        return signals.teacher_logprob.sub_(signals.student_logprob)


class Biased(Plug):
    def reward(self, signals: Signals) -> Tensor:
        return signals.teacher_logprob


class WrongShape(Plug):
    def reward(self, signals: Signals) -> Tensor:
        return super().reward(signals).flatten()


def test_the_minimal_plug_in_keeps_it() -> None:
    check_contract(Plug())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (Undeclared(), MissingSignal, "'student_entropy' was not declared"),
        (AcrossTokens(), AssertionError, "splitting the tokens changes credit although scope is 'token'"),
        (SeesPadding(), AssertionError, "in the padding changes credit"),
        (SeesGuidance(), AssertionError, "what the teacher wrote changes the credit of student tokens"),
        (IgnoresTeacher(), AssertionError, "the expected gradient ignores the teacher"),
        (STRATEGIES.build({"name": "fkl", "as_reward": True}), AssertionError, "the expected gradient ignores"),
        (NotFinite(), AssertionError, "not finite: q = exp"),
        (InPlace(), AssertionError, r"changed \['teacher_logprob'\] in place"),
        (Biased(), AssertionError, "with teacher == student"),
        (WrongShape(), AssertionError, r"sampled has shape \[30\], not \[6, 5\]"),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "credit") else "",
)
def test_broken_ones_are_told_what_is_wrong(broken: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_contract(broken)  # type: ignore[arg-type]
