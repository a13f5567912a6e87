"""From a strategy to `credit_of`: token scope chunk by chunk, batch scope beforehand over all processes' rows.

Axes: N tokens of a micro-batch; batch scope [B, T], right-padded, rows ordered by (group, sample).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor

from strategies import Credit, Needs, Signals, Strategy
from strategies.guidance import apply_guidance

from .batching import TokenBatch
from .credit_loss import CreditOf, Record
from .randomness import uniform
from .scoring import Scores

#: Per-token tensors a batch-scope strategy may read, and where they come from.
FROM_RECORD = ("student_logprob", "student_entropy", "student_topk_logprob")
FROM_SCORES = ("teacher_logprob", "teacher_entropy", "reference_logprob", "teacher_topk_logprob")


def region_uniforms(seed: int, batch: TokenBatch) -> Tensor:
    """[N] one U(0, 1) per token, fixed for the rollout."""
    return uniform(seed, "region", batch.step, batch.group, batch.sample, batch.position)


def token_credit(strategy: Strategy, guidance_weight: float) -> CreditOf:
    """A token-scope strategy, called on every chunk's signals."""

    def credit_of(signals: Signals, _: slice) -> Credit:
        seen = signals.only(strategy.needs)
        return apply_guidance(strategy.credit(seen), seen, weight=guidance_weight)

    return credit_of


def fixed_credit(credit: Credit) -> CreditOf:
    """A credit of the whole micro-batch made beforehand, cut to each chunk."""
    return lambda _, where: select(credit, where)


def select(credit: Credit, index: slice | Tensor | tuple[Tensor, ...]) -> Credit:
    """The credit of some tokens."""
    return Credit(**{name: None if value is None else value[index] for name, value in vars(credit).items()})


def batch_credit(
    strategy: Strategy,
    batches: Sequence[TokenBatch],
    scores: Sequence[Scores],
    records: Sequence[Record],
    *,
    seed: int,
    progress: float,
    guidance_weight: float,
) -> list[Credit]:
    """Credits of a batch-scope strategy per micro-batch of this process, computed over the rows of all processes.

    Every process computes the same global batch, so the result does not depend on how the rows were dealt.
    """
    mine = [
        _row_tensors(*parts, strategy.needs, seed)
        for parts in zip(batches, scores, records, strict=True)
        if len(parts[0])
    ]
    everyone = gather_object([{name: torch.cat([m[name] for m in mine]) for name in mine[0]}] if mine else [])
    if not everyone:
        return [Credit(sampled=torch.zeros(0)) for _ in batches]
    tokens = {name: torch.cat([part[name] for part in everyone]) for name in everyone[0]}
    signals, row, position, keys = padded_signals(tokens, progress)
    credit = apply_guidance(strategy.credit(signals.only(strategy.needs)), signals, weight=guidance_weight)
    flat = select(credit, (row, position))
    place = {key: index for index, key in enumerate(keys)}
    results = []
    for batch in batches:
        own = zip(batch.group.tolist(), batch.sample.tolist(), batch.position.tolist(), strict=True)
        index = torch.tensor([place[key] for key in own], dtype=torch.int64)
        results.append(_to(select(flat, index), batch.token_ids.device))
    return results


def _row_tensors(batch: TokenBatch, scores: Scores, record: Record, needs: Needs, seed: int) -> dict[str, Tensor]:
    tensors = {name: record[name] for name in FROM_RECORD if name in record}
    tensors |= {name: getattr(scores, name) for name in FROM_SCORES if getattr(scores, name) is not None}
    tensors |= {name: getattr(batch, name) for name in ("group", "sample", "position", "teacher_wrote")}
    if needs.uniform:
        tensors["uniform"] = region_uniforms(seed, batch)
    return {name: value.detach().cpu() for name, value in tensors.items()}


def padded_signals(
    tokens: dict[str, Tensor], progress: float
) -> tuple[Signals, Tensor, Tensor, list[tuple[int, int, int]]]:
    """Tokens [N], with `group`, `sample` and `position`, as a batch-scope strategy reads them.

    Returns:
        (signals [B, T], row [N], position [N], (group, sample, position) per token).
    """
    keys = list(zip(*(tokens[n].tolist() for n in ("group", "sample", "position")), strict=True))
    rows = {key: index for index, key in enumerate(sorted({key[:2] for key in keys}))}
    row = torch.tensor([rows[key[:2]] for key in keys])
    position = tokens["position"]
    shape = (len(rows), int(position.max()) + 1)
    padded: dict[str, Tensor | float] = {"mask": torch.zeros(shape, dtype=torch.bool), "progress": progress}
    padded["mask"][row, position] = True  # type: ignore[index]
    padded["group"] = torch.tensor([group for group, _ in rows])
    for name in tokens.keys() - {"group", "sample", "position"}:
        value = tokens[name]
        canvas = torch.zeros((*shape, *value.shape[1:]), dtype=value.dtype)
        canvas[row, position] = value
        padded[name] = canvas
    return Signals(**padded), row, position, keys


def _to(credit: Credit, device: torch.device) -> Credit:
    return Credit(**{name: None if value is None else value.to(device) for name, value in vars(credit).items()})
