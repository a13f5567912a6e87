"""The fused loss against plain autograd on full logits."""

from __future__ import annotations

import pytest
import torch

from strategies import Credit, Needs, Signals
from tropd_cli.batching import plan_micro_batches, token_batch
from tropd_cli.credit_loss import CreditLoss, CreditRequest
from tropd_cli.models import add_lora
from tropd_cli.scoring import Scores, ScoringOptions, score_teacher

from .tiny import KINDS, full_logits, random_rollout, reference_loss, tiny_model, tiny_vocabulary

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
CREDITS = {
    "sampled": Needs(),
    "top-k": Needs(teacher_top_k=5),
    "full": Needs(full_distribution=True),
    "all": Needs(teacher_top_k=5, full_distribution=True),
}


def random_credit(needs: Needs, count: int, vocabulary: int, dtype: torch.dtype) -> Credit:
    generator = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return Credit(
        sampled=draw(count),
        top_k=draw(count, needs.teacher_top_k) if needs.teacher_top_k else None,
        full=draw(count, vocabulary) if needs.full_distribution else None,
    )


def cut(credit: Credit, where: slice) -> Credit:
    parts = {name: getattr(credit, name) for name in ("sampled", "top_k", "full")}
    return Credit(**{name: None if value is None else value[where] for name, value in parts.items()})


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("lora", ["none", "attention", "head"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_autograd_on_full_logits(kind: str, lora: str, dtype: torch.dtype) -> None:
    student = tiny_model(kind, dtype=dtype)
    if lora != "none":
        student = add_lora(
            student, rank=3, alpha=6, targets=["q_proj", "v_proj"] + (["lm_head"] if lora == "head" else [])
        )
        torch.manual_seed(1)
        for name, parameter in student.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        student.model.to(dtype)
    teacher = tiny_model("llama", seed=5, dtype=dtype)
    rollout = random_rollout([9, 4, 1, 7])
    batch = token_batch(rollout, [0, 1, 2, 3], pad_id=0)
    options = ScoringOptions(1.3, tiny_vocabulary().allowed)
    module = CreditLoss(student, temperature=1.3, chunk_tokens=6)
    for name, needs in CREDITS.items():
        scores = score_teacher(teacher, batch, needs, options)
        credit = random_credit(needs, len(batch), 61, dtype)
        request = CreditRequest(needs, lambda _, where, credit=credit: cut(credit, where), num_tokens=17)
        loss, record = module(batch, scores, request)
        loss.backward()
        got = gradients(student.model)
        logits = full_logits(student, batch, temperature=1.3)
        expected = reference_loss(logits, batch.token_ids, scores.teacher_topk_ids, credit, 17)
        expected.backward()
        want = gradients(student.model)
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(loss, expected, atol=tolerance * 10, rtol=tolerance * 10, msg=name)
        logprobs = logits.detach().log_softmax(-1)
        torch.testing.assert_close(
            record["student_logprob"], logprobs.gather(1, batch.token_ids[:, None])[:, 0], atol=tolerance * 10, rtol=0
        )
        torch.testing.assert_close(
            record["student_entropy"], -(logprobs.exp() * logprobs).sum(-1), atol=tolerance * 10, rtol=0
        )
        assert got.keys() == want.keys()
        scale = max(g.abs().max().item() for g in want.values())
        for parameter in want:
            torch.testing.assert_close(
                got[parameter], want[parameter], atol=tolerance * scale, rtol=tolerance * 10, msg=f"{name} {parameter}"
            )


@pytest.mark.parametrize("lora", [False, True], ids=["plain head", "adapted head"])
def test_under_autocast_the_head_multiplies_in_half_precision_as_the_model_does(lora: bool) -> None:
    student = tiny_model("llama")
    if lora:
        student = add_lora(student, rank=3, alpha=6, targets=["q_proj", "lm_head"])
    batch = token_batch(random_rollout([9, 4, 7]), [0, 1, 2], pad_id=0)
    credit = random_credit(CREDITS["sampled"], len(batch), 61, torch.float32)
    scores = Scores(teacher_logprob=torch.zeros(len(batch)))
    request = CreditRequest(Needs(), lambda _, where: cut(credit, where), num_tokens=17)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, record = CreditLoss(student, chunk_tokens=6)(batch, scores, request)
        own = student.model(input_ids=batch.inputs, use_cache=False).logits.float().flatten(0, 1)[batch.predicts]
    loss.backward()
    got = gradients(student.model)
    reference_loss(own, batch.token_ids, None, credit, 17).backward()
    want = gradients(student.model)
    logprob = own.detach().log_softmax(-1).gather(1, batch.token_ids[:, None])[:, 0]
    torch.testing.assert_close(record["student_logprob"], logprob, atol=1e-5, rtol=0)  # float32 products: some 1e-3 off
    for name, gradient in want.items():
        gap = (got[name] - gradient).abs().max()
        assert gap <= 0.01 * gradient.abs().max(), name  # chunks sum in float32, one product in bfloat16


def test_micro_batches_of_uneven_size_add_up_to_one_batch() -> None:
    student, teacher = tiny_model("qwen", dtype=torch.float64), tiny_model("llama", seed=5, dtype=torch.float64)
    rollout = random_rollout([9, 4, 1, 7, 12, 2])
    needs = Needs(teacher_logprob=True, teacher_top_k=5)
    credit_of = lambda s, _: Credit(s.teacher_logprob - s.student_logprob, top_k=s.teacher_topk_logprob.exp())  # noqa: E731
    module = CreditLoss(student)

    def run(plan: list[list[int]]) -> tuple[float, dict[str, torch.Tensor]]:
        total = 0.0
        for rows in plan:
            batch = token_batch(rollout, rows, pad_id=0)
            scores = score_teacher(teacher, batch, needs, ScoringOptions(1.0, tiny_vocabulary().allowed))
            loss, _ = module(batch, scores, CreditRequest(needs, credit_of, num_tokens=35))
            loss.backward()
            total += loss.item()
        return total, gradients(student.model)

    one, one_grads = run([[0, 1, 2, 3, 4, 5]])
    four, four_grads = run([[4], [0, 3, 2], [1], [5]])
    assert one == pytest.approx(four, abs=1e-12)
    for name, grad in one_grads.items():
        torch.testing.assert_close(grad, four_grads[name], atol=1e-12, rtol=1e-10)


def test_padding_content_changes_nothing() -> None:
    student, teacher = tiny_model("llama", dtype=torch.float64), tiny_model("llama", seed=5, dtype=torch.float64)
    rollout = random_rollout([9, 4, 1])
    needs = Needs(teacher_logprob=True)
    results = []
    for pad_id in (0, 60):
        batch = token_batch(rollout, [0, 1, 2], pad_id=pad_id, length_multiple=16 if pad_id else 1)
        scores = score_teacher(teacher, batch, needs, ScoringOptions(1.0, tiny_vocabulary().allowed))
        loss, _ = CreditLoss(student)(
            batch,
            scores,
            CreditRequest(needs, lambda s, _: Credit(s.teacher_logprob - s.student_logprob), num_tokens=14),
        )
        loss.backward()
        results.append((loss.detach(), gradients(student.model)))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-13, rtol=0)
    for name, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][name], atol=1e-13, rtol=1e-10)


