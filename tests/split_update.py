"""A script: updates of strategies on the same rollouts, by one process, by two, by two with accumulation, by three, and by
two of which one is short of memory; a sharded student; whole sampled runs on one, two and changing numbers of
processes; inspections and evaluations on one and two. Writes FOLDER for the tests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import peft  # noqa: F401  imported before the processes are forked
import torch
import transformers.models.llama.modeling_llama  # noqa: F401
from torch import Tensor

from strategies import STRATEGIES, Needs
from tropd_cli import train
from tropd_cli.config import build_config
from tropd_cli.credit_loss import CreditLoss
from tropd_cli.demo.task import problems as demo_problems
from tropd_cli.display import Display
from tropd_cli.launch import make_accelerator
from tropd_cli.models import LanguageModel, add_lora
from tropd_cli.packing import enable_packing
from tropd_cli.processes import Watch
from tropd_cli.rollout import Rollout
from tropd_cli.sharding import make_shards, shard_frozen, shard_student, whole

from .forked import start, tropd
from .tiny import random_rollout, tiny_model, tiny_vocabulary

#: Split -> (processes, tokens of a micro-batch, strategies). One per scope and kind of credit stands for the others.
SOME = ("entropy", "gkd", "trust-region")
SPLITS = {
    "one": (1, 4096, STRATEGIES.names()),
    "two": (2, 4096, STRATEGIES.names()),
    "accumulated": (2, 20, STRATEGIES.names()),
    "three": (3, 20, SOME),
    "short": (2, 64, SOME),
}
#: Four prompts and one: the second rollout leaves all processes but the first without work.
LENGTHS = ([5, 9, 3, 7, 12, 4, 6], [6, 8])


def share(rollout: Rollout, rank: int, count: int) -> Rollout:
    """The rows of one process: prompts are dealt in turn."""
    rows = [row for row, group in enumerate(rollout.group.tolist()) if group % count == rank]
    values: dict[str, Any] = {}
    for field in dataclasses.fields(rollout):
        value = getattr(rollout, field.name)
        values[field.name] = (
            value[rows]
            if isinstance(value, Tensor)
            else [value[r] for r in rows]
            if isinstance(value, list) and value
            else value
        )
    return Rollout(**values)


def training(name: str, *, lora: bool, folder: Path, kind: str = "llama", shard: str = "none") -> Any:
    """What the loop's update reads of a run, on tiny models in float64."""
    config = build_config(
        {
            "strategy": name,
            "steps": 4,
            "learning_rate": 1e-3,
            "record": {"every": 0},
            "dtype": "float32",
            "shard": shard,
            "device": "cpu",
        }
    )
    student = tiny_model(kind, seed=0, dtype=torch.float64)
    if lora:
        student = add_lora(student, rank=2, alpha=4, targets="all-linear")
        for parameter_name, parameter in student.model.named_parameters():
            if "lora_B" in parameter_name:  # zero at first, which would leave half of the gradients zero
                parameter.data.normal_(generator=torch.Generator().manual_seed(len(parameter_name)))
        student = LanguageModel(student.model.double(), student.name, student.vocabulary, student.generation_config)
    frozen = [tiny_model(kind, seed=seed, dtype=torch.float64) for seed in (5, 7)]
    for model in frozen:
        model.model.eval().requires_grad_(False)
    packs = [enable_packing(m.model, m.backbone, [5, 6, 7], tolerance=1e-9) for m in (student, *frozen)]
    assert all(packs) == (kind != "gemma")
    strategy = STRATEGIES.build(name)
    module = CreditLoss(student)
    accelerator = make_accelerator(config, str(folder))
    shards = make_shards(config, accelerator)
    if shards:
        shard_student(module, student, shards)
        for model in frozen:
            shard_frozen(model, shards, torch.device("cpu"))
    parameters = [p for p in module.parameters() if p.requires_grad]
    wrapped = module if shards else accelerator.prepare(module)
    optimizer = accelerator.prepare(torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0))
    pair = SimpleNamespace(
        student=student, teacher=frozen[0], reference=frozen[1] if strategy.needs.reference_logprob else None,
        device=torch.device("cpu"), vocabulary=tiny_vocabulary(), packs=all(packs), sharded=shards is not None,
        autocast=contextlib.nullcontext,
    )  # fmt: skip
    return SimpleNamespace(
        config=config, strategy=strategy, needs=strategy.needs | Needs(teacher_logprob=True, student_entropy=True),
        pair=pair, module=module, wrapped=wrapped, optimizer=optimizer, parameters=parameters, accelerator=accelerator,
        display=Display(active=False), watch=Watch(folder, 0, 1, timeout=60.0, advice=""), frozen_models=contextlib.nullcontext,
        completed=0, skipped=0, skipped_in_a_row=0, micro_batch_tokens=0,
    )  # fmt: skip


def two_updates_per_rollout(t: Any, token_budget: int) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """(metrics of every update, trained weights)."""
    rank, count = t.accelerator.process_index, t.accelerator.num_processes
    metrics = []
    for number, lengths in enumerate(LENGTHS):
        t.micro_batch_tokens = token_budget
        rollout = share(random_rollout(lengths, prefix=2, seed=number), rank, count)
        scored, first = train.score_and_update(t, rollout, 0, 1.0)
        metrics += [first, train.update(t, scored)]
    return metrics, {name: whole(p).detach().clone() for name, p in t.module.named_parameters() if p.requires_grad}


