"""`tropd inspect-regions` with models: what the options mean, on one process or among many."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .commands import DEMO_PRESET, quiet_libraries
from .config import Config, build_config, merge, parse_set, read_yaml
from .display import Display
from .errors import UserError
from .inspect_regions import STREAMED, Found, InspectRequest, strategy_facts
from .inspected_models import ModelInspector
from .inspected_strategies import Asked, asked_strategies
from .launch import make_accelerator, start_workers
from .processes import is_first
from .progress import WorkProgress
from .recredit import batch_scope_note
from .report.output import tell
from .sharding import with_launcher_options

#: Where inspection differs from `distill`: one short response per prompt, unless something else was asked for.
DEFAULTS: dict[str, Any] = {"rollouts_per_prompt": 1, "max_response_length": 512}
DEMO_DATA, DEMO_PROMPTS = "demo:heldout", 4
#: What a run's configuration may ask for and nothing here needs.
TRAINING_ONLY: dict[str, Any] = {
    "lora_rank": 0, "gradient_checkpointing": False, "eval_data": None, "log_with": [], "shard": "none",
}  # fmt: skip


@contextmanager
def modelled(request: InspectRequest, form: str) -> Iterator[Found]:
    """Rows of two models on prompts or given texts, made while they are read. Where several processes are there, each
    has to read all rows. Raises Exit where workers do it instead."""
    if request.step is not None:
        raise UserError(
            "--step chooses among the recordings of a run directory. Give one: tropd inspect-regions runs/a --step 50"
        )
    config, is_demo = resolve(request)
    asked = asked_strategies(
        config.strategy,
        request.strategies,
        outlier=request.outlier,
        assignments=request.assignments,
        plugins=[*config.plugin, *request.plugins],
    )
    start_workers(config, reads_input=config.data == "-")
    most = request.prompts or (DEMO_PROMPTS if is_demo else None)
    streams_to_terminal = form in STREAMED and request.output is None and sys.stdout.isatty()
    with loaded_inspector(config, asked, most) as inspector:
        notes = [batch_scope_note(one.label, inspector.sequences) for one in asked if one.strategy.scope == "batch"]
        if inspector.given_texts:
            notes.append(
                "Given texts count as the student's own: acceptance and reverse KL are the student's only where it wrote them."
            )
        if is_demo:
            tell("No student, teacher or data given: showing the built-in demo's two models.")
        tell(f"{inspector.sequences} responses of {config.student}, scored by {config.teacher}")
        facts = {name: str(getattr(config, name)) for name in ("student", "teacher", "data")}
        facts, rule = strategy_facts(facts, [one.options for one in asked])
        display = Display(active=is_first() and not streams_to_terminal)
        with WorkProgress(display, "inspecting", 0, inspector.sequences, unit="responses") as progress:
            yield Found(inspector.rows(progress.update), facts, rule, notes=notes)


@contextmanager
def loaded_inspector(config: Config, asked: Sequence[Asked], most_prompts: int | None) -> Iterator[ModelInspector]:
    """The models on this process's device, among the other processes if there are any."""
    quiet_libraries()
    if config.threads:
        torch.set_num_threads(config.threads)
    accelerator = make_accelerator(with_launcher_options(config), ".")
    try:
        yield ModelInspector(
            config,
            asked,
            most_prompts=most_prompts,
            accelerator=accelerator,
            warn=lambda text: tell(f"warning: {text}"),
        )
    finally:
        accelerator.end_training()


def resolve(request: InspectRequest) -> tuple[Config, bool]:
    """(configuration, whether it is the built-in demo): defaults < YAML < flags < --set. Raises UserError.

    On how many processes a run was trained says nothing about how to look at it: only flag and --set count.
    """
    typed = read_yaml(request.config) if request.config else {}
    typed.pop("num_processes", None)
    for layer in (request.flags, *map(parse_set, request.assignments)):
        typed = merge(typed, layer)
    missing = [key for key in ("student", "teacher", "data") if typed.get(key) is None]
    if missing and len(missing) < 3:
        raise UserError(
            f"{' and '.join(f'--{key}' for key in missing)} missing. Give a run directory, or --student, --teacher and "
            "--data, or none of them for the built-in demo"
        )
    demo = {**DEMO_PRESET, "data": DEMO_DATA, "rollouts_per_prompt": 1} if missing else {}
    return build_config(DEFAULTS, demo, typed, TRAINING_ONLY), bool(demo)