def test_poisoned_padding_hidden_states_stay_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """nan in every hidden state that predicts no response token, and in nothing that is read."""
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=5)
    rollout = random_rollout([9, 4, 1])
    batch = token_batch(rollout, [0, 1, 2], pad_id=0)
    scores = score_teacher(teacher, batch, Needs(), ScoringOptions(1.0, tiny_vocabulary().allowed))
    request = CreditRequest(Needs(), lambda s, _: Credit(s.teacher_logprob - s.student_logprob), num_tokens=14)
    clean, _ = CreditLoss(student)(batch, scores, request)

    def poison(_module, _args, output):
        hidden = output.last_hidden_state
        keep = torch.zeros(hidden.shape[:2], dtype=torch.bool).view(-1)
        keep[batch.predicts] = True
        output.last_hidden_state = hidden.masked_fill(~keep.view(hidden.shape[:2])[..., None], torch.nan)
        return output

    handle = student.backbone.register_forward_hook(poison)
    poisoned, record = CreditLoss(student)(batch, scores, request)
    handle.remove()
    assert torch.equal(clean, poisoned)
    poisoned.backward()
    assert all(torch.isfinite(value.float()).all() for value in record.values())


def test_a_rank_without_rows_contributes_zero_gradients_to_every_parameter() -> None:
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=5)
    batch = token_batch(random_rollout([3]), [], pad_id=0)
    needs = Needs(teacher_top_k=4, teacher_entropy=True)
    scores = score_teacher(teacher, batch, needs, ScoringOptions(1.0, tiny_vocabulary().allowed))
    loss, record = CreditLoss(student)(batch, scores, CreditRequest(needs, lambda s, _: Credit(s.teacher_logprob)))
    loss.backward()
    assert loss.item() == 0.0 and record == {}
    assert all(p.grad is not None and not p.grad.any() for p in student.model.parameters())


