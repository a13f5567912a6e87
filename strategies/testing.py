"""The contract every strategy keeps, as a function that plug-ins can call: `check_contract(MyStrategy())`.

Also small exact tools in float64: signals from whole distributions, the logit gradient that a credit stands for, and its
expectation by enumeration. Axes: B sequences, T response tokens, K teacher top-k, V vocabulary. Units: nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from .functional import acceptance, entropy
from .guidance import apply_guidance
from .types import Credit, Region, Signals, Strategy

GROUPS = (7, 7, 3, 3, 3, 5)  #: prompt of each row of the random batch; the last has a single rollout
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Batch:
    """Whole distributions and sampled tokens, from which every signal follows. Leading shape [B, T]."""

    student_logits: Tensor  # (B, T, V)
    teacher_logits: Tensor  # (B, T, V)
    token_ids: Tensor  # (B, T)
    reference_logits: Tensor | None = None  # (B, T, V), default: the teacher's
    uniform: Tensor | None = None  # (B, T), default: 0.5
    mask: Tensor | None = None  # (B, T)
    teacher_wrote: Tensor | None = None  # (B, T)
    group: Tensor | None = None  # (B,), default: one prompt
    progress: float = 0.75

    def topk_ids(self, top_k: int) -> Tensor:
        """[B, T, K], K clamped to V."""
        return self.teacher_logits.topk(min(top_k, self.teacher_logits.shape[-1]), dim=-1).indices

    def signals(self, strategy: Strategy) -> Signals:
        """Exactly what `strategy` declares."""
        needs, ids = strategy.needs, self.token_ids.unsqueeze(-1)
        student, teacher = self.student_logits.log_softmax(-1), self.teacher_logits.log_softmax(-1)
        reference = teacher if self.reference_logits is None else self.reference_logits.log_softmax(-1)
        tensors: dict[str, Tensor | float] = {
            "student_logprob": student.gather(-1, ids).squeeze(-1),
            "teacher_logprob": teacher.gather(-1, ids).squeeze(-1),
            "reference_logprob": reference.gather(-1, ids).squeeze(-1),
            "student_entropy": entropy(student),
            "teacher_entropy": entropy(teacher),
            "student_logprobs": student,
            "teacher_logprobs": teacher,
            "progress": self.progress,
        }
        if needs.teacher_top_k:
            top = self.topk_ids(needs.teacher_top_k)
            tensors["teacher_topk_logprob"] = teacher.gather(-1, top)
            tensors["student_topk_logprob"] = student.gather(-1, top)
        shape = self.token_ids.shape
        tensors["uniform"] = student.new_full(shape, 0.5) if self.uniform is None else self.uniform
        tensors["mask"] = torch.ones(shape).bool() if self.mask is None else self.mask
        tensors["teacher_wrote"] = torch.zeros(shape).bool() if self.teacher_wrote is None else self.teacher_wrote
        tensors["group"] = torch.zeros(shape[0]).long() if self.group is None else self.group
        return Signals(**tensors).only(needs)


def logit_gradient(credit: Credit, batch: Batch) -> Tensor:
    """d(loss)/d(logits) [B, T, V] of the loss that `credit` stands for: total credit * softmax - credit."""
    dense = torch.zeros_like(batch.student_logits)
    dense.scatter_add_(-1, batch.token_ids.unsqueeze(-1), credit.sampled.unsqueeze(-1))
    if credit.top_k is not None:
        dense.scatter_add_(-1, batch.topk_ids(credit.top_k.shape[-1]), credit.top_k)
    if credit.full is not None:
        dense = dense + credit.full
    return dense.sum(-1, keepdim=True) * batch.student_logits.softmax(-1) - dense


def expected_gradient(
    strategy: Strategy, student_logits: Tensor, teacher_logits: Tensor, reference_logits: Tensor | None = None
) -> tuple[Tensor, float]:
    """Mean [V] and total variance of the logit gradient at one position, over x ~ q and the region draw. Exact.

    Every token is one row of a batch with T = 1, all of one prompt; the uniform number takes one value on either side
    of the acceptance probability, weighted by it. So batch-scope strategies see all outcomes at once, equally often.
    """
    size = len(student_logits)
    log_q, log_p = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    accept = acceptance(log_q, log_p)
    weight = torch.cat([log_q.exp() * accept, log_q.exp() * (1.0 - accept)])

    def rows(logits: Tensor) -> Tensor:
        return logits.expand(2 * size, 1, size)

    batch = Batch(
        rows(student_logits),
        rows(teacher_logits),
        torch.arange(size).repeat(2).unsqueeze(-1),
        reference_logits=None if reference_logits is None else rows(reference_logits),
        uniform=torch.cat([accept / 2, (1.0 + accept) / 2]).unsqueeze(-1),
    )
    gradient = logit_gradient(strategy.credit(batch.signals(strategy)), batch).squeeze(1)
    mean = weight @ gradient
    return mean, float(weight @ (gradient - mean).square().sum(-1))


def random_batch(*, vocabulary: int = 12, seed: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
    """Six responses to three prompts, up to five tokens, some padding, some teacher-written prefixes."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return 2.0 * torch.randn(len(GROUPS), 5, vocabulary, generator=generator, dtype=torch.float64).to(dtype)

    position = torch.arange(5)
    return Batch(
        normal(),
        normal(),
        torch.randint(vocabulary, (len(GROUPS), 5), generator=generator),
        reference_logits=normal(),
        uniform=torch.rand(len(GROUPS), 5, generator=generator, dtype=torch.float64).to(dtype),
        mask=position < torch.tensor([5, 3, 4, 1, 5, 2]).unsqueeze(-1),
        teacher_wrote=position < torch.tensor([0, 1, 2, 1, 0, 0]).unsqueeze(-1),
        group=torch.tensor(GROUPS),
    )


