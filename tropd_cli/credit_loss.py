"""THE OBJECTIVE: student hidden states x head x credit -> loss, chunk by chunk. The only place with a gradient.

A strategy's credit is minus the derivative of the loss with respect to log q(x) and log q(v), so the gradient with
respect to the logits, `sum(credit) * softmax - credit`, is known as soon as a chunk's softmax is. It is formed in the
forward pass, and no [B, T, V] tensor ever exists. Axes: N valid response tokens, c tokens of a chunk, H hidden,
K teacher top-k, V vocabulary. Units: nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from strategies import Credit, Needs, Region, Signals
from strategies.functional import topk_forward_kl

from .batching import TokenBatch
from .models import Head, LanguageModel
from .scoring import Scores, blocks_of, chunk_buffers, chunk_slices, response_hidden

#: (signals of some tokens, which tokens of the micro-batch) -> credit with guidance applied.
CreditOf = Callable[[Signals, slice], Credit]
Record = dict[str, Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class CreditRequest:
    """What one forward is to compute.

    credit_of: None: only the record, no credit and no gradient. num_tokens: valid response tokens of the whole optimizer
    step over all processes. needs: which signals to hand over. progress: fraction of the run. uniforms [N] or None.
    rollout_time: record of the first forward after the rollout, for later updates on the same rollout. ratio_clip:
    PPO range around 1. observe_top_k: how many of the student's log-probabilities at the teacher's tokens to record.
    """

    needs: Needs
    credit_of: CreditOf | None = None
    num_tokens: int = 1
    progress: float = 0.0
    uniforms: Tensor | None = None
    rollout_time: Record | None = None
    ratio_clip: tuple[float, float] | None = None
    observe_top_k: int = 0


class CreditLoss(nn.Module):
    """Owns the student; its forward is the only use of backbone and head under a gradient, so that data-parallel and
    sharding wrappers see every parameter."""

    def __init__(self, student: LanguageModel, *, temperature: float = 1.0, chunk_tokens: int | None = None) -> None:
        super().__init__()
        self.model = student.model
        self._student = (student,)
        self.temperature, self.chunk_tokens = temperature, chunk_tokens

    def around(self, action: Callable[[], T]) -> T:
        """`action` as a forward of this module, for sharding wrappers."""
        return action()

    def forward(self, batch: TokenBatch, scores: Scores, request: CreditRequest) -> tuple[Tensor, Record]:
        """Returns (loss summed over the tokens / num_tokens, record of detached [N] tensors)."""
        student = self._student[0]
        hidden = response_hidden(student, batch)
        head = student.head
        job = _Job(head, batch, scores, request, self.temperature, self.chunk_tokens)
        if request.credit_of is None:
            job.run(hidden.detach(), ())
            return hidden.new_zeros(()), job.record
        trained = tuple(p for p in head.projection.parameters() if p.requires_grad)
        loss = _Fused.apply(hidden, job, *trained)
        return loss, job.record


class _Fused(torch.autograd.Function):
    """Carries the gradients that the chunk loop has already formed into autograd."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, job: _Job, *trained: Tensor) -> Tensor:
        loss, grad_hidden, grad_trained = job.run(hidden, trained)
        ctx.save_for_backward(grad_hidden, *grad_trained)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, *grad_trained = ctx.saved_tensors
        return grad_hidden.mul_(grad_loss), None, *(g.mul_(grad_loss) for g in grad_trained)


