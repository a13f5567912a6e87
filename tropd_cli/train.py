"""The training loop. Data flows one way: prompts -> rollout -> teacher scores -> credit -> loss -> optimizer."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object

from strategies import Credit, Needs

from .batching import TokenBatch, plan_micro_batches, row_lengths, token_batch
from .config import Config
from .credit_loss import CreditOf, CreditRequest, Record
from .crediting import batch_credit, fixed_credit, region_uniforms, token_credit
from .data import prompts_of_step
from .errors import UserError
from .memory import Exchange, in_step, with_smaller_batches
from .metrics import batch_sums, combine, peak_memory_bytes, rollout_sums, step_metrics, update_norm
from .recording import spread, token_rows
from .rollout import Rollout, make_rollout, step_prefix_limit
from .scoring import Scores, ScoringOptions, score_reference, score_teacher
from .session import Training, caught_signals, evaluate, keep_best, probe, restore, save, save_final
from .sharding import levelled, whole

T = TypeVar("T")

#: A run stops after this many non-finite steps in a row.
MAX_SKIPPED_IN_A_ROW = 10


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the run is saved."""


@dataclass
class ScoredRollout:
    """A rollout in micro-batches of at most `token_budget` with what the frozen models say of it.

    recorded: whether its first sequences are kept in rollouts/.
    first: record of the first training forward, which later updates on the same rollout take their ratios from.
    """

    rollout: Rollout
    batches: list[TokenBatch]
    scores: list[Scores]
    token_budget: int
    prefix_limit: int
    seconds: dict[str, float]
    recorded: bool = False
    first: list[Record] | None = None


@dataclass
class Gradient:
    """What one pass over a rollout gave, its gradient apart, which lies in the parameters: this process's share of it."""

    loss: float
    records: list[Record]
    seconds: float


# ── the loop ────────────────────────────────────────────────────────────────────────────────────────────────────────


