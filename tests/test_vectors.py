"""Golden numbers through the public interface: STRATEGIES.build(...).credit(...), float64, nats.

Origin: worked out by hand from the formulas of the papers, on the toy p = [.5, .3, .15, .05], q = [.2, .3, .1, .4] with
k = 2, so V_k = {0, 1}, P = .8, Q = .5.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from strategies import OUTLIERS, STRATEGIES, Credit, Region, Signals
from strategies.functional import reward_floor, topk_forward_kl
from strategies.guidance import prefix_limit
from strategies.testing import Batch, expected_gradient, logit_gradient

P, Q = [0.5, 0.3, 0.15, 0.05], [0.2, 0.3, 0.1, 0.4]
REWARD = [0.91629073, 0.0, 0.40546511, -2.07944154]


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def toy(*, uniform: float = 0.5) -> Batch:
    """One row per token of the vocabulary, sampled once each."""

    def rows(probabilities: list[float]) -> Tensor:
        return tensor(probabilities).log().expand(4, 1, 4)

    draws = torch.full((4, 1), uniform, dtype=torch.float64)
    return Batch(rows(Q), rows(P), torch.arange(4).unsqueeze(-1), uniform=draws)


def credit_of(spec: object, *, uniform: float = 0.5) -> Credit:
    strategy = STRATEGIES.build(spec)  # type: ignore[arg-type]
    return strategy.credit(toy(uniform=uniform).signals(strategy))


def sampled(spec: object, **options: float) -> Tensor:
    return credit_of(spec, **options).sampled.squeeze(1)


def gradient(credit: Credit, token: int) -> Tensor:
    return logit_gradient(credit, toy())[token, 0]


def ascent(spec: object) -> Tensor:
    return -expected_gradient(STRATEGIES.build(spec), tensor(Q).log(), tensor(P).log())[0]  # type: ignore[arg-type]


def close(found: Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, tensor(expected), rtol=0.0, atol=5e-9)


def test_1_opd_is_the_k1_policy_gradient() -> None:
    credit = credit_of("opd")
    close(credit.sampled.squeeze(1), REWARD)
    close(gradient(credit, 3), [-0.41588831, -0.62383246, -0.20794415, 1.24766493])
    close(ascent("opd"), [0.30485254, 0.18239159, 0.10134371, -0.58858783])


def test_2_trust_region_draw_and_its_expectation() -> None:
    mask = {"name": "trust-region", "outlier": "mask"}
    assert sampled(mask, uniform=0.1249999)[3] == pytest.approx(REWARD[3])
    assert sampled(mask, uniform=0.1250001)[3] == 0.0
    close(sampled(mask, uniform=0.9999999), [*REWARD[:3], 0.0])
    close(sampled({**mask, "region_rule": "soft"}), [0.91629073, 0.0, 0.40546511, -0.25993019])
    region = credit_of({**mask, "region_rule": "soft"}).region
    assert region is not None and region.squeeze(1).tolist() == [Region.TRUST] * 3 + [Region.OUTLIER]


def topk_signals(student: list[float], teacher: list[float]) -> Signals:
    return Signals(
        student_logprob=tensor([0.5]).log(),
        student_topk_logprob=tensor(student).log().unsqueeze(0),
        teacher_topk_logprob=tensor(teacher).log().unsqueeze(0),
    )


def topk_value(student: list[float], teacher: list[float], **options: object) -> float:
    """The loss whose gradient the estimator's credit is."""
    return float(topk_forward_kl(tensor(student).log(), tensor(teacher).log(), **options))  # type: ignore[arg-type]


def test_3_topk_forward_kl_in_its_three_forms() -> None:
    close(gradient(credit_of({"name": "fkl", "top_k": 2}), 0), [-0.34, -0.06, 0.08, 0.32])
    assert topk_value(Q[:2], P[:2]) == pytest.approx(0.45814537, abs=5e-9)
    assert topk_value(Q[:2], P[:2], renormalize="teacher") == pytest.approx(0.79582526, abs=5e-9)
    assert topk_value(Q[:2], P[:2], renormalize="both") == pytest.approx(0.10267808, abs=5e-9)
    eopd = credit_of({"name": "eopd", "top_k": 2})  # the teacher's entropy is 1.14 nats, above 0.8
    close(eopd.top_k[0, 0], [0.625, 0.375])  # type: ignore[index]
    close(eopd.sampled.squeeze(1), REWARD)


