"""What one run holds, and what happens between its steps: probe, held-out evaluation, checkpoints, signals."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from strategies import Needs

from .checkpoint import latest_checkpoint, load_checkpoint, prune, save_checkpoint, snapshot, sync
from .config import Config, build_strategy
from .credit_loss import CreditLoss
from .data import Prompt, load_prompts, prompts_of_step
from .dealing import mine
from .display import Display
from .errors import UserError
from .export import save_student, student_weights
from .health import Health
from .heldout import HeldOut, forward_kl_on_teacher_text, measure
from .judging import judge_for
from .offload import Offload, check_offload
from .pair import load_pair
from .prefixes import TeacherPrefixes
from .processes import Watch
from .rollout import TransformersGenerator
from .run_directory import RunDirectory
from .sharding import make_shards, one_at_a_time, shard_student

#: Tokens (rows x padded length) of one micro-batch and of one generation batch, by device, unless configured.
MICRO_BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
ROLLOUT_BATCH_TOKENS = {"cpu": 32768, "cuda": 262144}

#: What libraries raise when the disk is full.
DISK_ERRORS = (OSError, SafetensorError)

#: Strategies that come with teacher-written prefixes unless the configuration says otherwise.
GUIDED_BY_DEFAULT = ("trust-region", "trust-region-aopd")


class Training:
    """Everything one run holds. `completed` counts finished updates, `saved` those in the newest checkpoint."""

    def __init__(self, config: Config, run: RunDirectory, display: Display, accelerator: Accelerator) -> None:
        self.config, self.run, self.display, self.accelerator = config, run, display, accelerator
        self.strategy = build_strategy(config)
        self.needs = self.strategy.needs | Needs(teacher_logprob=True, student_entropy=True)
        if config.teacher_offload:
            check_offload(config, self.needs)
        shards = make_shards(config, accelerator)
        with one_at_a_time(accelerator) if shards else nullcontext():
            self.pair = load_pair(config, self.needs, shards)
            self.module = CreditLoss(
                self.pair.student, temperature=config.temperature, chunk_tokens=config.chunk_tokens
            )
            if shards:
                shard_student(self.module, self.pair.student, shards)
        frozen = [model for model in (self.pair.teacher, self.pair.reference) if model]
        self.offload = Offload(frozen) if config.teacher_offload else None
        self.standard_input = sys.stdin.read() if config.data == "-" else None
        self.prompts = self._load(config.data)
        wanted = config.steps * config.prompts_per_step // config.updates_per_rollout
        if wanted > len(self.prompts):
            display.note(f"{len(self.prompts)} prompts for {wanted} places: they come again, reshuffled")
        self.heldout_prompts = self._load(config.eval_data)[: config.eval_prompts] if config.eval_data else []
        self.judge = judge_for(config.verifier, config.data)
        enabled = config.guidance.enabled
        self.guided = config.strategy["name"] in GUIDED_BY_DEFAULT if enabled == "auto" else enabled

        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=(config.optimizer.betas[0], config.optimizer.betas[1]),
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
        )
        # A sharded module exchanges gradients by itself.
        self.wrapped = self.module if shards else accelerator.prepare(self.module)
        self.optimizer = accelerator.prepare(optimizer)

        kind = self.pair.device.type
        self.micro_batch_tokens = config.micro_batch_tokens or MICRO_BATCH_TOKENS.get(kind, 4096)
        self.rollout_tokens = config.rollout_batch_tokens or ROLLOUT_BATCH_TOKENS.get(kind, 32768)
        self.write = self.generator("student")
        self.write_as_teacher = self.generator("teacher")
        self.prefixes = TeacherPrefixes(
            run.teacher_responses, self.write_as_teacher, tokenizer=self.pair.tokenizer,
            vocabulary=self.pair.vocabulary, seed=config.seed, rule=config.guidance.length, rank=accelerator.process_index,
        )  # fmt: skip
        self.heldout_prefixes = TeacherPrefixes(
            run.path / "heldout_responses", self.generator("heldout"), tokenizer=self.pair.tokenizer,
            vocabulary=self.pair.vocabulary, seed=config.seed, rule="min", rank=accelerator.process_index,
        )  # fmt: skip
        self.watch = Watch(
            run.path / "processes", accelerator.process_index, accelerator.num_processes, timeout=config.hang_timeout,
            advice=f"Continue with: tropd distill --resume {run.path}", before_exit=display.stop,
        )  # fmt: skip
        self.health = Health(config.optimizer.max_grad_norm)
        self.completed = self.skipped = self.skipped_in_a_row = self.saved = 0
        self.best: float | None = None
        self.first_evaluation: dict[str, Any] = {}
        self.last_metrics: dict[str, Any] = {}

    def frozen_models(self) -> AbstractContextManager[None]:
        """While teacher and reference are at work."""
        return self.offload.at_work() if self.offload else nullcontext()

    def _load(self, source: str | None) -> list[Prompt]:
        assert source is not None
        prompts, problems = load_prompts(
            source,
            self.pair.prompt_format,
            skip_bad_rows=self.config.skip_bad_rows,
            text=self.standard_input if source == "-" else None,
        )
        if problems:
            self.display.warn(f"{source}: {len(problems)} bad rows skipped, first: {problems[0]}")
        return prompts

    def generator(self, stream: str) -> TransformersGenerator:
        is_teacher = stream in ("teacher", "heldout")
        return TransformersGenerator(
            self.pair.teacher if is_teacher else self.pair.student,
            self.pair.vocabulary,
            seed=self.config.seed,
            stream=stream,
            temperature=self.config.temperature,
            token_budget=self.rollout_tokens,
            context=torch.no_grad if is_teacher else self.pair.autocast,
        )

    def mine(self, items: Sequence[Any]) -> list[tuple[int, Any]]:
        """(global number, item) of the items this process handles."""
        return list(mine(self.accelerator, list(enumerate(items))))


# ── measuring ─────────────────────────────────────────────────────────────────────────────────────────────────────


def probe(t: Training) -> dict[str, Any]:
    """How far student and teacher are apart before training, on guidance-free samples from the training prompts."""
    count = -(-t.config.probe_rollouts // t.config.rollouts_per_prompt)
    if not count:
        return {}
    chosen = prompts_of_step(len(t.prompts), min(count, len(t.prompts)), 0, t.config.seed)
    task = _task(t, [t.prompts[index] for index in chosen], samples=t.config.rollouts_per_prompt)
    with t.frozen_models():
        result = measure(t.pair, t.generator("probe"), task)
    if result["acceptance"] > 0.99 and result["reverse_kl"] < 1e-3:
        t.display.warn(
            f"teacher and student agree before training (KL {result['reverse_kl']:.2g} nats, acceptance "
            f"{result['acceptance']:.4f}): there is nothing to learn. Is --teacher the student again?"
        )
    numbers = {f"probe_{name}": value for name, value in result.items()}
    return numbers | {"outlier_share": 1.0 - result["acceptance"], "acceptance": result["acceptance"]}


def evaluate(t: Training) -> dict[str, Any]:
    """Held-out accuracy and divergences, or {} without held-out prompts."""
    if not t.heldout_prompts:
        return {}
    t.watch.beat(f"evaluating after step {t.completed}")
    task = _task(t, t.heldout_prompts, samples=t.config.eval_samples)
    with t.frozen_models():
        result = measure(t.pair, t.generator("evaluation"), task)
        responses = heldout_responses(t, task)
        result["forward_kl"] = forward_kl_on_teacher_text(t.pair, responses, task)
    numbers = {f"eval_{name}": value for name, value in result.items()}
    t.first_evaluation = t.first_evaluation or numbers
    t.best = held_out_score(numbers) if t.best is None else t.best  # best/ has to beat the student as it was
    return numbers


def _task(t: Training, prompts: list[Prompt], *, samples: int) -> HeldOut:
    return HeldOut(
        t.mine(prompts), t.judge, samples, t.config.max_response_length, t.config.temperature, t.micro_batch_tokens
    )


def heldout_responses(t: Training, task: HeldOut) -> list[list[int]]:
    """The teacher's responses to this process's held-out prompts: ready ones, or made once and kept."""
    return t.heldout_prefixes.responses([prompt for _, prompt in task.prompts], t.config.max_response_length)


def held_out_score(metrics: dict[str, Any]) -> float | None:
    """Held-out accuracy, without answers minus the reverse KL: higher is better. None where neither was measured."""
    accuracy, divergence = metrics.get("eval_accuracy"), metrics.get("eval_reverse_kl")
    return accuracy if accuracy is not None else None if divergence is None else -float(divergence)


def keep_best(t: Training, metrics: dict[str, Any]) -> None:
    """Saves the student as best/ when held-out accuracy (without answers: reverse KL) is better than ever."""
    if not t.config.keep_best:
        return
    score = held_out_score(metrics)
    if score is not None and (t.best is None or score > t.best):
        t.best = score
        weights = student_weights(t.pair, keep=t.accelerator.is_main_process)
        if t.accelerator.is_main_process:
            try:
                save_student(t.pair, t.config, t.run.best, metrics, weights)
            except DISK_ERRORS as error:
                t.display.warn(f"best student of step {t.completed} not saved: {error}")


# ── checkpoints and signals ─────────────────────────────────────────────────────────────────────────────────────────


def save(t: Training) -> None:
    """Writes a checkpoint. A full disk is reported and survived: the ones before stay."""
    t.watch.beat("saving a checkpoint" if t.accelerator.is_main_process else "waiting for the checkpoint")
    t.accelerator.wait_for_everyone()
    weights, moments = snapshot(t.module, unwrapped(t.optimizer), keep=t.accelerator.is_main_process)
    if t.accelerator.is_main_process:
        state = {
            "skipped": t.skipped,
            "skipped_in_a_row": t.skipped_in_a_row,
            "best": t.best,
            "first_evaluation": t.first_evaluation,
            "last_metrics": t.last_metrics,
            "health": vars(t.health) | {"warned": sorted(t.health.warned)},
        }
        try:
            sync(t.run.metrics)  # a power cut must not leave a checkpoint without the lines before it
            save_checkpoint(t.run.checkpoints, t.completed, weights, moments, state)
            t.saved = t.completed
            if not t.skipped_in_a_row:  # while steps are skipped, the last checkpoint of a sound one stays
                prune(t.run.checkpoints, t.config.keep_checkpoints)
        except OSError as error:
            t.display.warn(f"no checkpoint at step {t.completed}: {error}. The ones before are untouched")
    t.accelerator.wait_for_everyone()


def save_final(t: Training) -> None:
    """Writes student/. Raises UserError when the disk is full."""
    t.watch.beat("saving the student" if t.accelerator.is_main_process else "waiting for the student")
    weights = student_weights(t.pair, keep=t.accelerator.is_main_process)
    if t.accelerator.is_main_process:
        try:
            save_student(t.pair, t.config, t.run.student, t.last_metrics, weights)
        except DISK_ERRORS as error:
            raise UserError(
                f"{t.run.student} cannot be written: {error}. The last checkpoint is untouched; make room, then: "
                f"tropd distill --resume {t.run.path}"
            ) from error
    t.accelerator.wait_for_everyone()


def restore(t: Training) -> None:
    """Continues from the newest sound checkpoint, and cuts metrics and recorded rollouts back to it."""
    path, problems = latest_checkpoint(t.run.checkpoints)
    for problem in problems:
        t.display.warn(f"damaged checkpoint passed over: {problem}")
    if path is None:
        t.display.note("no checkpoint yet: starting from the beginning")
        if t.accelerator.is_main_process:
            t.run.cut_back(-1)
        return
    state = load_checkpoint(path, t.module, unwrapped(t.optimizer))
    t.saved = state["step"]
    t.completed, t.skipped, t.skipped_in_a_row = state["step"], state["skipped"], state["skipped_in_a_row"]
    t.best, t.first_evaluation, t.last_metrics = state["best"], state["first_evaluation"], state["last_metrics"]
    t.health = Health(**state["health"] | {"warned": set(state["health"]["warned"])})
    if t.accelerator.is_main_process:
        t.run.cut_back(t.completed)
    t.accelerator.wait_for_everyone()
    t.display.note(f"resuming after step {t.completed} from {path}")


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """torch's optimizer inside Accelerate's wrapper."""
    inner = getattr(optimizer, "optimizer", optimizer)
    assert isinstance(inner, torch.optim.Optimizer)
    return inner


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM, so that the step in flight is finished and saved. A second SIGINT interrupts at once."""
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
