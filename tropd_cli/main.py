"""The command line: options, the one error boundary, and nothing heavy until a command runs."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from . import __version__, evaluate, inspect_regions
from .errors import UserError
from .processes import reader_gone

# Threads that wait by spinning make small models on busy CPUs dozens of times slower. Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

F = TypeVar("F", bound=Callable[..., Any])

app = typer.Typer(
    name="tropd",
    help="Distil a language model into a smaller one on the student's own text, by Trust Region On-Policy Distillation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def error_boundary(command: F) -> F:
    """Exit 1 with one message for a UserError, 130 for an interruption; a traceback only with TROPD_DEBUG=1."""

    @functools.wraps(command)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # The reader of our pipe has gone, as `| head` does: not an error.
            reader_gone()
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except UserError as error:
            if os.environ.get("TROPD_DEBUG") == "1":
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None

    return bounded  # type: ignore[return-value]


def version_callback(value: bool) -> None:
    if value:
        typer.echo(f"tropd {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=version_callback, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Distil a language model into a smaller one on the student's own text."""


# ── distill ─────────────────────────────────────────────────────────────────────────────────────────────────────────

MODELS, TRAINING, RUN, CONFIG = "Models and data", "Training", "Run", "Configuration"


@app.command(
    epilog="Examples:  tropd distill   ·   tropd distill --student S --teacher T --data prompts.jsonl --lora-rank 32   ·   "
    "tropd distill --config run.yaml --set optimizer.eps=1e-6   ·   tropd distill --resume runs/a"
)
@error_boundary
def distill(
    student: Annotated[
        str | None, typer.Option(help="Hub name or folder of the student.", rich_help_panel=MODELS)
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Hub name or folder of the teacher.", rich_help_panel=MODELS)
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Reference model of strategies that read one (default: the student).", rich_help_panel=MODELS
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Prompts: a JSONL file, - for standard input, or a hub data set.", rich_help_panel=MODELS),
    ] = None,
    eval_data: Annotated[
        str | None, typer.Option(help="Held-out prompts, measured before and after.", rich_help_panel=MODELS)
    ] = None,
    teacher_chat_template: Annotated[
        str | None,
        typer.Option(help="`own`, or a template file, when the teacher needs another one.", rich_help_panel=MODELS),
    ] = None,
    skip_bad_rows: Annotated[
        bool | None, typer.Option("--skip-bad-rows", help="Count bad rows instead of stopping.", rich_help_panel=MODELS)
    ] = None,
    lora_rank: Annotated[
        int | None, typer.Option(help="Train a LoRA adapter of this rank (0: all weights).", rich_help_panel=MODELS)
    ] = None,
    merge: Annotated[
        bool | None,
        typer.Option("--merge", help="Save the merged model beside the LoRA adapter.", rich_help_panel=MODELS),
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help="Credit-assignment strategy. See: tropd strategies", rich_help_panel=TRAINING)
    ] = None,
    outlier: Annotated[
        str | None, typer.Option(help="Outlier estimator of trust-region.", rich_help_panel=TRAINING)
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="A row of the paper's tables. See: tropd strategies --presets", rich_help_panel=TRAINING),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer updates.", rich_help_panel=TRAINING)] = None,
    prompts_per_step: Annotated[
        int | None, typer.Option(help="Prompts of one update.", rich_help_panel=TRAINING)
    ] = None,
    rollouts_per_prompt: Annotated[
        int | None, typer.Option(help="Responses per prompt.", rich_help_panel=TRAINING)
    ] = None,
    max_prompt_length: Annotated[int | None, typer.Option(help="Tokens.", rich_help_panel=TRAINING)] = None,
    max_response_length: Annotated[
        int | None, typer.Option(help="Tokens, teacher prefix included.", rich_help_panel=TRAINING)
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="AdamW's.", rich_help_panel=TRAINING)] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Tempers student and teacher everywhere.", rich_help_panel=TRAINING)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything random.", rich_help_panel=TRAINING)] = None,
    output: Annotated[
        str | None, typer.Option(help="Run directory (default: runs/STRATEGY-UTCTIME).", rich_help_panel=RUN)
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="RUN", help="Continue a run directory.", rich_help_panel=RUN)
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing run directory.", rich_help_panel=RUN)
    ] = False,
    num_processes: Annotated[
        int | None, typer.Option(help="Workers to start on this machine.", rich_help_panel=RUN)
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            help="Cut weights, gradients and optimizer over the processes: none, full (ZeRO-3), grad_op (ZeRO-2).",
            rich_help_panel=RUN,
        ),
    ] = None,
    hang_timeout: Annotated[
        float | None,
        typer.Option(help="Seconds without a sign of life after which a worker counts as hung.", rich_help_panel=RUN),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda ...", rich_help_panel=RUN)] = None,
    teacher_device: Annotated[
        str | None, typer.Option(help="Of teacher and reference, which then stay whole there.", rich_help_panel=RUN)
    ] = None,
    log_with: Annotated[
        list[str] | None,
        typer.Option(help="Tracker of Accelerate: tensorboard, wandb. May be repeated.", rich_help_panel=RUN),
    ] = None,
    stop_when_unhealthy: Annotated[
        bool | None,
        typer.Option("--stop-when-unhealthy", help="Stop at the first health warning.", rich_help_panel=RUN),
    ] = None,
    plugin: Annotated[
        list[str] | None,
        typer.Option(help="Python file that registers strategies. May be repeated.", rich_help_panel=RUN),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="YAML of options; flags win over it.", rich_help_panel=CONFIG)
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any option by its YAML path.", rich_help_panel=CONFIG),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved YAML and stop.", rich_help_panel=CONFIG)
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check everything, show the first prompt, train nothing.", rich_help_panel=CONFIG
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the last metrics as JSON on stdout.", rich_help_panel=CONFIG)
    ] = False,
) -> None:
    """Train a student on its own text, every token scored by the teacher. Prints the run directory."""
    given = dict(locals())
    flags = {k: v for k, v in given.items() if v is not None and k not in NO_OPTIONS}
    if outlier is not None:
        flags["strategy"] = {**({"name": strategy} if strategy else {}), "outlier": {"name": outlier}}
    from . import commands

    commands.distill(
        commands.DistillRequest(
            flags=flags,
            config=config,
            assignments=set_ or [],
            preset=preset,
            resume=resume,
            overwrite=overwrite,
            print_config=print_config,
            dry_run=dry_run,
            as_json=as_json,
        )
    )


