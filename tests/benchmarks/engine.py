"""The program's score and update as benchmarks run it: the one place where they touch the engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from strategies import STRATEGIES, Needs, Strategy
from tests.tiny import random_rollout
from tropd_cli.batching import TokenBatch, plan_micro_batches, row_lengths, token_batch
from tropd_cli.credit_loss import CreditLoss, CreditRequest, Record
from tropd_cli.crediting import region_uniforms, token_credit
from tropd_cli.models import LanguageModel
from tropd_cli.packing import enable_packing
from tropd_cli.pair import hidden_tolerance
from tropd_cli.rollout import Rollout
from tropd_cli.scoring import Scores, ScoringOptions, score_teacher


@dataclass
class Engine:
    """Student, teacher and strategy with what the training loop makes of them. `context`: autocast of the student."""

    student: LanguageModel
    teacher: LanguageModel
    strategy_name: str = "trust-region"
    context: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    strategy: Strategy = field(init=False)
    needs: Needs = field(init=False)
    module: CreditLoss = field(init=False)

    def __post_init__(self) -> None:
        self.strategy = STRATEGIES.build(self.strategy_name)
        self.needs = self.strategy.needs | Needs(teacher_logprob=True, student_entropy=True)
        self.module = CreditLoss(self.student)
        self.options = ScoringOptions(1.0, torch.ones(self.student.vocabulary, dtype=torch.bool))

    def score(self, batch: TokenBatch) -> Scores:
        return score_teacher(self.teacher, batch, self.needs, self.options)

    def update(self, batch: TokenBatch, scores: Scores, tokens: int) -> tuple[torch.Tensor, Record]:
        """Loss, record and (in the weights) gradient of one micro-batch out of `tokens` response tokens."""
        credit_of = token_credit(self.strategy, 0.001)
        request = CreditRequest(self.needs, credit_of, tokens, uniforms=region_uniforms(0, batch))
        with self.context():
            loss, record = self.module(batch, scores, request)
        loss.backward()
        return loss.detach(), record

    def score_and_update(self, batch: TokenBatch) -> torch.Tensor:
        """Both for a single micro-batch. Returns the loss."""
        return self.update(batch, self.score(batch), len(batch))[0]

    def forget_gradient(self) -> None:
        self.student.model.zero_grad(set_to_none=True)


def with_packing(engine: Engine) -> Engine:
    """The engine with both models able to take packed rows, as loading a pair makes them."""
    for model in (engine.student, engine.teacher):
        assert enable_packing(model.model, model.backbone, list(range(2, 12)), tolerance=hidden_tolerance(model))
    return engine


@dataclass(frozen=True)
class Plan:
    """How a rollout is cut into micro-batches: the rows of each, and whether they stand end to end or are padded."""

    rows: list[list[int]]
    packed: bool = False

    def batches(self, rollout: Rollout, device: torch.device) -> list[TokenBatch]:
        return [token_batch(rollout, rows, pad_id=0, packed=self.packed).to(device) for rows in self.rows]


def planned(rollout: Rollout, token_budget: int, *, packed: bool) -> Plan:
    """As training cuts it."""
    return Plan(plan_micro_batches(row_lengths(rollout), token_budget, packed=packed), packed)


def equal_rows(rows: int, length: int, vocabulary: int, *, packed: bool = False) -> TokenBatch:
    """One micro-batch of random responses of the same length."""
    rollout = random_rollout([length] * rows, vocabulary=vocabulary)
    return token_batch(rollout, range(rows), pad_id=0, packed=packed)