def test_later_updates_take_the_ratio_and_the_clip_on_sampled_credit_alone() -> None:
    student, teacher = tiny_model("llama", dtype=torch.float64), tiny_model("llama", seed=5, dtype=torch.float64)
    batch = token_batch(random_rollout([9, 4], prefix=2), [0, 1], pad_id=0)
    needs = Needs(teacher_logprob=True, teacher_top_k=3)
    scores = score_teacher(teacher, batch, needs, ScoringOptions(1.0, tiny_vocabulary().allowed))
    current = full_logits(student, batch).detach().log_softmax(-1).gather(1, batch.token_ids[:, None])[:, 0]
    shift = torch.linspace(-0.5, 0.5, len(batch), dtype=torch.float64)
    old = {"student_logprob": current - shift, "student_entropy": torch.ones_like(current)}
    sampled = torch.where(torch.arange(len(batch)) % 2 == 0, 1.0, -1.0).double()
    top_k = torch.rand(len(batch), 3, dtype=torch.float64)
    request = CreditRequest(
        needs, lambda _, w: Credit(sampled[w], top_k=top_k[w]), 13, rollout_time=old, ratio_clip=(0.2, 0.2)
    )
    loss, record = CreditLoss(student)(batch, scores, request)
    loss.backward()
    got = gradients(student.model)
    logprobs = full_logits(student, batch).log_softmax(-1)
    ratio = (logprobs.gather(1, batch.token_ids[:, None])[:, 0] - old["student_logprob"]).exp()
    ppo = torch.minimum(ratio * sampled, ratio.clamp(0.8, 1.2) * sampled)
    by_teacher = sampled * logprobs.gather(1, batch.token_ids[:, None])[:, 0]
    direct = (top_k * logprobs.gather(1, scores.teacher_topk_ids)).sum(-1)
    (-(torch.where(batch.teacher_wrote, by_teacher, ppo) + direct).sum() / 13).backward()
    want = gradients(student.model)
    assert 0 < record["ratio_clipped"].sum() < len(batch)
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, atol=1e-12, rtol=1e-10)


def test_micro_batches_respect_the_budget_and_keep_every_row() -> None:
    lengths = [5, 90, 30, 31, 7, 200, 64]
    plan = plan_micro_batches(lengths, 100)
    assert sorted(r for rows in plan for r in rows) == list(range(7))
    assert all(len(rows) == 1 or max(lengths[r] for r in rows) * len(rows) <= 100 for rows in plan)
    assert len(plan) == 5


def test_a_strategy_that_reads_what_it_did_not_declare_is_told() -> None:
    signals = Signals(student_logprob=torch.zeros(2), teacher_logprob=torch.zeros(2))
    with pytest.raises(KeyError, match=r"teacher_logprob.*was not declared"):
        _ = signals.only(Needs()).teacher_logprob
