"""Responses come from q exactly, whatever the checkpoint recommends, and do not depend on how work is split."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from tropd_cli.models import load_model
from tropd_cli.randomness import inverse_cdf, permutation, uniform
from tropd_cli.rollout import (
    KeyedSampling,
    Request,
    TransformersGenerator,
    draw_prefix_length,
    exact_sampling_config,
    step_prefix_limit,
)

from .tiny import tiny_model, tiny_tokenizer, tiny_vocabulary

HOSTILE = GenerationConfig(
    do_sample=True,
    temperature=0.6,
    top_k=5,
    top_p=0.5,
    min_p=0.2,
    typical_p=0.5,
    repetition_penalty=1.3,
    no_repeat_ngram_size=2,
    min_length=5,
    bad_words_ids=[[7]],
    suppress_tokens=[8, 9],
    begin_suppress_tokens=[10],
    forced_eos_token_id=1,
    eos_token_id=1,
    pad_token_id=0,
)


def generator(model, **changes) -> TransformersGenerator:
    options = {"seed": 3, "stream": "student", "temperature": 1.0, "token_budget": 10_000} | changes
    return TransformersGenerator(model, tiny_vocabulary(), **options)


def test_20000_draws_follow_softmax_with_a_hostile_generation_config(tmp_path: Path) -> None:
    source = tiny_model("llama", seed=4)
    source.model.save_pretrained(tmp_path)
    HOSTILE.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = load_model(str(tmp_path), role="student", dtype=torch.float32, device=torch.device("cpu"))
    assert model.generation_config.repetition_penalty == 1.3  # it was read, and must not be used
    prompt = [5, 6, 7, 5, 6]
    count = 20_000
    drawn = generator(model, token_budget=6 * 4096)([Request(prompt, [], 1, (0, i, 0)) for i in range(count)])
    with torch.no_grad():
        logits = model.model(torch.tensor([prompt])).logits[0, -1]
    expected = logits.masked_fill(~tiny_vocabulary().allowed, -torch.inf).softmax(-1)
    seen = torch.bincount(torch.tensor([r[0] for r in drawn]), minlength=61) / count
    keep = expected * count > 5
    chi_square = (count * (seen - expected)[keep] ** 2 / expected[keep]).sum()
    assert keep.sum() > 10  # the configuration's top_k would leave 5
    assert chi_square < keep.sum() + 4 * (2 * keep.sum()) ** 0.5
    assert (seen - expected).abs().max() < 0.012


def test_temperature_tempers_the_draws() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    requests = [Request([1], [], 5, (0, i, 0)) for i in range(20_000)]
    sampling = KeyedSampling(requests, 1, (0, "x"), 2.0, torch.ones(4, dtype=torch.bool))
    chosen = sampling(torch.zeros(20_000, 1, dtype=torch.int64), logits.expand(20_000, 4)).argmax(-1)
    expected = (logits[0] / 2).softmax(-1)
    assert (torch.bincount(chosen, minlength=4) / 20_000 - expected).abs().max() < 0.012


def test_a_row_gets_the_same_tokens_alone_in_a_batch_and_after_its_own_prefix() -> None:
    model = tiny_model("qwen", dtype=torch.float64)  # left padding moves float32 log-probs a little
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14], [15, 16]]
    requests = [Request(p, [], 12, (2, slot, sample)) for slot, p in enumerate(prompts) for sample in range(2)]
    together = generator(model)(requests)
    alone = [generator(model)([r])[0] for r in requests]
    small = generator(model, token_budget=40)(list(reversed(requests)))[::-1]
    assert together == alone == small
    assert len({tuple(r) for r in together}) == len(together)
    continued = generator(model)(
        [Request(r.prompt_ids, full[:k], 12, r.key) for k, (r, full) in enumerate(zip(requests, together, strict=True))]
    )
    assert continued == together


@pytest.mark.parametrize("kind", ["llama", "qwen", "gemma", "cohere"])
def test_leaving_rows_and_shared_contexts_change_no_token(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(kind, dtype=torch.float64)
    prompts = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14]]
    requests = [
        Request(prompts[slot], [4, 3][:slot], limit, (0, slot, sample))
        for slot in range(3)
        for sample, limit in enumerate((3, 100, 5, 9))
    ]
    seen: list[tuple[int, ...]] = []
    model.backbone.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    written = generator(model)(requests)
    assert seen[0] == (3, 5), "every different context once, but for its last token"
    assert seen[1] == (12, 1)
    sizes = [rows for rows, _ in seen[1:]]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] <= 2 and len(set(sizes)) >= 3
    monkeypatch.setattr("tropd_cli.rollout.ROWWISE", frozenset())  # as for a model with another kind of cache
    seen.clear()
    assert generator(model)(requests) == written
    assert {rows for rows, _ in seen} == {12}


def test_rows_stop_at_their_own_limit_and_complete_prefixes_get_no_continuation() -> None:
    model = tiny_model("qwen")
    ended, full = [9, 1], [9, 8, 7]
    responses = generator(model)(
        [Request([5], ended, 6, (0, 0, 0)), Request([5], full, 3, (0, 1, 0)), Request([5], [9], 4, (0, 2, 0))]
    )
    assert responses[0] == ended and responses[1] == full
    assert responses[2][0] == 9 and 2 <= len(responses[2]) <= 4


def test_every_stop_id_ends_a_response_and_stays_in_it() -> None:
    model = tiny_model("qwen")
    vocabulary = tiny_vocabulary()
    many = generator(model, seed=1)
    many.vocabulary = type(vocabulary)(vocabulary.allowed, tuple(range(30, 61)), 0)
    for response in many([Request([5, 6], [], 20, (0, i, 0)) for i in range(32)]):
        assert all(token < 30 for token in response[:-1])
        assert response[-1] >= 30 or len(response) == 20


def test_pad_equal_to_eos_keeps_the_final_eos() -> None:
    model = tiny_model("qwen")
    same = generator(model)
    same.vocabulary = type(same.vocabulary)(same.vocabulary.allowed, (1,), pad_id=1)
    apart = generator(model)
    requests = [Request([5, 6], [], 30, (0, i, 0)) for i in range(24)]
    assert same(requests) == apart(requests)
    assert any(r[-1] == 1 for r in same(requests))


def test_forbidden_ids_are_never_drawn() -> None:
    model = tiny_model("qwen")
    limited = generator(model)
    allowed = torch.zeros(61, dtype=torch.bool)
    allowed[[1, 20, 21]] = True
    limited.vocabulary = type(limited.vocabulary)(allowed, (1,), 0)
    drawn = {t for r in limited([Request([5], [], 10, (0, i, 0)) for i in range(16)]) for t in r}
    assert drawn <= {1, 20, 21} and len(drawn) == 3


def test_generation_config_leaves_nothing_to_defaults() -> None:
    config = exact_sampling_config(7, tiny_vocabulary())
    neutral = {
        "do_sample": False,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "min_length": 0,
    }
    assert {name: getattr(config, name) for name in neutral} == neutral


def test_inverse_cdf_equals_a_float64_search_over_a_large_vocabulary() -> None:
    torch.manual_seed(0)
    logits = torch.randn(40, 151_936) * 3
    draws = uniform(0, "test", torch.arange(40))
    cumulative = logits.double().softmax(-1).cumsum(-1)
    expected = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)[:, 0]
    assert torch.equal(inverse_cdf(logits, draws), expected)


@pytest.mark.parametrize("draw", [1e-16, 0.5, 1 - 1e-16])
def test_inverse_cdf_never_points_at_an_impossible_token(draw: float) -> None:
    logits = torch.full((1, 50), -torch.inf)
    logits[0, [13, 14]] = torch.tensor([0.0, -30.0])
    assert inverse_cdf(logits, torch.tensor([draw], dtype=torch.float64)).item() in (13, 14)


def test_uniform_numbers_are_uniform_and_depend_on_every_part_of_the_key() -> None:
    draws = uniform(0, "stream", 1, torch.arange(100_000))
    assert abs(draws.mean() - 0.5) < 0.004 and abs(draws.var() - 1 / 12) < 0.002
    assert draws.min() > 0 and draws.max() < 1
    base = uniform(0, "stream", 1, 2, 3).item()
    others = [uniform(1, "stream", 1, 2, 3), uniform(0, "other", 1, 2, 3), uniform(0, "stream", 2, 1, 3)]
    assert len({base, *(float(o) for o in others)}) == 4
    neighbours = uniform(0, "stream", torch.arange(1000), 5), uniform(0, "stream", torch.arange(1000), 6)
    assert abs(torch.corrcoef(torch.stack(neighbours))[0, 1]) < 0.1


def test_permutation_is_keyed_and_complete() -> None:
    assert sorted(permutation(0, "order", 0, 50)) == list(range(50))
    assert permutation(0, "order", 0, 50) != permutation(0, "order", 1, 50)


def test_prefix_limit_follows_the_cosine_and_lengths_are_uniform_below_it() -> None:
    assert [step_prefix_limit(s, 200, 8096) for s in (0, 50, 100, 150, 200)] == [8096, 6910, 4048, 1185, 0]
    draws = [draw_prefix_length(0, 3, slot, response_length=9, limit=4, rule="uniform") for slot in range(4000)]
    counts = [draws.count(length) for length in range(5)]
    assert sum(counts) == 4000 and all(abs(c - 800) < 120 for c in counts)
    assert draw_prefix_length(0, 3, 1, response_length=9, limit=4, rule="min") == 4
    assert draw_prefix_length(0, 3, 1, response_length=2, limit=4, rule="min") == 2
