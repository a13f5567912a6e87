"""The pure functions and each strategy's credit against its named loss: autograd, identities, extreme values. Nats."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strategies import STRATEGIES, Credit, Region, Signals
from strategies import functional as F
from strategies.returns import early_weight, group_normalized, mean_of_later_return, top_share
from strategies.testing import Batch, logit_gradient, random_batch

V, K = 12, 5


# ── credit = minus the gradient of the named loss ───────────────────────────────────────────────────────────────────


class Named:
    """The quantities of the formulas, in plain probabilities: q carries a gradient, everything else is a number."""

    def __init__(self, batch: Batch, logits: Tensor, top_k: int = K) -> None:
        self.q = logits.softmax(-1)
        self.p = batch.teacher_logits.softmax(-1)
        ids = batch.token_ids.unsqueeze(-1)
        self.log_qx = self.q.gather(-1, ids).squeeze(-1).log()
        self.px = self.p.gather(-1, ids).squeeze(-1)
        self.qx = self.log_qx.detach().exp()
        assert batch.reference_logits is not None
        self.ref_x = batch.reference_logits.softmax(-1).gather(-1, ids).squeeze(-1)
        self.reward = (self.px / self.qx).log()
        top = batch.topk_ids(top_k)
        self.pv, self.qv = self.p.gather(-1, top), self.q.gather(-1, top)

    def pg(self, advantage: Tensor) -> Tensor:
        return -advantage.detach() * self.log_qx

    def forward_kl(self, *, tail: bool = False, renormalize: str = "none") -> Tensor:
        p, q = self.pv, self.qv
        if renormalize != "none":
            p = p / p.sum(-1, keepdim=True)
        if renormalize == "both":
            q = q / q.sum(-1, keepdim=True)
        kl = (p * (p / q).log()).sum(-1)
        if tail:
            rest = 1 - p.sum(-1)
            kl = kl + rest * (rest / (1 - q.sum(-1))).log()
        return kl

    def jsd(self, mix: float) -> Tensor:
        m = mix * self.p + (1 - mix) * self.q
        return (mix * self.p * (self.p / m).log() + (1 - mix) * self.q * (self.q / m).log()).sum(-1)


def jsd_split(n: Named) -> Tensor:
    m = 0.3 * n.pv + 0.7 * n.qv
    return 0.3 * (n.pv * (n.pv / m).log()).sum(-1) + n.pg(0.7 * (0.3 * n.px / n.qx + 0.7).log())


def trust_region(n: Named, weight: Tensor, outlier: Tensor) -> Tensor:
    return weight * n.pg(n.reward) + (1 - weight) * outlier


def teacher_entropy(n: Named) -> Tensor:
    return -(n.p * n.p.log()).sum(-1)


UNIFORM = random_batch().uniform
assert UNIFORM is not None
LOSSES: list[tuple[dict[str, object], Callable[[Named], Tensor]]] = [
    ({"name": "opd"}, lambda n: n.pg(n.reward)),
    ({"name": "fkl", "top_k": K}, lambda n: n.forward_kl()),
    ({"name": "fkl", "top_k": K, "tail": True}, lambda n: n.forward_kl(tail=True)),
    ({"name": "fkl", "top_k": K, "renormalize": "teacher"}, lambda n: n.forward_kl(renormalize="teacher")),
    ({"name": "fkl", "top_k": K, "renormalize": "both"}, lambda n: n.forward_kl(renormalize="both")),
    ({"name": "fkl", "top_k": K, "as_reward": True}, lambda n: n.pg(-n.forward_kl())),
    ({"name": "jsd", "top_k": K, "mix": 0.3}, jsd_split),
    (
        {"name": "eopd", "top_k": K, "entropy_threshold": 1.4},
        lambda n: n.pg(n.reward) + (teacher_entropy(n) > 1.4) * n.forward_kl(renormalize="teacher"),
    ),
    ({"name": "reopold", "floor": -1.0}, lambda n: n.pg(n.reward.clamp_min(-1.0))),
    (
        {"name": "aopd", "top_k": K, "margin": 0.1},
        lambda n: torch.where(n.qx - n.px > 0.1, n.forward_kl(), n.pg(n.reward)),
    ),
    (
        {"name": "aopd", "top_k": K, "average": True},
        lambda n: torch.where(n.qx > n.px, n.forward_kl() / K, n.pg(n.reward)),
    ),
    ({"name": "exopd", "scale": 1.5}, lambda n: n.pg(n.reward + 0.5 * (n.px / n.ref_x).log())),
    ({"name": "opd-plus", "mix": 0.3}, lambda n: n.pg(0.7 * (0.3 * n.px / n.qx + 0.7).log())),
    ({"name": "opd-plus", "divergence": "forward-kl"}, lambda n: n.pg(n.px / n.qx - 1)),
    ({"name": "opd-plus", "divergence": "hellinger"}, lambda n: n.pg((n.px / n.qx).sqrt() - 1)),
    ({"name": "opd-plus", "divergence": "total-variation"}, lambda n: n.pg((n.px - n.qx).sign() / 2)),
    ({"name": "gkd", "mix": 0.3}, lambda n: n.jsd(0.3)),
    ({"name": "gkd", "mix": 0.0}, lambda n: (n.p * (n.p / n.q).log()).sum(-1)),
    ({"name": "gkd", "mix": 1.0}, lambda n: (n.q * (n.q / n.p).log()).sum(-1)),
    (
        {"name": "trust-region", "outlier": {"name": "forward-kl", "top_k": K}},
        lambda n: trust_region(n, (n.px / n.qx > UNIFORM).double(), n.forward_kl()),
    ),
    (
        {"name": "trust-region", "region_rule": "soft", "outlier": {"name": "clip", "floor": -1.0}},
        lambda n: trust_region(n, (n.px / n.qx).clamp_max(1), n.pg(n.reward.clamp_min(-1.0))),
    ),
    (
        {"name": "trust-region", "region_rule": "threshold", "threshold": -0.5, "outlier": "mask"},
        lambda n: trust_region(n, (n.reward >= -0.5).double(), 0 * n.log_qx),
    ),
    (
        {"name": "trust-region-aopd", "outlier": {"name": "forward-kl", "top_k": K}, "positive_weight": 0.5},
        lambda n: trust_region(n, (n.px / n.qx > UNIFORM).double(), n.forward_kl()) + n.pg(0.5 * n.reward.clamp_min(0)),
    ),
]


@pytest.mark.parametrize(("spec", "loss"), LOSSES, ids=[" ".join(map(str, spec.values())) for spec, _ in LOSSES])
def test_credit_is_minus_the_gradient_of_the_named_loss(
    spec: dict[str, object], loss: Callable[[Named], Tensor]
) -> None:
    strategy = STRATEGIES.build(spec)
    batch = replace(random_batch(vocabulary=V), mask=None, teacher_wrote=None)
    logits = batch.student_logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(Named(batch, logits)).sum(), logits)
    found = logit_gradient(strategy.credit(batch.signals(strategy)), batch)
    torch.testing.assert_close(found, expected)
    assert found.abs().max() > 0.01


def test_both_sides_of_every_gate_were_seen() -> None:
    """Otherwise the comparison above could not fail for half of a rule."""
    batch = replace(random_batch(vocabulary=V), mask=None, teacher_wrote=None)
    for spec, _ in LOSSES:
        strategy = STRATEGIES.build(spec)
        region = strategy.credit(batch.signals(strategy)).region
        if region is not None:
            assert len(region.unique()) == 2, spec


# ── identities ──────────────────────────────────────────────────────────────────────────────────────────────────────


def credit(spec: object, batch: Batch | None = None) -> Credit:
    strategy = STRATEGIES.build(spec)  # type: ignore[arg-type]
    return strategy.credit((batch or random_batch()).signals(strategy))


def assert_same_credit(one: Credit, other: Credit) -> None:
    torch.testing.assert_close(one.sampled, other.sampled)
    assert (one.top_k is None) == (other.top_k is None)
    if one.top_k is not None:
        torch.testing.assert_close(one.top_k, other.top_k)


CLIP = {"name": "clip", "floor": -1.0}
SAME = [
    ({"name": "exopd", "scale": 1.0}, "opd"),
    ({"name": "opd-plus", "divergence": "reverse-kl"}, "opd"),
    ({"name": "reopold", "floor": -1e9}, "opd"),
    ({"name": "trust-region-aopd", "positive_weight": 0.0}, "trust-region"),
    (
        {"name": "reopold", "floor": -1.0},
        {"name": "trust-region", "region_rule": "threshold", "threshold": -1.0, "outlier": CLIP},
    ),
    (  # AOPD is TrOPD's on-policy part with the hard gate u >= 1
        {"name": "aopd", "top_k": K},
        {
            "name": "trust-region",
            "region_rule": "threshold",
            "threshold": -1e-5,
            "outlier": {"name": "forward-kl", "top_k": K},
        },
    ),
]


@pytest.mark.parametrize(("one", "other"), SAME, ids=[str(one) for one, _ in SAME])
def test_strategies_that_are_the_same(one: object, other: object) -> None:
    assert_same_credit(credit(one), credit(other))
    if credit(other).region is not None:
        assert torch.equal(credit(one).region, credit(other).region)  # type: ignore[arg-type]


def test_batch_scope_limits_are_opd() -> None:
    batch = random_batch()
    strategy = STRATEGIES.build("opd")
    signals = batch.signals(strategy)
    expected = strategy.credit(signals).sampled.masked_fill(~signals.student_wrote, 0.0)
    torch.testing.assert_close(credit({"name": "iw-opd", "strength": 0.0}).sampled, expected)
    torch.testing.assert_close(credit({"name": "entropy", "share": 1.0}).sampled, expected)


def test_aopd_margins_lead_to_opd_and_to_fkl() -> None:
    torch.testing.assert_close(credit({"name": "aopd", "margin": 1.0}).sampled, credit("opd").sampled)
    everywhere = credit({"name": "aopd", "margin": -1.0, "top_k": K})
    assert everywhere.sampled.abs().max() == 0.0
    assert_same_credit(everywhere, credit({"name": "fkl", "top_k": K}))


def test_jsd_reward_is_that_of_opd_plus_and_of_top_d() -> None:
    jsd = credit({"name": "jsd", "mix": 0.2}).sampled
    torch.testing.assert_close(jsd, credit({"name": "opd-plus", "mix": 0.2}).sampled)
    signals = random_batch().signals(STRATEGIES.build("opd"))
    top_d = F.mixture_reward(signals.student_logprob, signals.teacher_logprob, mix=0.2)
    torch.testing.assert_close(jsd, 0.8 * top_d)


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.5])
def test_reopold_floor_is_the_lowest_top_d_reward_over_its_mix(rate: float) -> None:
    mix = 1.0 - rate
    assert F.reward_floor(rate) == pytest.approx(math.log(1.0 - mix) / mix)
    lowest = F.mixture_reward(torch.tensor(0.0), torch.tensor(-1e4), mix=mix)
    assert float(lowest) == pytest.approx(F.reward_floor(rate) * mix)


def test_mean_acceptance_is_one_minus_total_variation() -> None:
    batch = random_batch()
    q, p = batch.student_logits.log_softmax(-1), batch.teacher_logits.log_softmax(-1)
    mean = (q.exp() * F.acceptance(q, p)).sum(-1)
    torch.testing.assert_close(mean, 1.0 - 0.5 * (q.exp() - p.exp()).abs().sum(-1))


def test_soft_trust_credit_is_bounded_by_one_over_e() -> None:
    reward = torch.linspace(-40.0, 3.0, 100_001, dtype=torch.float64)
    signals = Signals(
        student_logprob=torch.zeros_like(reward), teacher_logprob=reward, uniform=torch.full_like(reward, 0.5)
    )
    soft = STRATEGIES.build({"name": "trust-region", "region_rule": "soft", "outlier": "mask"}).credit(signals).sampled
    assert float(soft.min()) == pytest.approx(-1.0 / math.e, abs=1e-7)
    assert float(reward[soft.argmin()]) == pytest.approx(-1.0, abs=1e-3)


distribution = st.lists(st.floats(-12.0, 12.0), min_size=7, max_size=7).map(
    lambda logits: torch.tensor(logits, dtype=torch.float64).log_softmax(-1)
)


@settings(max_examples=200, deadline=None)
@given(distribution, distribution, st.integers(1, 7))
def test_tail_aware_kl_lies_between_zero_and_the_full_kl(q: Tensor, p: Tensor, k: int) -> None:
    top = p.topk(k).indices
    kl = float(F.topk_forward_kl(q[top], p[top], tail=True))
    full = float(F.kl_divergence(p, q))
    assert -1e-6 <= kl <= full + 1e-6
    gradient_bound = F.topk_forward_kl_credit(q[top], p[top])
    assert float((gradient_bound.sum() * q.exp()).max()) <= 1.0 + 1e-12


def test_gkd_at_mix_zero_is_fkl_over_the_whole_vocabulary() -> None:
    batch = random_batch(vocabulary=V)
    full = logit_gradient(credit({"name": "gkd", "mix": 0.0}, batch), batch)
    torch.testing.assert_close(full, logit_gradient(credit({"name": "fkl", "top_k": V}, batch), batch))
    tail = logit_gradient(credit({"name": "fkl", "top_k": V, "tail": True}, batch), batch)
    torch.testing.assert_close(full, tail, atol=1e-6, rtol=0.0)


def test_full_jsd_ends_are_not_limits() -> None:
    batch = random_batch()
    q, p = batch.student_logits.log_softmax(-1), batch.teacher_logits.log_softmax(-1)
    torch.testing.assert_close(F.full_jsd(q, p, mix=0.0), F.kl_divergence(p, q))
    torch.testing.assert_close(F.full_jsd(q, p, mix=1.0), F.kl_divergence(q, p))
    assert float(F.full_jsd(q, p, mix=1e-6).max()) < 1e-3
    torch.testing.assert_close(F.full_jsd(q, p, mix=1e-6) / 1e-6, F.kl_divergence(p, q), rtol=1e-3, atol=0.0)


# ── extreme values ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_impossible_token_is_an_outlier_even_at_uniform_zero() -> None:
    signals = Signals(student_logprob=torch.zeros(1), teacher_logprob=torch.full((1,), -1e4), uniform=torch.zeros(1))
    for rule in ("acceptance", "soft"):
        made = STRATEGIES.build({"name": "trust-region", "region_rule": rule, "outlier": "mask"}).credit(signals)
        assert made.sampled.tolist() == [0.0] and made.region is not None and made.region.tolist() == [Region.OUTLIER]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tail_credit_with_hardly_any_tail(dtype: torch.dtype) -> None:
    """The ratio (1-P)/(1-Q) must not turn rounding into gradient, nor drown what a heavy teacher tail has to say."""
    light = torch.tensor([0.7, 0.3 - 1e-5, 0.5e-5, 0.5e-5], dtype=dtype).log()
    heavy = torch.tensor([0.6, 0.3, 0.05, 0.05], dtype=dtype).log()
    for student, teacher in ((light, light), (heavy, light), (light, heavy)):
        made = F.topk_forward_kl_credit(student[:2], teacher[:2], tail=True)
        gradient = made.sum() * student.exp() - torch.cat([made, made.new_zeros(2)])
        q, p = student.double().exp(), teacher.double().exp()
        ratio = (1 - p[:2].sum()) / (1 - q[:2].sum())
        exact = (p[:2].sum() - ratio * q[:2].sum()) * q - torch.cat([p[:2] - ratio * q[:2], p.new_zeros(2)])
        torch.testing.assert_close(gradient.double(), exact, rtol=0.0, atol=2e-3 if dtype == torch.float32 else 1e-9)
        assert float(F.topk_forward_kl(student[:2], teacher[:2], tail=True)) >= -1e-6
    assert float(F.topk_forward_kl(light[:2], light[:2], tail=True)) == pytest.approx(0.0, abs=1e-7)


def test_mixture_is_exact_where_one_side_vanishes() -> None:
    zero, gone = torch.tensor(0.0, dtype=torch.float64), torch.tensor(-1e6, dtype=torch.float64)
    assert float(F.mixture_logprob(zero, gone, mix=0.2)) == pytest.approx(math.log(0.8))
    assert float(F.mixture_logprob(gone, zero, mix=0.2)) == pytest.approx(math.log(0.2))
    assert float(F.mixture_reward(gone, zero, mix=0.2)) == pytest.approx(1e6 + math.log(0.2))


def test_zero_log_zero_is_zero() -> None:
    dead = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log()
    assert float(F.entropy(dead)) == pytest.approx(math.log(2.0))
    assert float(F.kl_divergence(dead, dead)) == 0.0
    for mix in (0.0, 0.5, 1.0):
        assert float(F.full_jsd(dead, dead, mix=mix)) == 0.0
        assert F.full_jsd_credit(dead, dead, mix=mix).isfinite().all()
    assert F.jsd_direct_credit(dead, dead, mix=0.5).tolist() == [0.125, 0.125, 0.0]
    assert F.topk_forward_kl(dead, dead).item() == 0.0


def test_shapes_are_compared_by_name() -> None:
    with pytest.raises(ValueError, match=r"shapes differ: student_logprob \[2, 3\], teacher_logprob \[3\]"):
        F.k1_reward(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="shapes differ"):
        top_share(torch.zeros(2, 3), torch.ones(3, dtype=torch.bool), share=0.5)


@pytest.mark.parametrize("mix", [-0.1, 1.1, math.nan])
def test_mixture_refuses_weights_outside_the_unit_interval(mix: float) -> None:
    with pytest.raises(ValueError, match="mix must be between 0 and 1"):
        F.mixture_logprob(torch.zeros(1), torch.zeros(1), mix=mix)


# ── across tokens ───────────────────────────────────────────────────────────────────────────────────────────────────

NAN, INF = math.nan, math.inf


def test_top_share_counts_student_tokens_only_and_keeps_ties() -> None:
    values = torch.tensor([[5.0, 4.0, 4.0, 3.0, 2.0], [1.0, 0.5, NAN, INF, 9.0]])
    wrote = torch.tensor([[True] * 5, [True, True, False, False, False]])
    assert top_share(values, wrote, share=0.2).nonzero().tolist() == [[0, 0], [0, 1], [0, 2]]  # ceil(1.4) = 2, one tie
    assert top_share(values, wrote, share=1 / 7).nonzero().tolist() == [[0, 0]]
    assert torch.equal(top_share(values, wrote, share=1.0), wrote)
    assert not top_share(values, torch.zeros_like(wrote), share=0.2).any()


def test_top_share_of_five_tokens_is_one_token() -> None:
    """0.2 * 5 must not be rounded up to two by a last bit."""
    for n in range(5, 500, 5):
        assert int(top_share(torch.rand(n), torch.ones(n, dtype=torch.bool), share=0.2).sum()) == n // 5


def test_returns_against_loops() -> None:
    rewards = torch.tensor([[0.1, -0.2, 0.3, NAN], [NAN, 1.0, NAN, 3.0], [INF, INF, INF, INF]], dtype=torch.float64)
    wrote = torch.tensor([[True, True, True, False], [False, True, False, True], [False] * 4])
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for b, t in wrote.nonzero().tolist():
        later = [float(rewards[b, s]) for s in range(t + 1, 4) if wrote[b, s]]
        expected[b, t] = float(rewards[b, t]) + (sum(later) / len(later) if later else 0.0)
    torch.testing.assert_close(mean_of_later_return(rewards, wrote), expected)
    torch.testing.assert_close(expected[0, :3], torch.tensor([0.15, 0.1, 0.3], dtype=torch.float64))


def test_group_normalisation_against_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    wrote = torch.rand(5, 4, generator=generator) < 0.7
    values = values.masked_fill(~wrote, NAN)
    group = torch.tensor([11, -4, 11, -4, 99])
    found = group_normalized(values, wrote, group)
    for label in (11, -4):
        rows = group == label
        chosen = values[rows][wrote[rows]]
        torch.testing.assert_close(found[rows][wrote[rows]], (chosen - chosen.mean()) / chosen.std())
    assert found[4].abs().max() == 0.0  # a single rollout
    assert found[~wrote].abs().max() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -1234.5678, 1e-9])
def test_no_variance_no_credit(dtype: torch.dtype, value: float) -> None:
    """Rounding in sums of equal values must not be divided by its own standard deviation."""
    returns = torch.full((4, 37), value, dtype=dtype)
    wrote = torch.arange(37) < torch.tensor([37, 11, 1, 0]).unsqueeze(-1)
    returns = mean_of_later_return(torch.full_like(returns, value), wrote).masked_fill(wrote, value)
    assert group_normalized(returns, wrote, torch.zeros(4, dtype=torch.int64)).abs().max() == 0.0


def test_a_rollout_without_student_tokens_is_no_second_rollout() -> None:
    values = torch.tensor([[1.0, 2.0, 4.0], [NAN, NAN, NAN]])
    wrote = torch.tensor([[True, True, True], [False, False, False]])
    assert group_normalized(values, wrote, torch.zeros(2, dtype=torch.int64)).abs().max() == 0.0


def test_early_weight_against_loops() -> None:
    rewards = torch.tensor([[0.5, -1.0, 0.0, 0.5], [NAN, -2.0, INF, 2.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    wrote = torch.tensor([[True] * 4, [False, True, False, True], [True] * 4])
    found = early_weight(rewards, wrote, strength=0.5)
    expected = torch.tensor([[1.5, 1.375, 1.125, 1.125], [1.5, 1.5, 1.25, 1.25], [1.5] * 4], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


def test_reopold_stages() -> None:
    """First half: tokens below the floor are dropped. Second half: only the most uncertain count, floored."""
    reward = torch.tensor([[-3.0, -1.0, 0.5, -4.0, 1.0]], dtype=torch.float64)
    signals = Signals(
        student_logprob=torch.zeros_like(reward),
        teacher_logprob=reward,
        student_entropy=torch.tensor([[0.1, 0.2, 0.3, 2.0, 1.0]], dtype=torch.float64),
        progress=0.49,
    )
    strategy = STRATEGIES.build({"name": "reopold", "stages": 2, "floor": -2.0, "share": 0.4})
    assert strategy.scope == "batch" and STRATEGIES.build("reopold").scope == "token"
    first = strategy.credit(signals)
    assert first.sampled.tolist() == [[0.0, -1.0, 0.5, 0.0, 1.0]]
    assert first.region is not None and first.region.tolist() == [[0, 1, 1, 0, 1]]
    second = strategy.credit(signals.replace(progress=0.5))
    assert second.sampled.tolist() == [[0.0, 0.0, 0.0, -2.0, 1.0]]
    assert second.region is not None and second.region.tolist() == [[0, 0, 0, 2, 1]]
