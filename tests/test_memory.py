"""No [B, T, V] tensor exists: allocations of score and update at a real vocabulary, counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from strategies import STRATEGIES, Credit, Needs
from tropd_cli.batching import TokenBatch, token_batch
from tropd_cli.credit_loss import CreditLoss, CreditRequest
from tropd_cli.crediting import region_uniforms, token_credit
from tropd_cli.errors import UserError
from tropd_cli.memory import OutOfMemory, in_step, is_out_of_memory, with_smaller_batches
from tropd_cli.models import LanguageModel
from tropd_cli.scoring import CHUNK_BYTES, ScoringOptions, score_teacher

from .memory import allocations
from .tiny import full_logits, random_rollout, reference_loss

VOCABULARY = 151_936


def small_qwen(vocabulary: int, seed: int) -> LanguageModel:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    return LanguageModel(Qwen2ForCausalLM(config), "small", vocabulary, GenerationConfig(eos_token_id=1))


def score_and_update(
    student: LanguageModel, teacher: LanguageModel, batch: TokenBatch, name: str
) -> Callable[[], list[torch.Tensor]]:
    strategy = STRATEGIES.build(name)
    needs = strategy.needs | Needs(teacher_logprob=True, student_entropy=True)
    allowed = torch.ones(student.vocabulary, dtype=torch.bool)
    module = CreditLoss(student)

    def step() -> list[torch.Tensor]:
        scores = score_teacher(teacher, batch, needs, ScoringOptions(1.0, allowed))
        request = CreditRequest(needs, token_credit(strategy, 0.001), len(batch), uniforms=region_uniforms(0, batch))
        loss, _ = module(batch, scores, request)
        loss.backward()
        return [loss]

    return step


def test_the_largest_tensor_is_the_chunk_and_growth_is_under_a_third_of_full_logits() -> None:
    student, teacher = small_qwen(VOCABULARY, 0), small_qwen(VOCABULARY, 1)
    batch = token_batch(random_rollout([128] * 4, vocabulary=VOCABULARY), [0, 1, 2, 3], pad_id=0)
    assert len(batch) == 512
    weights = {p.numel() * 4 for p in student.model.parameters()}
    ours = allocations(score_and_update(student, teacher, batch, "trust-region"))
    student.model.zero_grad(set_to_none=True)

    def full() -> list[torch.Tensor]:
        top = full_logits(teacher, batch).detach().log_softmax(-1).topk(64)
        loss = reference_loss(
            full_logits(student, batch),
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
    student, teacher = small_qwen(VOCABULARY, 0), small_qwen(VOCABULARY, 1)
    batch = token_batch(random_rollout([40], vocabulary=VOCABULARY), [0], pad_id=0)
    weights = {p.numel() * 4 for p in student.model.parameters()}
    assert (
        allocations(score_and_update(student, teacher, batch, "gkd")).largest(apart_from=weights) <= CHUNK_BYTES["cpu"]
    )


def test_doubling_the_vocabulary_adds_no_logits() -> None:
    peaks = []
    for vocabulary in (VOCABULARY // 2, VOCABULARY):
        student, teacher = small_qwen(vocabulary, 0), small_qwen(vocabulary, 1)
        batch = token_batch(random_rollout([128] * 2, vocabulary=vocabulary), [0, 1], pad_id=0)
        weights = sum({p.numel() * 4 for p in student.model.parameters() if p.numel() > 10**6})
        peaks.append(allocations(score_and_update(student, teacher, batch, "trust-region")).peak - 2 * weights)
    assert peaks[1] - peaks[0] < 0.02 * 256 * VOCABULARY * 4


def test_growth_with_length_is_that_of_per_token_results() -> None:
    """Four times the tokens: the chunks stay, only activations, hidden states and top-k grow."""
    student, teacher = small_qwen(VOCABULARY, 0), small_qwen(VOCABULARY, 1)
    peaks = []
    for length in (64, 192):
        batch = token_batch(random_rollout([length] * 2, vocabulary=VOCABULARY), [0, 1], pad_id=0)
        peaks.append(allocations(score_and_update(student, teacher, batch, "trust-region")).peak)
        student.model.zero_grad(set_to_none=True)
    per_token = (peaks[1] - peaks[0]) / (2 * (192 - 64))
    assert per_token < 0.05 * VOCABULARY * 4


def test_one_student_and_one_teacher_forward_per_rollout() -> None:
    student, teacher = small_qwen(1000, 0), small_qwen(1000, 1)
    calls = {"student": 0, "teacher": 0}
    for role, model in (("student", student), ("teacher", teacher)):
        model.backbone.register_forward_hook(lambda *_, role=role: calls.__setitem__(role, calls[role] + 1))
    batch = token_batch(random_rollout([16] * 4, vocabulary=1000), [0, 1, 2, 3], pad_id=0)
    score_and_update(student, teacher, batch, "trust-region")()
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