def short_of_memory() -> list[int]:
    """From here on memory runs out at 64 tokens while scoring, at 32 in the last forward pass, and in a later update at 16.

    Returns the budgets that were tried.
    """
    score, score_batch, forward, tried = train.score, train.score_batch, train.forward, [0]

    def noting(t: Any, rollout: Rollout, token_budget: int) -> Any:
        tried.append(token_budget)
        return score(t, rollout, token_budget)

    def scoring(*arguments: Any) -> Any:
        if tried[-1] == 64:
            raise MemoryError
        return score_batch(*arguments)

    def passing(t: Any, scored: Any, number: int, request: Any) -> Any:
        is_last, is_later = number == len(scored.batches) - 1, scored.first is not None
        if is_last and (tried[-1] == 32 or (tried[-1] == 16 and is_later)):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(t, scored, number, request)

    train.score, train.score_batch, train.forward = noting, scoring, passing
    return tried


def updates(folder: Path, split: str) -> None:
    """Every strategy of a split; the first process writes what came out."""
    _, token_budget, names = SPLITS[split]
    tried = short_of_memory() if split == "short" and os.environ["RANK"] == "1" else None
    results = {
        (name, lora): two_updates_per_rollout(training(name, lora=lora, folder=folder), token_budget)
        for name in names
        for lora in (False, True)
    }
    assert tried is None or set(tried) == {0, 64, 32, 16, 13, 8}, tried
    if accelerate.PartialState().is_main_process:
        torch.save(results, folder / f"{split}.pt")


def stopped_at(step: int, *arguments: str) -> Any:
    """The command line, getting SIGTERM when it has completed `step` updates."""
    finish = train.finish_step

    def finish_and_signal(t: Any, metrics: dict[str, Any]) -> None:
        finish(t, metrics)
        if t.completed == step:
            os.kill(os.getpid(), signal.SIGTERM)

    def run() -> int | None:
        train.finish_step = finish_and_signal
        return tropd(*arguments)()

    return run


def out_of_memory_in(name: str, *arguments: str) -> Any:
    """The command line, whose second process runs out of memory in a function of the loop in which the first one waits."""

    def run() -> int | None:
        if os.environ["RANK"] == "1":

            def failing(*_: Any) -> None:
                time.sleep(0.2)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

            setattr(train, name, failing)
        return tropd(*arguments)()

    return run


def inspecting(folder: Path, name: str) -> Any:
    """`inspect-regions` with strategies of both scopes, on more texts and prompts than one process takes."""
    problems = [row["prompt"] for row in demo_problems("heldout", 7, seed=0)]
    rows = [
        {"prompt": text} | ({"response": " 3 + 4 = 7\n"} if place > 4 else {}) for place, text in enumerate(problems)
    ]
    data = folder / "inspected.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pair = ["--student", "demo:student", "--teacher", "demo:teacher", "--data", str(data), "--max-prompt-length", "64"]
    asked = ["--strategy", "trust-region", "--strategy", "entropy", "--samples", "2", "--max-response-length", "16"]
    return tropd("inspect-regions", *pair, *asked, "-o", str(folder / f"{name}.jsonl"))


def evaluating(folder: Path, name: str) -> Any:
    """`eval` of the demo's two models, several batches each."""
    small = ["--limit", "5", "--samples", "2", "--max-response-length", "16", "--set", "rollout_batch_tokens=200"]
    return tropd("eval", *small, "--output", str(folder / name))


def sharded(folder: Path) -> None:
    from .sharded_update import compare

    compare(folder)


def main(folder: Path, arguments: list[str]) -> None:
    """Jobs one after another; one that ends otherwise than it should ends the script."""

    def distill(name: str) -> list[str]:
        return ["distill", *arguments, "--output", str(folder / name)]

    jobs: list[tuple[str, int, Any, int]] = [
        (split, count, functools.partial(updates, folder, split), 0) for split, (count, _, _) in SPLITS.items()
    ]
    jobs += [
        ("sharded", 2, functools.partial(sharded, folder), 0),
        ("run-1", 1, tropd(*distill("run-1")), 0),
        ("run-2", 2, tropd(*distill("run-2")), 0),
        ("run-12", 1, stopped_at(4, *distill("run-12")), 130),
        ("run-12", 2, tropd("distill", "--resume", str(folder / "run-12")), 0),
        ("run-21", 2, stopped_at(4, *distill("run-21")), 130),
        ("exchange", 2, out_of_memory_in("sum_gradients", *distill("exchange")), 1),
        ("short-sharded", 2, out_of_memory_in("forward", *distill("short-sharded"), "--shard", "full"), 1),
        ("run-21", 1, tropd("distill", "--resume", str(folder / "run-21")), 0),
        ("sharded-12", 1, stopped_at(4, *distill("sharded-12")), 130),
        ("sharded-12", 2, tropd("distill", "--resume", str(folder / "sharded-12"), "--shard", "full"), 0),
        ("sharded-21", 2, stopped_at(4, *distill("sharded-21"), "--shard", "grad_op"), 130),
        ("sharded-21", 1, tropd("distill", "--resume", str(folder / "sharded-21"), "--shard", "none"), 0),
        *((f"inspect-{count}", count, inspecting(folder, f"inspect-{count}"), 0) for count in (1, 2)),
        *((f"eval-{count}", count, evaluating(folder, f"eval-{count}"), 0) for count in (1, 2)),
    ]
    for name, count, function, wanted in jobs:
        started, log = time.monotonic(), folder / f"{name}.log"
        codes = start(count, function, log).wait(400)
        # One that still waits when another has failed is told to end, as a launcher would.
        told = {wanted, -signal.SIGTERM} if wanted == 1 else {wanted}
        if wanted not in codes or not set(codes) <= told:
            sys.exit(f"{name} ended with {codes}:\n{log.read_text()}")
        print(f"{name} on {count}: {time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # collecting again and again what the imports left would take the forked processes most of their time
    main(Path(sys.argv[1]), sys.argv[2:])
