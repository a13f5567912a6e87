"""No [B, T, V] tensor exists: allocations of score and update at a real vocabulary, counted."""

from __future__ import annotations

import pytest
import torch

from strategies import Credit
from tropd_cli.memory import is_out_of_memory, with_smaller_batches
from tropd_cli.scoring import CHUNK_BYTES

from .benchmarks.engine import Engine, equal_rows
from .benchmarks.growth import with_length, with_vocabulary
from .benchmarks.shapes import qwen2, random_pair
from .memory import allocations
from .tiny import full_logits, reference_loss

VOCABULARY = 151_936


def small_engine(vocabulary: int, strategy: str = "trust-region") -> Engine:
    return Engine(*random_pair(qwen2(vocabulary, hidden=32, layers=1)), strategy)


def test_the_largest_tensor_is_the_chunk_and_growth_is_under_a_third_of_full_logits() -> None:
    engine, batch = small_engine(VOCABULARY), equal_rows(4, 128, VOCABULARY)
    assert len(batch) == 512
    weights = {p.numel() * 4 for p in engine.student.model.parameters()}
    ours = allocations(lambda: engine.score_and_update(batch))
    engine.forget_gradient()

    def full() -> list[torch.Tensor]:
        top = full_logits(engine.teacher, batch).detach().log_softmax(-1).topk(64)
        loss = reference_loss(
            full_logits(engine.student, batch),
            batch.token_ids,
            top.indices,
            Credit(torch.ones(512), top_k=top.values.exp()),
            512,
        )
        loss.backward()
        return [loss]

    reference = allocations(full)
    assert ours.largest(apart_from=weights) <= CHUNK_BYTES["cpu"]
    assert reference.largest(apart_from=weights) >= 512 * VOCABULARY * 4
    gradient = max(weights)  # both hold the gradient of the embedding
    assert ours.peak - gradient < (reference.peak - gradient) / 3


def test_full_distributions_stay_inside_the_chunk() -> None:
    engine, batch = small_engine(VOCABULARY, "gkd"), equal_rows(1, 40, VOCABULARY)
    weights = {p.numel() * 4 for p in engine.student.model.parameters()}
    assert allocations(lambda: engine.score_and_update(batch)).largest(apart_from=weights) <= CHUNK_BYTES["cpu"]


def test_growth_with_vocabulary_is_under_two_percent_of_the_logits() -> None:
    """As much for doubling it. The chunks get fewer rows, and nothing else has the vocabulary's length but weights."""
    cases = list(with_vocabulary([VOCABULARY // 2, VOCABULARY], rows=2, length=128, hidden=32, layers=1))
    assert cases[1]["share_of_logits"] < 0.02


def test_growth_with_length_is_that_of_the_backbone_activations() -> None:
    """Twice the tokens, both more than a chunk holds: only what the backbone keeps for its backward pass grows."""
    engine = Engine(*random_pair(qwen2(32_768, hidden=128, layers=3)))
    _, longer = with_length(engine, [300, 600], rows=2)
    assert 0.85 < longer["ratio"] < 1.15


def test_one_student_and_one_teacher_forward_per_rollout() -> None:
    engine, calls = small_engine(1000), {"student": 0, "teacher": 0}
    for role, model in (("student", engine.student), ("teacher", engine.teacher)):
        model.backbone.register_forward_hook(lambda *_, role=role: calls.__setitem__(role, calls[role] + 1))
    engine.score_and_update(equal_rows(4, 16, 1000))
    assert calls == {"student": 1, "teacher": 1}


def test_memory_errors_are_told_from_others() -> None:
    assert is_out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        with_smaller_batches(
            lambda _: (_ for _ in ()).throw(RuntimeError("shapes differ")),
            8,
            smallest=1,
            knob="k",
            warn=print,
            alone=True,
        )
