"""The training loop. Data flows one way: prompts -> rollout -> teacher scores -> credit -> loss -> optimizer."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from strategies import Needs

from .batching import TokenBatch, plan_micro_batches, row_lengths, token_batch
from .config import Config
from .credit_loss import CreditOf, CreditRequest, Record
from .crediting import batch_credit, fixed_credit, region_uniforms, token_credit
from .data import prompts_of_step
from .display import Display
from .errors import UserError
from .export import save_student
from .metrics import batch_sums, combine, peak_memory_bytes, rollout_sums, step_metrics, update_norm
from .recording import token_rows
from .rollout import Rollout, make_rollout, step_prefix_limit
from .run_directory import RunDirectory
from .scoring import Scores, ScoringOptions, score_reference, score_teacher
from .session import Training, caught_signals, evaluate, keep_best, probe, restore, save

#: A run stops after this many non-finite steps in a row.
MAX_SKIPPED_IN_A_ROW = 10


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the run is saved."""


# ── the loop ────────────────────────────────────────────────────────────────────────────────────────────────────────


def distill(
    config: Config, run: RunDirectory, display: Display, accelerator: Accelerator, *, resume: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trains until `config.steps` updates are done, and saves the student.

    Returns:
        (the last line of metrics.jsonl, the first held-out evaluation).

    Raises:
        UserError: a problem the user can fix.
        Interrupted: a signal arrived; everything is saved.
    """
    t = Training(config, run, display, accelerator)
    if resume:
        restore(t)
    if t.completed == 0:
        t.last_metrics = {"step": 0, **probe(t), **evaluate(t)}
        _log(t, t.last_metrics)
    display.start(t.completed, config.steps)
    with caught_signals() as received:
        while t.completed < config.steps:
            rollout, seconds = roll_out(t)
            batches, scores, seconds["seconds_teacher"] = score(t, rollout)
            rollout_time: list[Record] | None = None
            for _ in range(min(config.updates_per_rollout, config.steps - t.completed)):
                metrics, rollout_time = update(t, rollout, batches, scores, rollout_time, seconds)
                _finish_step(t, metrics)
            stop = bool(sum(gather_object([len(received)])))
            due = config.checkpoint_every and t.completed % config.checkpoint_every < config.updates_per_rollout
            if stop or due or t.completed >= config.steps:
                save(t)
            if stop and t.completed < config.steps:
                display.stop()
                raise Interrupted
    display.stop()
    if accelerator.is_main_process:
        save_student(t.pair, config, run.student, t.last_metrics)
    accelerator.wait_for_everyone()
    return t.last_metrics, t.first_evaluation


def roll_out(t: Training) -> tuple[Rollout, dict[str, float]]:
    """This process's share of the step's responses. Returns (rollout, seconds by stage)."""
    started = time.perf_counter()
    c = t.config
    chosen = prompts_of_step(len(t.prompts), c.prompts_per_step, t.completed // c.updates_per_rollout, c.seed)
    prompts = t.mine([t.prompts[index] for index in chosen])
    limit = step_prefix_limit(t.completed, c.steps, c.max_response_length) if t.guided else 0
    prefixes = t.prefixes.draw(t.completed, prompts, limit)
    rollout = make_rollout(
        t.completed, prompts, prefixes, t.write, rollouts_per_prompt=c.rollouts_per_prompt,
        max_response_length=c.max_response_length, vocabulary=t.pair.vocabulary,
    )  # fmt: skip
    return rollout, {"seconds_rollout": time.perf_counter() - started, "prefix_limit": limit}


def score(t: Training, rollout: Rollout) -> tuple[list[TokenBatch], list[Scores], float]:
    """Micro-batches with the frozen models' scores. Every process makes the same number of micro-batches."""
    started = time.perf_counter()
    plan = plan_micro_batches(row_lengths(rollout) if len(rollout) else [], t.micro_batch_tokens)
    longest = max(gather_object([len(plan)]))
    plan += [[] for _ in range(longest - len(plan))]
    observed = Needs(teacher_entropy=True, teacher_top_k=t.config.record.top_k) if _records(t) else Needs()
    options = ScoringOptions(t.config.temperature, t.pair.vocabulary.allowed, rank=_records(t))
    batches, scores = [], []
    for rows in plan:
        batch = token_batch(rollout, rows, pad_id=t.pair.vocabulary.pad_id)
        s = score_teacher(t.pair.teacher, batch.to(t.pair.teacher.device), t.needs | observed, options).to(
            t.pair.device
        )
        batch = batch.to(t.pair.device)
        if t.pair.reference is not None:
            reference = score_reference(t.pair.reference, batch.to(t.pair.reference.device), options)
            s = s.replace(reference_logprob=reference.to(t.pair.device))
        batches.append(batch)
        scores.append(s)
    return batches, scores, time.perf_counter() - started


def update(
    t: Training,
    rollout: Rollout,
    batches: list[TokenBatch],
    scores: list[Scores],
    rollout_time: list[Record] | None,
    seconds: dict[str, float],
) -> tuple[dict[str, Any], list[Record]]:
    """One optimizer step over the whole rollout of all processes. Returns (metrics, record of the first forward)."""
    started = time.perf_counter()
    for group in t.optimizer.param_groups:
        group["lr"] = learning_rate(t.config, t.completed)
    num_tokens = max(1, sum(gather_object([sum(len(b) for b in batches)])))
    request = CreditRequest(
        needs=t.needs,
        num_tokens=num_tokens,
        progress=t.completed / t.config.steps,
        ratio_clip=t.strategy.ratio_clip,
        observe_top_k=t.config.record.top_k if _records(t) else 0,
    )
    credits = _credits(t, batches, scores, rollout_time, request)
    loss, records = 0.0, []
    for number, (batch, s, credit_of) in enumerate(zip(batches, scores, credits, strict=True)):
        old = rollout_time[number] if rollout_time is not None else None
        asked = replace(request, credit_of=credit_of, uniforms=region_uniforms(t.config.seed, batch), rollout_time=old)
        last = number == len(batches) - 1
        with t.accelerator.autocast(), gradient_sync(t, last=last):
            micro_loss, record = t.wrapped(batch, s, asked)
            # Data parallelism averages gradients; the denominator is global already.
            t.accelerator.backward(micro_loss * t.accelerator.num_processes)
        loss += float(micro_loss.detach())
        records.append(record)
    grad_norm = float(t.accelerator.clip_grad_norm_(t.parameters, t.config.optimizer.max_grad_norm))
    applied = _apply(t, loss, grad_norm)
    everyone = combine(gather_object([combine([batch_sums(*p) for p in zip(batches, scores, records, strict=True)])]))
    rows = combine(gather_object([rollout_sums(rollout) | {"loss": loss}]))
    if _records(t) and t.accelerator.is_main_process and rollout_time is None:
        t.run.record(t.completed + 1, token_rows(
            rollout, batches, scores, records, tokenizer=t.pair.tokenizer, sequences=t.config.record.sequences,
            top_k=t.config.record.top_k, seed=t.config.seed,
        ))  # fmt: skip
    t.completed += 1
    seconds = seconds | {"seconds_update": time.perf_counter() - started}
    total_seconds = seconds["seconds_rollout"] + seconds["seconds_teacher"] + seconds["seconds_update"]
    metrics = {
        "step": t.completed,
        "loss": finite(rows["loss"]),
        **step_metrics(everyone | rows),
        "grad_norm": finite(grad_norm),
        "update_norm": finite(update_norm(t.optimizer)) if applied else 0.0,
        "lr": t.optimizer.param_groups[0]["lr"],
        "tokens_per_second": everyone.get("tokens", 0.0) / total_seconds,
        **seconds,
        "peak_memory_bytes": peak_memory_bytes(t.pair.device),
        "skipped_steps": t.skipped,
    }
    return metrics, (rollout_time or records)


def _credits(
    t: Training,
    batches: list[TokenBatch],
    scores: list[Scores],
    rollout_time: list[Record] | None,
    request: CreditRequest,
) -> list[CreditOf]:
    """`credit_of` per micro-batch: the strategy itself, or a credit made beforehand from a pass without gradient."""
    weight = t.config.guidance.weight
    if t.strategy.scope == "token":
        return [token_credit(t.strategy, weight)] * len(batches)
    records = []
    with torch.no_grad(), t.accelerator.autocast():
        for number, (batch, s) in enumerate(zip(batches, scores, strict=True)):
            old = rollout_time[number] if rollout_time is not None else None
            records.append(t.wrapped(batch, s, replace(request, credit_of=None, rollout_time=old))[1])
    made = batch_credit(
        t.strategy, batches, scores, records, seed=t.config.seed, progress=request.progress, guidance_weight=weight
    )
    return [fixed_credit(credit) for credit in made]


def _apply(t: Training, loss: float, grad_norm: float) -> bool:
    """Takes the optimizer step unless something is not finite on any process. Returns whether it was taken."""
    sound = all(gather_object([math.isfinite(loss) and math.isfinite(grad_norm)]))
    if sound:
        t.optimizer.step()
        t.skipped_in_a_row = 0
    else:
        t.skipped += 1
        t.skipped_in_a_row += 1
    t.optimizer.zero_grad(set_to_none=True)
    return sound


# ── before, between and after the steps ─────────────────────────────────────────────────────────────────────────────


def _finish_step(t: Training, metrics: dict[str, Any]) -> None:
    """Evaluates when due, logs, warns, and stops a run that is beyond help."""
    c = t.config
    if (c.eval_every and t.completed % c.eval_every == 0) or t.completed == c.steps:
        metrics |= evaluate(t)
        keep_best(t, metrics)
    t.last_metrics = metrics
    _log(t, metrics)
    t.display.step(metrics, c.steps)
    for warning in t.health.check(metrics):
        t.display.warn(f"step {t.completed}: {warning}")
        if c.stop_when_unhealthy:
            raise UserError(f"stopped at step {t.completed} by --stop-when-unhealthy: {warning}")
    if t.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise UserError(
            f"{MAX_SKIPPED_IN_A_ROW} steps in a row had a non-finite loss or gradient norm; training stopped at step "
            f"{t.completed}. The weights are those before the first of them. Lower --learning-rate, or clip the reward "
            f"(--outlier clip); checkpoints in {t.run.checkpoints} are untouched"
        )


# ── small pieces ────────────────────────────────────────────────────────────────────────────────────────────────────


def _records(t: Training) -> bool:
    """Whether the step in flight is recorded."""
    every = t.config.record.every
    return bool(every) and (t.completed + 1) % every == 0


def _log(t: Training, metrics: dict[str, Any]) -> None:
    """metrics.jsonl, and the trackers."""
    if t.accelerator.is_main_process:
        t.run.append(metrics)
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    t.accelerator.log(numbers, step=metrics["step"])


def gradient_sync(t: Training, *, last: bool) -> contextlib.AbstractContextManager[Any]:
    """Gradients are exchanged once per optimizer step, in its last micro-batch."""
    return contextlib.nullcontext() if last else t.accelerator.no_sync(t.wrapped)


def learning_rate(config: Config, step: int) -> float:
    """Rate of the update after `step` completed ones: linear warm-up, then constant, linear or cosine to zero."""
    warmup = config.optimizer.warmup_steps
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    factor = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return config.learning_rate * factor[config.optimizer.schedule]


def finite(value: float) -> float | None:
    """JSON knows no nan: a number that is not finite becomes null."""
    return value if math.isfinite(value) else None