#: Parameters of `distill` that are no options of a run.
NO_OPTIONS = frozenset("config set_ print_config dry_run as_json overwrite resume preset outlier".split())


# ── eval ────────────────────────────────────────────────────────────────────────────────────────────────────────────

app.command("eval", epilog=evaluate.EXAMPLES)(error_boundary(evaluate.evaluate))


# ── inspect-regions ─────────────────────────────────────────────────────────────────────────────────────────────────

app.command("inspect-regions", epilog=inspect_regions.EXAMPLES)(error_boundary(inspect_regions.inspect_regions))


# ── strategies ──────────────────────────────────────────────────────────────────────────────────────────────────────


@app.command(
    name="strategies",
    epilog="Examples:  tropd strategies   ·   tropd strategies trust-region   ·   tropd strategies --presets   ·   "
    "tropd strategies --json | jq -r '.[] | select(.memory == \"O(n)\") | .name'",
)
@error_boundary
def strategies_(
    name: Annotated[str | None, typer.Argument(help="Show this one: docstring, options, file and line.")] = None,
    presets: Annotated[
        bool, typer.Option("--presets", help="Rows of the paper's tables with the numbers printed there.")
    ] = False,
    plugin: Annotated[
        list[str] | None, typer.Option(help="Python file that registers strategies. May be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List strategies, outlier estimators and presets, or show one of them."""
    from .strategies_command import strategies

    strategies(name, presets=presets, as_json=as_json, plugin=plugin or [])


def emit(text: str) -> None:
    """Data, on stdout."""
    typer.echo(text)


def emit_json(value: Any) -> None:
    """One JSON object on stdout."""
    typer.echo(json.dumps(value))


def run() -> None:
    """Entry point of the `tropd` script."""
    if Path.cwd().joinpath("strategies").is_dir() and "" in sys.path:
        sys.path.remove("")  # a folder of that name here must not shadow the package
    app()


if __name__ == "__main__":
    run()