def check_contract(strategy: Strategy) -> None:
    """Raises AssertionError, naming the rule, unless `strategy` keeps every rule of the contract."""
    check_declaration(strategy)
    check_finite(strategy)
    check_blindness(strategy)
    check_layout(strategy)
    check_teacher_matters(strategy)
    check_at_rest(strategy)


def check_declaration(strategy: Strategy) -> None:
    """It reads what it declares and nothing else, changes no input, and returns detached credit of the right shapes."""
    assert strategy.scope in ("token", "batch"), f"scope is {strategy.scope!r}"
    clip = strategy.ratio_clip
    assert clip is None or (len(clip) == 2 and min(clip) > 0.0), f"ratio_clip is {clip!r}, not two positive widths"
    batch = random_batch()
    signals = batch.signals(strategy)
    before = {name: signals._read(name).clone() for name in signals if name != "progress"}
    credit = strategy.credit(signals)
    changed = [name for name, value in before.items() if not torch.equal(value, signals._read(name))]
    assert not changed, f"it changed {changed} in place"
    shape = batch.token_ids.shape
    assert credit.sampled.shape == shape, f"sampled has shape {list(credit.sampled.shape)}, not {list(shape)}"
    if credit.top_k is not None:
        assert credit.top_k.shape == signals.teacher_topk_logprob.shape, f"top_k has shape {list(credit.top_k.shape)}"
    if credit.full is not None:
        assert credit.full.shape == signals.student_logprobs.shape, f"full has shape {list(credit.full.shape)}"
    if credit.region is not None:
        allowed = torch.tensor([int(region) for region in Region])
        assert credit.region.dtype == torch.int8 and credit.region.shape == shape, "region is not [...] int8"
        assert bool(torch.isin(credit.region, allowed).all()), "region holds unknown values"
    parts = [part for part in (credit.sampled, credit.top_k, credit.full) if part is not None]
    assert not any(part.requires_grad for part in parts), "credit carries a gradient"
    assert all(part.dtype == torch.float64 for part in parts), "credit does not keep the dtype of its signals"


