"""The student against the teacher on prompts: sampled accuracy, exact divergences, the probe before training.

Sums are taken per process and combined, so the numbers do not depend on how the prompts were dealt.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from .batching import TokenBatch, plan_micro_batches, row_lengths, token_batch
from .data import Prompt
from .divergence import token_divergences
from .metrics import Sums, combine
from .models import Vocabulary
from .pair import Pair
from .rollout import Generator, Rollout, make_rollout
from .sharding import levelled

#: (response text, reference answer) -> correct.
Judge = Callable[[str, Any], bool]


@dataclass(frozen=True)
class HeldOut:
    """What is measured on: prompts of this process with their global number, and how to judge answers."""

    prompts: Sequence[tuple[int, Prompt]]
    judge: Judge | None
    samples: int
    max_response_length: int
    temperature: float
    token_budget: int


def measure(pair: Pair, student: Generator, task: HeldOut, *, step: int = 0) -> dict[str, Any]:
    """Samples responses and measures them.

    Returns:
        accuracy (None without answers), reverse_kl, acceptance, agreement, entropy per student-written token,
        reward_p01 (lowest 1 % of R), response_length, truncated_share, responses.
    """
    rollout = make_rollout(
        step, task.prompts, [[] for _ in task.prompts], student, rollouts_per_prompt=task.samples,
        max_response_length=task.max_response_length, vocabulary=pair.vocabulary,
    )  # fmt: skip
    sums, rewards = _divergence_sums(pair, rollout, task)
    sums |= {"rows": float(len(rollout)), "truncated": float((~rollout.ended).sum())}
    judged = [(row, p) for row, p in enumerate(rollout.prompts) if task.judge is not None and p.answer is not None]
    sums["judged"] = float(len(judged))
    sums["correct"] = float(sum(task.judge(response_text(pair, rollout, row), p.answer) for row, p in judged))  # type: ignore[misc]
    total = combine(gather_object([sums]))
    everyone = torch.tensor([r for part in gather_object([rewards]) for r in part], dtype=torch.float64)
    tokens = max(total.get("tokens", 0.0), 1.0)
    return {
        "accuracy": total["correct"] / total["judged"] if total["judged"] else None,
        "reverse_kl": total.get("reverse_kl", 0.0) / tokens,
        "acceptance": total.get("acceptance", 0.0) / tokens,
        "agreement": total.get("agreement", 0.0) / tokens,
        "entropy": total.get("student_entropy", 0.0) / tokens,
        "reward_p01": float(everyone.quantile(0.01)) if len(everyone) and len(everyone) < 2**24 else None,
        "response_length": total.get("tokens", 0.0) / max(total["rows"], 1.0),
        "truncated_share": total["truncated"] / max(total["rows"], 1.0),
        "responses": int(total["rows"]),
    }


def forward_kl_on_teacher_text(pair: Pair, responses: Sequence[list[int]], task: HeldOut) -> float | None:
    """KL(teacher || student) per token on the teacher's own responses to the same prompts, nats."""
    prompts = [prompt for _, prompt in task.prompts]
    rollout = given_rollout(prompts, responses, pair.vocabulary)
    sums, _ = _divergence_sums(pair, rollout, task)
    total = combine(gather_object([sums]))
    return total["forward_kl"] / total["tokens"] if total.get("tokens") else None


def given_rollout(prompts: Sequence[Prompt], responses: Sequence[list[int]], vocabulary: Vocabulary) -> Rollout:
    """Responses that exist already, as a rollout: one row per prompt."""
    longest = max((len(r) for r in responses), default=0)
    ids = torch.full((len(responses), longest), vocabulary.pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, response in enumerate(responses):
        ids[row, : len(response)] = torch.tensor(response, dtype=torch.int64)
        mask[row, : len(response)] = True
    rows = torch.arange(len(responses))
    return Rollout(
        0, ids, mask, torch.zeros_like(mask), rows, torch.zeros_like(rows), torch.ones_like(rows, dtype=torch.bool),
        [p.ids for p in prompts], [p.teacher_ids for p in prompts], list(prompts),
    )  # fmt: skip


def divergence_batches(
    pair: Pair, rollout: Rollout, *, temperature: float, token_budget: int
) -> Iterator[tuple[TokenBatch, dict[str, Tensor]]]:
    """`token_divergences` of a rollout, micro-batch by micro-batch. Nothing for responses without tokens."""
    lengths = row_lengths(rollout) if len(rollout) else []
    plan = plan_micro_batches(lengths, token_budget, packed=pair.packs)
    for rows in levelled(plan) if pair.sharded else plan:
        batch = token_batch(rollout, rows, pad_id=pair.vocabulary.pad_id, packed=pair.packs).to(pair.device)
        if len(batch) or pair.sharded:
            divergences = functools.partial(
                token_divergences,
                pair.student,
                pair.teacher,
                batch,
                temperature=temperature,
                student_context=pair.autocast,
            )
            values = pair.student.run(divergences)
            if len(batch):
                yield batch, values


def _divergence_sums(pair: Pair, rollout: Rollout, task: HeldOut) -> tuple[Sums, list[float]]:
    """(sums over the valid tokens of this process, R of every token)."""
    parts: list[Sums] = []
    rewards: list[float] = []
    for batch, values in divergence_batches(
        pair, rollout, temperature=task.temperature, token_budget=task.token_budget
    ):
        parts.append(
            {name: float(value.double().sum()) for name, value in values.items()} | {"tokens": float(len(batch))}
        )
        rewards += (values["teacher_logprob"] - values["student_logprob"]).tolist()
    return combine(parts), rewards


def response_text(pair: Pair, rollout: Rollout, row: int) -> str:
    """A response as a person reads it."""
    ids = rollout.ids[row][rollout.mask[row]].tolist()
    return str(pair.tokenizer.decode(ids, skip_special_tokens=True))