def test_3_negative_case_keeps_its_gradient() -> None:
    teacher, student = [0.4, 0.3], [0.5, 0.4]
    assert topk_value(student, teacher) == pytest.approx(-0.17556204, abs=5e-9)
    assert topk_value(student, teacher, tail=True) == pytest.approx(0.15402164, abs=5e-9)
    full = topk_value([0.5, 0.4, 0.05, 0.05], [0.4, 0.3, 0.2, 0.1])
    assert full == pytest.approx(0.17101155, abs=5e-9)
    plain = OUTLIERS.build({"name": "forward-kl", "top_k": 2}).estimate(topk_signals(student, teacher))
    close(plain.top_k[0], teacher)  # type: ignore[index]


def test_4_jsd_parts() -> None:
    credit = credit_of({"name": "jsd", "top_k": 2})
    close(credit.sampled.squeeze(1), [0.27980789, 0.0, 0.11157178, -0.28768207])
    direct = Credit(sampled=torch.zeros_like(credit.sampled), top_k=credit.top_k)
    close(gradient(direct, 0), [-0.04214286, -0.03107143, 0.01464286, 0.05857143])


def test_5_tail_bucket() -> None:
    assert topk_value(Q[:2], P[:2], tail=True) == pytest.approx(0.27488722, abs=5e-9)
    assert topk_value(Q[:2], P[:2], tail=True) - topk_value(Q[:2], P[:2]) == pytest.approx(-0.18325815, abs=5e-9)
    close(gradient(credit_of({"name": "fkl", "top_k": 2, "tail": True}), 0), [-0.3, 0.0, 0.06, 0.24])


@pytest.mark.parametrize("rule", ["acceptance", "soft"])
def test_6_trust_region_in_expectation(rule: str) -> None:
    trust = [0.15929163, -0.03594977, 0.02856325, -0.15190511]
    close(ascent({"name": "trust-region", "region_rule": rule, "outlier": "mask"}), trust)
    both = ascent({"name": "trust-region", "region_rule": rule, "outlier": {"name": "forward-kl", "top_k": 2}})
    close(both - tensor(trust), [0.35 * g for g in (0.34, 0.06, -0.08, -0.32)])


def test_7_top_d_reward_return_and_normalisation() -> None:
    assert STRATEGIES.build({"name": "top-d"}).ratio_clip == (0.2, 0.2)
    # Rewards [.1, -.2, .3] give returns [.15, .1, .3]; with a second rollout of return 0 the group's mean is .1375 and
    # its unbiased standard deviation .12499.
    returns = tensor([0.15, 0.1, 0.3, 0.0])
    rewards = tensor([0.1, -0.2, 0.3])
    ratio = ((rewards.exp() - 0.8) / 0.2).log()  # solves log(.2 u + .8) = r
    signals = Signals(
        student_logprob=torch.zeros(2, 3, dtype=torch.float64),
        teacher_logprob=torch.stack([ratio, torch.zeros(3, dtype=torch.float64)]),
        mask=torch.tensor([[True, True, True], [True, False, False]]),
        group=torch.zeros(2, dtype=torch.int64),
    )
    credit = STRATEGIES.build("top-d").credit(signals).sampled
    expected = (returns - returns.mean()) / returns.std()
    close(torch.cat([credit[0], credit[1, :1]]), expected.tolist())


def test_7_top_d_bounded_reward() -> None:
    """The reward itself, as `opd-plus` shows it: (1 - mix) log(mix u + 1 - mix)."""
    reward = sampled({"name": "opd-plus", "mix": 0.2}) / 0.8
    close(reward, [0.26236426, 0.0, 0.09531018, -0.19237189])


def test_7_iw_opd_weights() -> None:
    reward = tensor([0.5, -1.0, 0.0, 0.5])
    signals = Signals(student_logprob=torch.zeros(1, 4, dtype=torch.float64), teacher_logprob=reward.unsqueeze(0))
    credit = STRATEGIES.build({"name": "iw-opd", "strength": 0.5}).credit(signals).sampled[0]
    close(credit, [1.5 * 0.5, 1.375 * -1.0, 0.0, 1.125 * 0.5])


@pytest.mark.parametrize(
    ("step", "tokens"), [(0, 8096.0), (50, 6910.37), (100, 4048.0), (150, 1185.63), (200, 0.0), (400, 0.0)]
)
def test_8_cosine_prefix_limit(step: int, tokens: float) -> None:
    assert prefix_limit(step, 200, 8096) == pytest.approx(tokens, abs=5e-3)


@pytest.mark.parametrize(("rate", "floor"), [(0.1, -2.5584), (0.2, -2.0118), (0.3, -1.7200), (0.5, -1.3863)])
def test_reopold_floor(rate: float, floor: float) -> None:
    assert reward_floor(rate) == pytest.approx(floor, abs=5e-5)