def check_finite(strategy: Strategy) -> None:
    """Finite credit and gradient where probabilities vanish, agree or tie, and where there is nothing to train on."""
    for dtype in (torch.float32, torch.float64):
        for name, batch in extreme_batches(dtype):
            signals = batch.signals(strategy)
            credit = apply_guidance(strategy.credit(signals), signals)
            assert bool(logit_gradient(credit, batch).isfinite().all()), f"not finite: {name}, {dtype}"
            if not bool(signals.student_wrote.any()):
                student = credit.sampled.masked_fill(signals.teacher_wrote & signals.mask, 0.0)
                assert bool((student == 0.0).all()), f"credit without a student token: {name}"


def extreme_batches(dtype: torch.dtype) -> Iterator[tuple[str, Batch]]:
    """(what is extreme, batch)."""
    base = random_batch(dtype=dtype)
    at_token = torch.zeros_like(base.student_logits).scatter_(-1, base.token_ids.unsqueeze(-1), 1.0).bool()
    nowhere, everywhere = torch.zeros_like(base.token_ids).bool(), torch.ones_like(base.token_ids).bool()
    for value in (-90.0, -1e4):
        yield f"p = exp({value})", replace(base, teacher_logits=base.teacher_logits.masked_fill(at_token, value))
        yield f"q = exp({value})", replace(base, student_logits=base.student_logits.masked_fill(at_token, value))
    yield "student certain", replace(base, student_logits=base.student_logits.masked_fill(at_token, 1e4))
    yield "teacher certain", replace(base, teacher_logits=base.teacher_logits.masked_fill(at_token, 1e4))
    both = base.student_logits.masked_fill(at_token, 1e4)
    yield "both certain", replace(base, student_logits=both, teacher_logits=both, reference_logits=both)
    same = base.student_logits
    yield "p = q", replace(base, teacher_logits=same, reference_logits=same)
    flat = torch.zeros_like(same)
    yield "all ties", replace(base, student_logits=flat, teacher_logits=flat, reference_logits=flat)
    dead = torch.zeros(same.shape[-1], dtype=torch.bool)
    dead[-3:] = True
    alive = replace(base, token_ids=base.token_ids.clamp_max(same.shape[-1] - 4))
    yield (
        "ids that neither model can produce",
        replace(
            alive,
            student_logits=base.student_logits.masked_fill(dead, -math.inf),
            teacher_logits=base.teacher_logits.masked_fill(dead, -math.inf),
            reference_logits=flat.masked_fill(dead, -math.inf),
        ),
    )
    yield "uniform = 0", replace(base, uniform=torch.zeros_like(flat[..., 0]))
    yield "all written by the teacher", replace(base, teacher_wrote=everywhere)
    yield "nothing valid", replace(base, mask=nowhere)
    yield "one rollout per prompt", replace(base, group=torch.arange(len(GROUPS)))
    first = replace(base, mask=everywhere, teacher_wrote=nowhere)
    for rows, columns, name in ((1, 1, "a single token"), (1, 0, "no column"), (0, 5, "no row")):
        yield name, _cut(first, rows, columns)


def check_blindness(strategy: Strategy) -> None:
    """Padding may hold anything, nan included, and teacher-written tokens influence no student token."""
    batch = random_batch()
    signals = batch.signals(strategy)
    expected = apply_guidance(strategy.credit(signals), signals)
    for poison in (math.nan, math.inf, -math.inf):
        poisoned = _overwritten(signals, ~signals.mask, poison)
        found = apply_guidance(strategy.credit(poisoned), poisoned)
        _assert_same(found, expected, f"{poison} in the padding changes credit")
    shifted = _overwritten(signals, signals.teacher_wrote & signals.mask, -0.25)
    message = "what the teacher wrote changes the credit of student tokens"
    _assert_same(apply_guidance(strategy.credit(shifted), shifted), expected, message)


