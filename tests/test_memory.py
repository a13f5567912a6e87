"""No [B, T, V] tensor exists: allocations of score and update at a real vocabulary, counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from strategies import Credit
from tropd_cli.errors import UserError
from tropd_cli.memory import OutOfMemory, in_step, is_out_of_memory, with_smaller_batches
from tropd_cli.scoring import CHUNK_BYTES

from .benchmarks.engine import Engine, equal_rows, with_packing
from .benchmarks.growth import with_length, with_vocabulary
from .benchmarks.shapes import qwen2, random_pair
from .memory import allocations
from .tiny import full_logits, reference_loss

VOCABULARY = 151_936


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that even a short batch fills, so that a chunk is as large for twice the tokens or the vocabulary."""
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 64 * 2**20)


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


@pytest.mark.usefixtures("small_chunks")
def test_growth_with_vocabulary_is_under_two_percent_of_the_logits() -> None:
    """As much for doubling it. The chunks get fewer rows, and nothing else has the vocabulary's length but weights."""
    cases = list(with_vocabulary([VOCABULARY // 2, VOCABULARY], rows=2, length=256, hidden=32, layers=1))
    assert cases[1]["share_of_logits"] < 0.02


@pytest.mark.usefixtures("small_chunks")
def test_growth_with_length_is_that_of_the_backbone_activations() -> None:
    """Twice the tokens, both more than a chunk holds: only what the backbone keeps for its backward pass grows."""
    engine = with_packing(Engine(*random_pair(qwen2(32_768, hidden=128, layers=3))))
    _, longer = with_length(engine, [550, 1100], rows=2)
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
        )


def test_all_processes_go_on_with_the_same_smaller_batch_when_one_is_short() -> None:
    """Process 1 is short at 40 and at 20 tokens; its longest row has 9, ours 30."""
    tried, warnings = [], []
    theirs: list[Any] = [("CUDA out of memory", 9), ("CUDA out of memory", 9), None]
    result = with_smaller_batches(
        lambda budget: tried.append(budget) or budget, 40, smallest=30, knob="micro_batch_tokens",
        warn=warnings.append, exchange=lambda mine: [mine, theirs[len(tried) - 1]],
    )  # fmt: skip
    assert result == (10, 10) and tried == [40, 20, 10]
    assert warnings[0] == "out of memory in process 1; going on with micro_batch_tokens: 20"


def test_all_processes_end_when_one_is_short_with_single_rows() -> None:
    with pytest.raises(UserError, match=r"out of memory in process 1 \(no room\). Try gradient_checkpointing"):
        with_smaller_batches(
            lambda budget: budget, 8, smallest=4, knob="k", warn=print, exchange=lambda mine: [mine, ("no room", 8)]
        )


def test_a_step_of_all_processes_fails_on_all_of_them() -> None:
    def short() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert in_step(lambda: "here", lambda failed: [failed, False]) == "here"
    with pytest.raises(torch.OutOfMemoryError):
        in_step(short, None)
    with pytest.raises(OutOfMemory) as here:
        in_step(short, lambda failed: [failed, False])
    with pytest.raises(OutOfMemory) as elsewhere:
        in_step(lambda: "here", lambda failed: [failed, True])
    assert (here.value.elsewhere, elsewhere.value.elsewhere) == (False, True)
    said: list[Any] = []

    def exchange(mine: Any) -> list[Any]:
        said.append(mine)
        return [mine, None if len(said) == 2 else ("no room", 1)]

    def first_time_elsewhere(budget: int) -> int:
        return budget if said else in_step(lambda: budget, lambda failed: [failed, True])

    result = with_smaller_batches(first_time_elsewhere, 8, smallest=4, knob="k", warn=print, exchange=exchange)
    assert result == (4, 4) and said == [None, None]  # what happened in another process is not said again as ours
