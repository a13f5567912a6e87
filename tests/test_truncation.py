"""Truncated sampling (top-p, greedy) against the plain way: sort, add up, divide."""

from __future__ import annotations

import pytest
import torch

from tropd_cli.randomness import nucleus
from tropd_cli.rollout import KeyedSampling, Request


def truncated_softmax(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """The plain way: sort, add up until top_p is reached, divide by what is left."""
    probabilities = (logits.double() / temperature).softmax(-1)
    kept, mass = [], 0.0
    for token in probabilities.argsort(descending=True).tolist():
        if mass >= top_p:
            break
        kept.append(token)
        mass += float(probabilities[token])
    result = torch.zeros_like(probabilities)
    result[kept] = probabilities[kept] / mass
    return result


def test_20000_draws_follow_the_truncated_softmax() -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 2
    allowed = torch.ones(40, dtype=torch.bool)
    allowed[logits.argmax()] = False
    count = 20_000
    requests = [Request([1], [], 5, (0, i, 0)) for i in range(count)]
    sampling = KeyedSampling(requests, 1, (0, "x"), 0.8, allowed, 0.7)
    chosen = sampling(torch.zeros(count, 1, dtype=torch.int64), logits.expand(count, 40)).argmax(-1)
    expected = truncated_softmax(logits.masked_fill(~allowed, -torch.inf), 0.8, 0.7)
    seen = torch.bincount(chosen, minlength=40) / count
    assert 3 < (expected > 0).sum() < 20 and bool((seen[expected == 0] == 0).all())
    kept = expected > 0
    chi_square = (count * (seen - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi_square < kept.sum() + 4 * (2 * kept.sum()) ** 0.5
    greedy = KeyedSampling(requests[:2], 1, (0, "x"), 0.0, allowed)(torch.zeros(2, 1), logits.expand(2, 40)).argmax(-1)
    assert greedy.tolist() == [int(logits.masked_fill(~allowed, -torch.inf).argmax())] * 2


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.95, 0.9999])
def test_the_nucleus_of_a_flat_and_a_peaked_row_in_one_batch(top_p: float) -> None:
    logits = torch.randn(3, 2000, generator=torch.Generator().manual_seed(1)) * torch.tensor([[0.05], [1.0], [6.0]])
    kept = nucleus(logits, top_p).isfinite()
    for row in range(3):
        expected = truncated_softmax(logits[row], 1.0, top_p) > 0
        assert abs(int(kept[row].sum()) - int(expected.sum())) <= 1  # rounding at the edge of a flat row
        assert bool((kept[row] == expected)[: 2000 if row else 0].all())