def check_layout(strategy: Strategy) -> None:
    """Token scope: any chunk of tokens gives the same. Batch scope: any order of rows, prompt labels and padding."""
    batch = random_batch()
    signals = batch.signals(strategy)
    expected = apply_guidance(strategy.credit(signals), signals)
    order = torch.tensor([4, 2, 0, 5, 3, 1])
    shuffled = _map(signals, lambda value: value[order])
    shuffled = shuffled.replace(group=100 - signals.group[order])
    permuted = Credit(**{name: value[order] for name, value in _parts(expected)})
    _assert_same(apply_guidance(strategy.credit(shuffled), shuffled), permuted, "the order of rows changes credit")
    wider = _map(signals, lambda value: torch.cat([value, value[:, :2]], dim=1))
    wider = wider.replace(mask=torch.cat([signals.mask, torch.zeros_like(signals.mask[:, :2])], dim=1))
    cut = Credit(**{name: value[:, :5] for name, value in _parts(apply_guidance(strategy.credit(wider), wider))})
    _assert_same(cut, expected, "more padding changes credit")
    if strategy.scope == "token":
        flat = _map(signals, lambda value: value[signals.mask])
        pieces = [_map(flat, itemgetter(piece)) for piece in (slice(0, 1), slice(1, 8), slice(8, None))]
        credits = [apply_guidance(strategy.credit(piece), piece) for piece in pieces]
        joined = Credit(**{name: torch.cat([getattr(c, name) for c in credits]) for name, _ in _parts(expected)})
        whole = Credit(**{name: value[signals.mask] for name, value in _parts(expected)})
        _assert_same(joined, whole, "splitting the tokens changes credit although scope is 'token'")


def check_teacher_matters(strategy: Strategy) -> None:
    """The expected gradient depends on the teacher: no action-independent reward, no forgotten policy gradient."""
    generator = torch.Generator().manual_seed(1)
    student, one, other = (1.5 * torch.randn(3, 9, generator=generator, dtype=torch.float64)).unbind(0)
    means = [expected_gradient(strategy, student, teacher, student)[0] for teacher in (one, other)]
    assert float((means[0] - means[1]).abs().max()) > 1e-3, "the expected gradient ignores the teacher"


def check_at_rest(strategy: Strategy) -> None:
    """Where teacher, student and reference agree the expected gradient vanishes, up to the mass that top-k leaves out."""
    top_k = strategy.needs.teacher_top_k
    for size in {max(top_k, 2), top_k + 8}:
        logits = torch.randn(size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
        left_out = 1.0 - float(logits.softmax(-1).topk(top_k).values.sum()) if top_k else 0.0
        largest = float(expected_gradient(strategy, logits, logits, logits)[0].abs().max())
        where = f"V = {size}, k = {top_k}, mass left out {left_out:.2g}"
        assert largest <= left_out + TOLERANCE, f"gradient {largest:.2g} with teacher == student ({where})"


# ── helpers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _per_token(signals: Signals) -> dict[str, Tensor]:
    return {name: signals._read(name) for name in signals if name not in ("group", "progress")}


def _map(signals: Signals, change: Callable[[Tensor], Tensor]) -> Signals:
    """`change` applied to every per-token tensor."""
    changed = {name: change(value) for name, value in _per_token(signals).items()}
    return Signals(group=signals.group, progress=signals.progress, **changed)


def _overwritten(signals: Signals, where: Tensor, value: float) -> Signals:
    """Every floating tensor replaced by `value` at some tokens."""
    changed = {
        name: tensor.masked_fill(where.unsqueeze(-1) if name in Signals.VECTOR else where, value)
        for name, tensor in _per_token(signals).items()
        if tensor.is_floating_point()
    }
    return signals.replace(**changed)


def _parts(credit: Credit) -> list[tuple[str, Tensor]]:
    named = [("sampled", credit.sampled), ("top_k", credit.top_k), ("full", credit.full), ("region", credit.region)]
    return [(name, part) for name, part in named if part is not None]


def _assert_same(found: Credit, expected: Credit, message: str) -> None:
    for (name, one), (_, other) in zip(_parts(found), _parts(expected), strict=True):
        same = one.shape == other.shape and torch.allclose(one.double(), other.double(), rtol=1e-9, atol=1e-12)
        assert same, f"{message} ({name})"


def _cut(batch: Batch, rows: int, columns: int) -> Batch:
    """The first rows and columns of everything."""
    tensors: dict[str, Any] = {f.name: getattr(batch, f.name) for f in fields(batch)}
    for name, value in tensors.items():
        if isinstance(value, Tensor):
            tensors[name] = value[:rows] if name == "group" else value[:rows, :columns]
    return Batch(**tensors)
