"""What the commands do, apart from their options: resolve, refuse, run, print."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .config import Config, build_config, build_strategy, merge, parse_set, read_yaml, to_yaml
from .display import Display
from .errors import UserError
from .presets import get_preset
from .processes import is_first, is_worker, one_voice
from .run_directory import RunDirectory, default_output

if TYPE_CHECKING:
    from .session import Training

#: The demo's own small setting; the paper's is for real models.
DEMO_PRESET: dict[str, Any] = {
    "student": "demo:student",
    "teacher": "demo:teacher",
    "data": "demo:train",
    "eval_data": "demo:heldout",
    "steps": 50,
    "prompts_per_step": 24,
    "rollouts_per_prompt": 4,
    "max_prompt_length": 64,
    "max_response_length": 64,
    "learning_rate": 5e-4,
    "checkpoint_every": 25,
}


@dataclass
class DistillRequest:
    """`tropd distill` as typed."""

    flags: dict[str, Any] = field(default_factory=dict)
    config: str | None = None
    assignments: list[str] = field(default_factory=list)
    preset: str | None = None
    resume: str | None = None
    overwrite: bool = False
    print_config: bool = False
    dry_run: bool = False
    as_json: bool = False


def resolve(request: DistillRequest) -> tuple[Config, bool]:
    """(configuration, whether it is the built-in demo). Raises UserError."""
    typed: dict[str, Any] = {}
    if request.config:
        typed = merge(typed, read_yaml(request.config))
    typed = merge(typed, request.flags)
    for assignment in request.assignments:
        typed = merge(typed, parse_set(assignment))
    missing = [key for key in ("student", "teacher", "data") if typed.get(key) is None]
    layers = [get_preset(request.preset).config] if request.preset else []
    if len(missing) == 3:
        layers.insert(0, DEMO_PRESET)
    elif missing:
        flags = " and ".join(f"--{key}" for key in missing)
        raise UserError(
            f"{flags} missing. Give --student, --teacher and --data, or none of the three for the built-in demo"
        )
    layers.append(typed)
    config = build_config(*layers)
    return config, len(missing) == 3


def distill(request: DistillRequest) -> None:
    """`tropd distill`. Prints the run directory, or the last metrics with --json."""
    with one_voice():
        _distill(request)


def _distill(request: DistillRequest) -> None:
    if request.resume:
        unused = [f"--{n}" for n in ("config", "preset", "overwrite") if getattr(request, n)]
        if unused:
            raise UserError(
                f"{unused[0]} does not go with --resume, which takes a run's own options. Leave it out, or start a new run"
            )
        run = RunDirectory(Path(request.resume))
        changes = request.flags
        for assignment in request.assignments:
            changes = merge(changes, parse_set(assignment))
        config, is_demo = run.resumed_config(changes), False
    else:
        config, is_demo = resolve(request)
    strategy = build_strategy(config)
    config = canonical(config, strategy)
    if request.print_config:
        typer.echo(to_yaml(pinned(config)), nl=False)
        return
    if not request.resume:
        config = config.model_copy(update={"output": config.output or default_output(config.strategy["name"])})
        run = RunDirectory(Path(str(config.output)))
        if is_first():
            run.refuse_existing(overwrite=request.overwrite)
    if not request.dry_run:
        from .launch import start_workers

        named = request.resume or "output" in request.flags
        more = [] if named else ["--output", str(config.output)]
        start_workers(config, reads_input=config.data == "-", run=run.path, more=more)
    train(config, run, request, is_demo=is_demo)


def train(config: Config, run: RunDirectory, request: DistillRequest, *, is_demo: bool) -> None:
    """Runs the training in this process, and prints what it gave."""
    quiet_libraries()
    display = Display(active=is_first())
    if is_demo:
        display.note(
            "No student, teacher or data given: running the built-in demo (arithmetic chains, two tiny models)."
        )
    if request.dry_run:
        from .dry_run import dry_run

        if is_first():
            estimate = dry_run(config, display)
            if request.as_json:
                typer.echo(json.dumps(estimate))
        return
    if config.student == config.teacher:
        display.warn(f"student and teacher are both '{config.student}': there will be no signal")
    training = prepared(config, run, request, display)
    metrics, first = run_to_the_end(training, resume=bool(request.resume))
    if not training.accelerator.is_main_process:
        return
    if first:
        display.comparison("Held-out", first, metrics)
    display.note(f"student: {training.run.student}")
    typer.echo(json.dumps({"run": str(training.run.path), **metrics}) if request.as_json else str(training.run.path))


def prepared(config: Config, run: RunDirectory, request: DistillRequest, display: Display) -> Training:
    """Everything loaded and checked, and only then the run directory written. Raises UserError."""
    import torch
    from accelerate.utils import gather_object

    from .launch import make_accelerator
    from .session import Training
    from .sharding import with_launcher_options

    config = with_launcher_options(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    accelerator = make_accelerator(config, str(run.path))
    if config.shard != "none" and accelerator.num_processes == 1:
        display.note(f"shard: {config.shard} with one process: there is nothing to share, so it holds all weights")
    missing = set(config.log_with) - {str(getattr(kind, "value", kind)) for kind in accelerator.log_with}
    if missing:
        raise UserError(f"log_with '{min(missing)}' is not installed. Install it: pip install 'tropd[log]'")
    # A default name holds the time, which every process read on its own.
    run = RunDirectory(Path(gather_object([str(run.path)])[0]))
    config = config.model_copy(update={"output": str(run.path)})
    training = Training(config, run, display, accelerator)
    if accelerator.is_main_process:
        if request.resume:
            run.write_config(config)
        else:
            run.create(pinned(config), overwrite=request.overwrite, prompts=training.standard_input)
    accelerator.wait_for_everyone()
    if config.log_with:
        plain = {k: v for k, v in config.model_dump().items() if isinstance(v, (int, float, str))}
        accelerator.init_trackers("tropd", plain)
    return training


def run_to_the_end(training: Training, *, resume: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """`train.distill`, with its ends told to the user. Raises UserError, or Exit(130) after an interruption."""
    from .memory import is_out_of_memory, out_of_memory
    from .train import Interrupted, distill

    display = training.display
    try:
        return distill(training, resume=resume)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise UserError(out_of_memory(error)) from error
        raise
    except Interrupted:
        if is_worker():  # one that ends first makes the launcher end the others: let them finish what is left
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
        state = "everything is saved" if training.saved == training.completed else f"saved is step {training.saved}"
        display.note(f"interrupted; {state}. Continue with: tropd distill --resume {training.run.path}")
        raise typer.Exit(130) from None
    finally:
        display.stop()
        training.accelerator.end_training()


def canonical(config: Config, strategy: Any) -> Config:
    """The configuration with every option of the strategy written out."""
    from strategies import STRATEGIES

    return config.model_copy(update={"strategy": STRATEGIES.describe(strategy, config.strategy["name"])})


def pinned(config: Config) -> Config:
    """The configuration with hub names pinned to commits."""
    from .pair import commit_of

    pins = {}
    for role in ("student", "teacher", "reference"):
        name = getattr(config, role)
        if name is not None:
            pins[f"{role}_revision"] = commit_of(name, getattr(config, f"{role}_revision"))
    return config.model_copy(update=pins)


def quiet_libraries() -> None:
    """Progress bars and advice of the libraries stay out of ours."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
