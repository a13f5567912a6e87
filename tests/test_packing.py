"""Packed sequences: the same numbers as padded rows, and only for models that can."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from strategies import STRATEGIES, Needs
from tropd_cli.batching import plan_micro_batches, token_batch
from tropd_cli.credit_loss import CreditLoss, CreditRequest
from tropd_cli.crediting import region_uniforms, token_credit
from tropd_cli.models import LanguageModel, add_lora
from tropd_cli.packing import ATTENTION, enable_packing
from tropd_cli.scoring import ScoringOptions, score_teacher

from .tiny import SHAPE, random_rollout, tiny_model, tiny_vocabulary

IDS = [5, 9, 17, 30, 8]


def packs(model: LanguageModel) -> bool:
    return enable_packing(model.model, model.backbone, IDS, tolerance=1e-5)


@pytest.mark.parametrize("how", ["full", "lora", "checkpointing"])
@pytest.mark.parametrize("kind", ["llama", "qwen", "cohere"])
def test_packed_rows_give_the_loss_record_and_gradient_of_padded_ones(kind: str, how: str) -> None:
    student, teacher = tiny_model(kind, dtype=torch.float64), tiny_model("llama", seed=5, dtype=torch.float64)
    assert packs(student) and packs(teacher)
    if how == "checkpointing":
        student.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if how == "lora":
        student = add_lora(student, rank=3, alpha=6, targets=["q_proj", "v_proj"])
        student.model.double()
    rollout = random_rollout([9, 4, 1, 7])
    rollout.teacher_prompt_ids = [ids[:-1] for ids in rollout.prompt_ids]  # another layout for the teacher
    strategy = STRATEGIES.build("trust-region")
    needs = strategy.needs | Needs(teacher_logprob=True, student_entropy=True)
    results = []
    for packed in (False, True):
        batch = token_batch(rollout, [1, 0, 3, 2], pad_id=0, packed=packed)
        assert batch.inputs.shape[0] == (1 if packed else 4)
        scores = score_teacher(teacher, batch, needs, ScoringOptions(1.0, tiny_vocabulary().allowed))
        request = CreditRequest(needs, token_credit(strategy, 0.001), 21, uniforms=region_uniforms(0, batch))
        loss, record = CreditLoss(student)(batch, scores, request)
        loss.backward()
        gradient = {n: p.grad for n, p in student.model.named_parameters() if p.grad is not None}
        student.model.zero_grad(set_to_none=True)
        results.append((loss, record, gradient, scores.teacher_topk_logprob))
    assert results[0][2] and not torch.equal(results[0][0], torch.zeros(()))
    single = kind == "cohere"  # its norms sum in float32, in an order that depends on the layout
    torch.testing.assert_close(results[1], results[0], atol=1e-8 if single else 1e-12, rtol=1e-5 if single else 1e-10)


def test_packing_is_for_plain_causal_attention_only() -> None:
    assert not packs(tiny_model("gemma"))  # soft-capped attention, sliding windows
    shape = {**SHAPE, "vocab_size": 61}
    sliding = MistralForCausalLM(MistralConfig(sliding_window=3, **shape))
    assert not packs(LanguageModel(sliding, "sliding", 61, GenerationConfig()))
    eager = tiny_model("llama")
    eager.model.set_attn_implementation("eager")
    assert not packs(eager)
    assert eager.model.config._attn_implementation == "eager"


def test_a_model_that_drops_the_lengths_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    assert isinstance(model.model, LlamaForCausalLM)
    forward = model.model.model.forward
    monkeypatch.setattr(model.model.model, "forward", lambda **given: forward(input_ids=given["input_ids"]))
    assert not packs(model)
    assert model.model.config._attn_implementation == "sdpa"
    monkeypatch.setattr(model.model.model, "forward", lambda input_ids, use_cache: forward(input_ids=input_ids))
    assert not packs(model)
    monkeypatch.undo()
    assert packs(model)
    assert model.model.config._attn_implementation == ATTENTION
    assert ATTENTION not in model.model.config.to_json_string()


def test_packed_micro_batches_hold_as_many_tokens_as_the_budget() -> None:
    lengths = [5, 90, 30, 31, 7, 200, 64]
    plan = plan_micro_batches(lengths, 100, packed=True)
    assert sorted(row for rows in plan for row in rows) == list(range(7))
    assert plan == [[5], [1], [6, 3], [2, 4, 0]]