@dataclass
class _Job:
    """One micro-batch's pass over its chunks."""

    head: Head
    batch: TokenBatch
    scores: Scores
    request: CreditRequest
    temperature: float
    chunk_tokens: int | None
    record: Record = field(default_factory=dict)

    def run(self, hidden: Tensor, trained: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """(loss, gradient of hidden [N, H], gradients of the head's trained parameters)."""
        states = hidden.to(product_dtype(hidden))
        with torch.autocast(hidden.device.type, enabled=False):
            project: _Projection = (
                _PlainProjection(self.head, states, trained)
                if self.head.is_plain
                else _AutogradProjection(self.head, states, trained)
            )
            loss = hidden.new_zeros((), dtype=torch.float64)
            pieces: list[Record] = []
            slices = list(chunk_slices(len(self.batch), project.vocabulary, hidden.device, self.chunk_tokens))
            buffers = chunk_buffers(slices, hidden, project.vocabulary)
            for where in slices:
                logits = project.logits(where, buffers[0])
                piece, chunk_loss, dlogits = self._chunk(logits, where, buffers[1])
                pieces.append(piece)
                if dlogits is not None:
                    loss += chunk_loss
                    project.accumulate(where, dlogits)
        self.record = {name: torch.cat([p[name] for p in pieces]) for name in pieces[0]} if pieces else {}
        grad_hidden, grad_trained = project.gradients()
        return loss.to(torch.promote_types(hidden.dtype, torch.float32)), grad_hidden.to(hidden.dtype), grad_trained

    def _chunk(self, logits: Tensor, where: slice, scratch: Tensor) -> tuple[Record, Tensor | float, Tensor | None]:
        """Overwrites `logits` [c, V] and `scratch` [r, V]. Returns (record, loss, dlogits or None without credit)."""
        token_ids = self.batch.token_ids[where].unsqueeze(1)
        top_ids = None if self.scores.teacher_topk_ids is None else self.scores.teacher_topk_ids[where]
        probability, mass, current = self._softmax(logits, scratch, token_ids, top_ids)
        signals = self._signals(current, where)
        record = self._record(signals, current)
        if self.request.credit_of is None:
            return record, 0.0, None
        credit = self.request.credit_of(signals, where)
        credit_sampled = self._with_ratio(credit, current["student_logprob"], where, record)
        record |= credit_record(credit)
        loss, total = _surrogate(credit_sampled, credit, current)
        loss = loss / self.request.num_tokens
        scale = 1.0 / (self.request.num_tokens * self.temperature)
        dlogits = probability.mul_((total * scale / mass).unsqueeze(1).to(probability.dtype))
        if credit.full is not None:
            dlogits.sub_(credit.full * scale)
        if credit.top_k is not None:
            assert top_ids is not None
            dlogits.scatter_add_(1, top_ids[:, : credit.top_k.shape[1]], (-scale * credit.top_k).to(dlogits.dtype))
        dlogits.scatter_add_(1, token_ids, (-scale * credit_sampled).unsqueeze(1).to(dlogits.dtype))
        return record, loss, dlogits

    def _softmax(
        self, logits: Tensor, scratch: Tensor, token_ids: Tensor, top_ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Record]:
        """Turns `logits` [c, V] into exp(logit - the row's largest), in place and block by block: all that is done to a
        block happens while the cache holds it. Returns (that, its sum [c], what the student says of the tokens)."""
        if self.temperature != 1.0:
            logits.div_(self.temperature)
        full = torch.empty_like(logits) if self.request.needs.full_distribution else None
        sampled, top, mass, expected = [], [], [], []
        for rows, block, probability in blocks_of(logits, scratch):
            block.sub_(block.amax(-1, keepdim=True))
            sampled.append(block.gather(1, token_ids[rows]).squeeze(1))
            if top_ids is not None:
                top.append(block.gather(1, top_ids[rows]))
            if full is not None:
                full[rows] = block
            torch.exp(block, out=probability)
            mass.append(probability.sum(-1))
            expected.append(block.mul_(probability).sum(-1))
            block.copy_(probability)
        total = torch.cat(mass)
        normaliser = total.log()
        current = {
            "student_logprob": torch.cat(sampled) - normaliser,
            "student_entropy": normaliser - torch.cat(expected) / total,
        }
        if top_ids is not None:
            current["student_topk_logprob"] = torch.cat(top) - normaliser.unsqueeze(1)
        if full is not None:
            current["student_logprobs"] = full.sub_(normaliser.unsqueeze(1))
        return logits, total, current

    def _signals(self, current: Record, where: slice) -> Signals:
        """Everything computed, as a strategy reads it: sampled-token quantities from rollout time, the rest current."""
        tensors: dict[str, Tensor | float] = dict(current)
        if self.request.rollout_time is not None:
            for name in ("student_logprob", "student_entropy"):
                tensors[name] = self.request.rollout_time[name][where]
        scores, dtype = self.scores, current["student_logprob"].dtype
        tensors["teacher_logprob"] = scores.teacher_logprob[where].to(dtype)
        for name in ("reference_logprob", "teacher_entropy", "teacher_topk_logprob"):
            value = getattr(scores, name)
            if value is not None:
                tensors[name] = value[where].to(dtype)
        if scores.teacher_full is not None and self.request.needs.full_distribution:
            tensors["teacher_logprobs"] = scores.teacher_full(where).to(current["student_logprob"])
        if self.request.uniforms is not None:
            tensors["uniform"] = self.request.uniforms[where]
        return Signals(
            **tensors,
            mask=torch.ones_like(self.batch.teacher_wrote[where]),
            teacher_wrote=self.batch.teacher_wrote[where],
            progress=self.request.progress,
        )

    def _record(self, signals: Signals, current: Record) -> Record:
        """What metrics, recorded rollouts and batch-scope strategies read, per token."""
        record = {name: signals._read(name) for name in ("student_logprob", "student_entropy")}
        top_k = self.request.needs.teacher_top_k
        if top_k and "student_topk_logprob" in current:
            student, teacher = current["student_topk_logprob"], signals.teacher_topk_logprob
            record["topk_forward_kl"] = topk_forward_kl(student[:, :top_k], teacher[:, :top_k])
        keep = top_k if self.request.credit_of is None else self.request.observe_top_k
        if keep:
            record["student_topk_logprob"] = current["student_topk_logprob"][:, :keep]
        return record

    def _with_ratio(self, credit: Credit, logprob: Tensor, where: slice, record: Record) -> Tensor:
        """`sampled` times the importance ratio on student-written tokens, zero where the PPO range cuts it."""
        if self.request.rollout_time is None:
            record["ratio_clipped"] = torch.zeros_like(self.batch.teacher_wrote[where])
            return credit.sampled
        ratio = (logprob - self.request.rollout_time["student_logprob"][where]).exp()
        cut = torch.zeros_like(ratio, dtype=torch.bool)
        if self.request.ratio_clip is not None:
            low, high = self.request.ratio_clip
            cut = ((credit.sampled > 0) & (ratio > 1 + high)) | ((credit.sampled < 0) & (ratio < 1 - low))
        by_teacher = self.batch.teacher_wrote[where]
        record["ratio_clipped"] = cut & ~by_teacher
        return torch.where(by_teacher, credit.sampled, (credit.sampled * ratio).masked_fill(cut, 0.0))


def _surrogate(sampled: Tensor, credit: Credit, current: Record) -> tuple[Tensor, Tensor]:
    """(-sum of credit x log q over the chunk, total credit per token [c])."""
    total = sampled
    loss = -(sampled * current["student_logprob"].masked_fill(sampled == 0, 0.0)).sum(dtype=torch.float64)
    if credit.top_k is not None:
        logprob = current["student_topk_logprob"][:, : credit.top_k.shape[1]]
        loss = loss - (credit.top_k * logprob.masked_fill(credit.top_k == 0, 0.0)).sum(dtype=torch.float64)
        total = total + credit.top_k.sum(-1)
    if credit.full is not None:
        logprob = current["student_logprobs"].masked_fill(credit.full == 0, 0.0)
        loss = loss - torch.einsum("cv,cv->c", credit.full, logprob).sum(dtype=torch.float64)
        total = total + credit.full.sum(-1)
    return loss, total


def credit_record(credit: Credit) -> Record:
    """What is kept of a credit per token [N]: sums over the vocabulary instead of the lists."""
    mass = torch.zeros_like(credit.sampled)
    absolute = credit.sampled.abs()
    for part in (credit.top_k, credit.full):
        if part is not None:
            mass = mass + part.sum(-1)
            absolute = absolute + part.abs().sum(-1)
    region = credit.region
    if region is None:
        region = torch.full_like(credit.sampled, int(Region.TRUST), dtype=torch.int8)
    weight = (region == Region.OUTLIER).to(mass.dtype) if credit.outlier_weight is None else credit.outlier_weight
    return {
        "credit": credit.sampled,
        "credit_top_k_mass": mass,
        "credit_absolute": absolute,
        "region": region,
        "outlier_weight": weight,
        "floored": torch.zeros_like(mass, dtype=torch.bool) if credit.floored is None else credit.floored,
    }


def product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the head's products: autocast's, as in the model's own forward, or that of the hidden states, which a
    last norm in float32 hands over in float32 under autocast too."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def summed_in(parameter: Tensor) -> torch.dtype:
    """The dtype in which a parameter's gradient is summed over chunks: float32 at least."""
    return torch.promote_types(parameter.dtype, torch.float32)


# ── the head's two paths ────────────────────────────────────────────────────────────────────────────────────────────


class _PlainProjection:
    """A bare linear head: three matrix products per chunk (two when it is frozen), buffers reused between chunks."""

    def __init__(self, head: Head, hidden: Tensor, trained: tuple[Tensor, ...]) -> None:
        linear = head.projection
        assert isinstance(linear, nn.Linear)
        self.head, self.hidden = head, hidden
        self.weight = linear.weight.detach().to(hidden.dtype)
        self.vocabulary = linear.weight.shape[0]
        self.grad_hidden = torch.zeros_like(hidden)
        self.by_parameter = {id(p): torch.zeros_like(p, dtype=summed_in(p)) for p in trained}
        self.dtypes = [p.dtype for p in trained]  # half-precision under a sharding policy
        self.grad_weight = self.by_parameter.get(id(linear.weight))
        self.grad_bias = None if linear.bias is None else self.by_parameter.get(id(linear.bias))

    def logits(self, where: slice, buffer: Tensor) -> Tensor:
        hidden = self.hidden[where]
        if hidden.dtype == self.head.projection.weight.dtype:
            return self.head.logits(hidden, buffer)
        # Autocast: float32 masters, half-precision products, all that follows in float32.
        logits = buffer[: hidden.shape[0]].copy_(torch.mm(hidden, self.weight.t()))
        return logits if self.head.projection.bias is None else logits.add_(self.head.projection.bias.detach())

    def accumulate(self, where: slice, dlogits: Tensor) -> None:
        hidden = self.hidden[where]
        if self.grad_bias is not None:
            self.grad_bias.add_(dlogits.sum(0))
        low = dlogits.to(hidden.dtype)
        self.grad_hidden[where] = torch.mm(low, self.weight)
        if self.grad_weight is not None:
            if low.dtype == self.grad_weight.dtype:
                self.grad_weight.addmm_(low.t(), hidden)
            else:
                self.grad_weight.add_(torch.mm(low.t(), hidden))

    def gradients(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        pairs = zip(self.by_parameter.values(), self.dtypes, strict=True)
        return self.grad_hidden, tuple(total.to(dtype) for total, dtype in pairs)


class _AutogradProjection:
    """Any other head (LoRA, logit scale, soft-cap): autograd inside the chunk."""

    def __init__(self, head: Head, hidden: Tensor, trained: tuple[Tensor, ...]) -> None:
        self.head, self.hidden, self.trained = head, hidden, trained
        weight = getattr(head.projection, "weight", None)
        assert weight is not None
        self.vocabulary = weight.shape[0]
        self.grad_hidden = torch.zeros_like(hidden)
        self.grad_trained = tuple(torch.zeros_like(p, dtype=summed_in(p)) for p in trained)
        self.leaf, self.raw = hidden, hidden

    def logits(self, where: slice, _: Tensor) -> Tensor:
        with torch.enable_grad():
            self.leaf = self.hidden[where].detach().requires_grad_()
            autocast = self.leaf.dtype not in (torch.float32, torch.float64)
            with torch.autocast(self.leaf.device.type, dtype=torch.bfloat16, enabled=autocast):
                self.raw = self.head(self.leaf)
        return self.raw.detach().clone()

    def accumulate(self, where: slice, dlogits: Tensor) -> None:
        grads = torch.autograd.grad(self.raw, [self.leaf, *self.trained], dlogits.to(self.raw.dtype), allow_unused=True)
        self.grad_hidden[where] = grads[0]
        for total, grad in zip(self.grad_trained, grads[1:], strict=True):
            if grad is not None:
                total.add_(grad)

    def gradients(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        pairs = zip(self.grad_trained, self.trained, strict=True)
        return self.grad_hidden, tuple(total.to(p.dtype) for total, p in pairs)


_Projection = _PlainProjection | _AutogradProjection