def distill(t: Training, *, resume: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trains until `config.steps` updates are done, and saves the student.

    Returns:
        (the last line of metrics.jsonl, the first held-out evaluation).

    Raises:
        UserError: a problem the user can fix.
        Interrupted: a signal arrived; everything is saved.
    """
    config, display = t.config, t.display
    if resume:
        restore(t)
    with caught_signals() as received, t.watch:
        if t.completed == 0:
            log(t, {"step": 0, **probe(t), **evaluate(t)})
        display.start(t.completed, config.steps)
        while t.completed < config.steps:
            rollout, prefix_limit, seconds_rollout = roll_out(t)
            scored, metrics = score_and_update(t, rollout, prefix_limit, seconds_rollout)
            finish_step(t, metrics)
            for _ in range(min(config.updates_per_rollout - 1, config.steps - t.completed)):
                finish_step(t, update(t, scored))
            stop = any(gather_object([bool(received)]))
            if stop or checkpoint_is_due(config, t.completed):
                save(t)
            if stop and t.completed < config.steps:
                raise Interrupted
        display.stop()
        save_final(t)
    return t.last_metrics, t.first_evaluation


def roll_out(t: Training) -> tuple[Rollout, int, float]:
    """This process's share of the step's responses. Returns (rollout, longest prefix allowed, seconds)."""
    started, c = time.perf_counter(), t.config
    t.watch.beat(f"sampling step {t.completed + 1}")
    chosen = prompts_of_step(len(t.prompts), c.prompts_per_step, t.completed // c.updates_per_rollout, c.seed)
    prompts = t.mine([t.prompts[index] for index in chosen])
    limit = step_prefix_limit(t.completed, c.steps, c.max_response_length) if t.guided else 0

    def write(token_budget: int) -> Rollout:
        t.write.token_budget = t.write_as_teacher.token_budget = token_budget
        return make_rollout(
            t.completed,
            prompts,
            t.prefixes.draw(t.completed, prompts, limit),
            t.write,
            rollouts_per_prompt=c.rollouts_per_prompt,
            max_response_length=c.max_response_length,
            vocabulary=t.pair.vocabulary,
        )

    longest = max((len(p.ids) for _, p in prompts), default=0) + c.max_response_length
    rollout, t.rollout_tokens = shrinking(t, write, t.rollout_tokens, longest, "rollout_batch_tokens")
    return rollout, limit, time.perf_counter() - started


def score_and_update(
    t: Training, rollout: Rollout, prefix_limit: int, seconds_rollout: float
) -> tuple[ScoredRollout, dict[str, Any]]:
    """Teacher scores and the first update on a rollout, in smaller micro-batches when memory runs out."""

    def attempt(token_budget: int) -> tuple[ScoredRollout, Gradient]:
        t.optimizer.zero_grad(set_to_none=True)
        scored = score(t, rollout, token_budget)
        scored.prefix_limit, scored.seconds["seconds_rollout"] = prefix_limit, seconds_rollout
        return scored, accumulate(t, scored)

    (scored, gradient), t.micro_batch_tokens = shrinking(
        t, attempt, t.micro_batch_tokens, longest_row(rollout), "micro_batch_tokens"
    )
    return scored, apply(t, scored, gradient)


def score(t: Training, rollout: Rollout, token_budget: int) -> ScoredRollout:
    """Micro-batches with the frozen models' scores. Every process makes the same number of micro-batches."""
    started = time.perf_counter()
    t.watch.beat(f"scoring step {t.completed + 1}")
    plan = levelled(plan_micro_batches(row_lengths(rollout), token_budget, packed=t.pair.packs))
    recorded = is_recorded(t)
    observed = Needs(teacher_entropy=True, teacher_top_k=t.config.record.top_k) if recorded else Needs()
    options = ScoringOptions(
        t.config.temperature, t.pair.vocabulary.allowed, rank=recorded, chunk_tokens=t.config.chunk_tokens
    )
    batches = [
        token_batch(rollout, rows, pad_id=t.pair.vocabulary.pad_id, packed=t.pair.packs).to(t.pair.device)
        for rows in plan
    ]

    def all_scores() -> list[Scores]:
        with t.frozen_models():
            return [score_batch(t, batch, t.needs | observed, options) for batch in batches]

    scores = in_step(all_scores, exchange_of(t))
    seconds = {"seconds_teacher": time.perf_counter() - started}
    return ScoredRollout(rollout, batches, scores, token_budget, 0, seconds, recorded)


def score_batch(t: Training, batch: TokenBatch, needs: Needs, options: ScoringOptions) -> Scores:
    """What the frozen models say of one micro-batch."""
    teacher, reference = t.pair.teacher, t.pair.reference
    scores = score_teacher(teacher, batch.to(teacher.device), needs, options).to(t.pair.device)
    if reference is None:
        return scores
    logprob = score_reference(reference, batch.to(reference.device), options)
    return scores.replace(reference_logprob=logprob.to(t.pair.device))


def update(t: Training, scored: ScoredRollout) -> dict[str, Any]:
    """A later update on a rollout, in smaller micro-batches when memory runs out. Returns the step's metrics."""
    scored.seconds |= {"seconds_rollout": 0.0, "seconds_teacher": 0.0}

    def attempt(token_budget: int) -> Gradient:
        t.optimizer.zero_grad(set_to_none=True)
        if token_budget < scored.token_budget:
            regroup(scored, score(t, scored.rollout, token_budget))
        return accumulate(t, scored)

    gradient, t.micro_batch_tokens = shrinking(
        t, attempt, t.micro_batch_tokens, longest_row(scored.rollout), "micro_batch_tokens"
    )
    return apply(t, scored, gradient)


def regroup(scored: ScoredRollout, smaller: ScoredRollout) -> None:
    """The same rollout in other micro-batches; what the student said of its tokens at first goes with them."""
    if scored.first is not None:
        keys = [token for batch in scored.batches for token in tokens_of(batch)]
        place = {token: index for index, token in enumerate(keys)}
        records = [record for record in scored.first if record]  # one without tokens has no entries
        flat = {name: torch.cat([record[name] for record in records]) for name in (records[0] if records else {})}
        indices = [torch.tensor([place[token] for token in tokens_of(batch)]) for batch in smaller.batches]
        scored.first = [{name: value[i] for name, value in flat.items()} if len(i) else {} for i in indices]
    scored.batches, scored.scores, scored.token_budget = smaller.batches, smaller.scores, smaller.token_budget


def accumulate(t: Training, scored: ScoredRollout) -> Gradient:
    """Loss and gradient over this process's share of the rollout. Changes no weight, so it may be tried again."""
    started = time.perf_counter()
    request = CreditRequest(
        needs=t.needs,
        num_tokens=max(1, sum(gather_object([sum(map(len, scored.batches))]))),
        progress=t.completed / t.config.steps,
        ratio_clip=t.strategy.ratio_clip,
        observe_top_k=t.config.record.top_k if scored.recorded else 0,
    )
    loss, records = 0.0, []
    # Data parallelism averages gradients over processes, and Accelerate divides by its accumulation steps; the
    # denominator is global already.
    scale = t.accelerator.num_processes * t.accelerator.gradient_accumulation_steps
    for number, credit_of in enumerate(credits(t, scored, request)):
        with gradients_apart(t):
            micro_loss, record = forward(t, scored, number, replace(request, credit_of=credit_of))
            t.accelerator.backward(micro_loss * scale)
        loss += float(micro_loss.detach())
        records.append(record)
    return Gradient(loss, records, time.perf_counter() - started)


def sum_gradients(t: Training, scored: ScoredRollout) -> None:
    """Adds the processes' gradients up, now that memory sufficed for each one's share.

    Data parallelism exchanges gradients inside a backward pass, where a process that ran out of memory would leave the
    others waiting. So this pass has no tokens: it adds nothing, and what it exchanges is what has been accumulated.
    """
    if t.accelerator.num_processes == 1 or t.pair.sharded:
        return
    t.watch.beat(f"exchanging gradients in step {t.completed + 1}")
    batch = token_batch(scored.rollout, [], pad_id=t.pair.vocabulary.pad_id).to(t.pair.device)
    nothing = torch.zeros(0, device=t.pair.device)
    request = CreditRequest(needs=Needs(), credit_of=fixed_credit(Credit(sampled=nothing)))
    with t.accelerator.autocast():
        loss, _ = t.wrapped(batch, Scores(teacher_logprob=nothing), request)
    t.accelerator.backward(loss)


def apply(t: Training, scored: ScoredRollout, gradient: Gradient) -> dict[str, Any]:
    """The optimizer step of an accumulated gradient. Returns the step's metrics."""
    started = time.perf_counter()
    sum_gradients(t, scored)
    for group in t.optimizer.param_groups:
        group["lr"] = learning_rate(t.config, t.completed)
    grad_norm = float(whole(t.accelerator.clip_grad_norm_(t.parameters, t.config.optimizer.max_grad_norm)))
    applied = apply_update(t, gradient.loss, grad_norm)
    t.completed += 1
    if scored.first is None:
        scored.first = gradient.records
        record_rollout(t, scored, gradient.records)
    scored.seconds["seconds_update"] = gradient.seconds + time.perf_counter() - started
    return collect_metrics(t, scored, gradient.records, loss=gradient.loss, grad_norm=grad_norm, applied=applied)


def forward(t: Training, scored: ScoredRollout, number: int, request: CreditRequest) -> tuple[torch.Tensor, Record]:
    """One micro-batch through the wrapped student."""
    t.watch.beat(f"updating in step {t.completed + 1}")
    batch = scored.batches[number]
    old = None if scored.first is None else scored.first[number]
    uniforms = region_uniforms(t.config.seed, batch)
    with t.accelerator.autocast():
        return t.wrapped(batch, scored.scores[number], replace(request, uniforms=uniforms, rollout_time=old))


def credits(t: Training, scored: ScoredRollout, request: CreditRequest) -> list[CreditOf]:
    """`credit_of` per micro-batch: the strategy itself, or a credit made beforehand from a pass without gradient."""
    weight, count = t.config.guidance.weight, len(scored.batches)
    if t.strategy.scope == "token":
        return [token_credit(t.strategy, weight)] * count
    with torch.no_grad():
        passes = lambda: [forward(t, scored, number, request)[1] for number in range(count)]  # noqa: E731
        records = in_step(passes, exchange_of(t))
    made = batch_credit(
        t.strategy,
        scored.batches,
        scored.scores,
        records,
        seed=t.config.seed,
        progress=request.progress,
        guidance_weight=weight,
    )
    return [fixed_credit(credit) for credit in made]


def apply_update(t: Training, loss: float, grad_norm: float) -> bool:
    """Takes the optimizer step unless something is not finite on any process. Returns whether it was taken."""
    sound = all(gather_object([math.isfinite(loss) and math.isfinite(grad_norm)]))
    if sound:
        t.optimizer.step()
    t.skipped += not sound
    t.skipped_in_a_row = 0 if sound else t.skipped_in_a_row + 1
    t.optimizer.zero_grad(set_to_none=True)
    return sound


# ── what a step leaves behind ───────────────────────────────────────────────────────────────────────────────────────


def collect_metrics(
    t: Training, scored: ScoredRollout, records: list[Record], *, loss: float, grad_norm: float, applied: bool
) -> dict[str, Any]:
    """The step's line of metrics.jsonl, over all processes."""
    sums = [batch_sums(*parts) for parts in zip(scored.batches, scored.scores, records, strict=True)]
    total = combine(gather_object([combine([*sums, rollout_sums(scored.rollout), {"loss": loss}])]))
    return {
        "step": t.completed,
        "loss": finite(total["loss"]),
        **step_metrics(total),
        "grad_norm": finite(grad_norm),
        "update_norm": finite(update_norm(t.optimizer)) if applied else 0.0,
        "prefix_limit": scored.prefix_limit,
        "lr": t.optimizer.param_groups[0]["lr"],
        "tokens_per_second": total.get("tokens", 0.0) / sum(scored.seconds.values()),
        **scored.seconds,
        "peak_memory_bytes": peak_memory_bytes(t.pair.device),
        "skipped_steps": t.skipped,
    }


def record_rollout(t: Training, scored: ScoredRollout, records: list[Record]) -> None:
    """Keeps some sequences of a recorded step in rollouts/, the same ones on any number of processes."""
    if not scored.recorded:
        return
    mine = token_rows(
        scored.rollout,
        scored.batches,
        scored.scores,
        records,
        tokenizer=t.pair.tokenizer,
        kept=spread(scored.rollout, t.config.record.sequences, t.config.prompts_per_step),
        top_k=t.config.record.top_k,
        seed=t.config.seed,
    )
    rows = gather_object(list(mine))
    if t.accelerator.is_main_process:
        try:
            t.run.record(t.completed, sorted(rows, key=lambda row: (row.sequence, row.position)))
        except OSError as error:
            t.display.warn(f"rollouts of step {t.completed} not recorded: {error}")


def finish_step(t: Training, metrics: dict[str, Any]) -> None:
    """Evaluates when due, logs, warns, and stops a run that is beyond help."""
    c = t.config
    if (c.eval_every and t.completed % c.eval_every == 0) or t.completed == c.steps:
        metrics |= evaluate(t)
        keep_best(t, metrics)
    log(t, metrics)
    t.display.step(metrics, c.steps)
    for warning in t.health.check(metrics):
        t.display.warn(f"step {t.completed}: {warning}")
        if c.stop_when_unhealthy:
            save(t)
            raise UserError(f"stopped at step {t.completed} by --stop-when-unhealthy: {warning}")
    if t.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise UserError(
            f"{MAX_SKIPPED_IN_A_ROW} steps in a row had a non-finite loss or gradient norm; training stopped at step "
            f"{t.completed}. Lower --learning-rate, or bound the reward (--outlier clip). The checkpoints in "
            f"{t.run.checkpoints} are untouched"
        )


def log(t: Training, metrics: dict[str, Any]) -> None:
    """metrics.jsonl, and the trackers."""
    t.last_metrics = metrics
    if t.accelerator.is_main_process:
        t.run.append(metrics)
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    t.accelerator.log(numbers, step=metrics["step"])


# ── small pieces ────────────────────────────────────────────────────────────────────────────────────────────────────


def is_recorded(t: Training) -> bool:
    """Whether the rollout in flight is kept: one of its updates completes a multiple of `record.every`."""
    every, last = t.config.record.every, t.completed + t.config.updates_per_rollout
    return bool(every) and last // every > t.completed // every


def checkpoint_is_due(config: Config, completed: int) -> bool:
    """After the last update, and whenever the updates of one rollout passed a multiple of `checkpoint_every`."""
    every = config.checkpoint_every
    return completed >= config.steps or bool(every and completed % every < config.updates_per_rollout)


def shrinking(t: Training, action: Callable[[int], T], budget: int, smallest: int, knob: str) -> tuple[T, int]:
    """`action` with as many tokens per batch as the memory of every process allows."""
    return with_smaller_batches(
        action, budget, smallest=smallest, knob=knob, warn=t.display.warn, exchange=exchange_of(t)
    )


def gradients_apart(t: Training) -> contextlib.AbstractContextManager[Any]:
    """Gradients are exchanged once per optimizer step, after its last micro-batch; sharded ones at once, so that none is
    ever whole."""
    return contextlib.nullcontext() if t.pair.sharded else t.accelerator.no_sync(t.wrapped)


def exchange_of(t: Training) -> Exchange | None:
    """What every process says of its memory, or None where models are sharded: every forward then takes all processes,
    so one whose memory ran out in it cannot meet the others. They meet, so they go on with the same number of beats."""
    if t.pair.sharded:
        return None

    def exchange(mine: Any) -> list[Any]:
        beats, said = zip(*gather_object([(t.watch.beats, mine)]), strict=True)
        t.watch.beats = max(beats)
        return list(said)

    return exchange


def longest_row(rollout: Rollout) -> int:
    """Tokens of the longest row, prompt included."""
    return max(row_lengths(rollout), default=1)


def tokens_of(batch: TokenBatch) -> list[tuple[int, int]]:
    """(row, position) of each token of a micro-batch."""
    return list(zip(batch.row.tolist(), batch.position.tolist(), strict=True))


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
