"""`tropd eval`: its options, and which of its forms they ask for. Imports nothing heavy until a model is needed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import UserError

WHAT, HOW, WHERE = "What", "Sampling", "Output"

EXAMPLES = (
    "Examples:  tropd eval   ·   tropd eval runs/a --before   ·   tropd eval --model M --benchmark gsm8k,math500 --samples 4   ·   "
    "tropd eval --model M --data problems.jsonl --verifier math --json   ·   "
    "tropd eval --completions out.jsonl --verifier number   ·   tropd eval a.json b.json --table markdown"
)


@dataclass
class EvalRequest:
    """`tropd eval` as typed. None or empty: not given."""

    targets: list[str]
    before: bool
    model: str | None
    teacher: str | None
    benchmark: str | None
    data: str | None
    verifier: str | None
    completions: str | None
    metrics: str | None
    samples: int | None
    temperature: float | None
    top_p: float | None
    max_response_length: int | None
    limit: int | None
    seed: int | None
    chat: bool | None
    allow_code_execution: bool
    output: str | None
    overwrite: bool
    table: str | None
    as_json: bool
    num_processes: int | None
    device: str | None
    assignments: list[str]

    def given(self) -> list[str]:
        """The options that were given, as field names."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return [name for name, value in values.items() if value not in (None, False, [])]

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling flags that were given."""
        names = ("samples", "temperature", "top_p", "max_response_length")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def evaluate(
    targets: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN | RESULTS...]", help="A run directory, or result files to set side by side."),
    ] = None,
    before: Annotated[
        bool, typer.Option("--before", help="The run's student before training.", rich_help_panel=WHAT)
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Hub name or folder, also of a LoRA adapter.", rich_help_panel=WHAT)
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Model to measure divergences from.", rich_help_panel=WHAT)
    ] = None,
    benchmark: Annotated[
        str | None, typer.Option(help="NAME, NAME=rows.jsonl or own.yaml; several with commas.", rich_help_panel=WHAT)
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Prompts: a JSONL file, -, or a hub data set.", rich_help_panel=WHAT)
    ] = None,
    completions: Annotated[
        str | None, typer.Option(help="Grade text made elsewhere: a JSONL file or -.", rich_help_panel=WHAT)
    ] = None,
    verifier: Annotated[
        str | None, typer.Option(help="math, number, choice, exact, code, ifbench, ...", rich_help_panel=WHAT)
    ] = None,
    metrics: Annotated[
        str | None, typer.Option(help="accuracy, divergence, or both with a comma.", rich_help_panel=WHAT)
    ] = None,
    allow_code_execution: Annotated[
        bool,
        typer.Option("--allow-code-execution", help="Run the code in completions, in a sandbox.", rich_help_panel=WHAT),
    ] = False,
    samples: Annotated[int | None, typer.Option(help="Per problem.", rich_help_panel=HOW)] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", rich_help_panel=HOW)] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus.", rich_help_panel=HOW)] = None,
    max_response_length: Annotated[int | None, typer.Option(help="Tokens.", rich_help_panel=HOW)] = None,
    limit: Annotated[int | None, typer.Option(help="First so many problems.", rich_help_panel=HOW)] = None,
    seed: Annotated[int | None, typer.Option(help="Of the samples.", rich_help_panel=HOW)] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Prompts as a user's message (benchmarks: if there is a template).",
            rich_help_panel=HOW,
        ),
    ] = None,
    num_processes: Annotated[int | None, typer.Option(help="Workers to start.", rich_help_panel=HOW)] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda ...", rich_help_panel=HOW)] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any option of tropd distill.", rich_help_panel=HOW),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(help="Folder, or one .jsonl, for graded samples. Continued if it exists.", rich_help_panel=WHERE),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace samples.", rich_help_panel=WHERE)] = False,
    table: Annotated[str | None, typer.Option(help="markdown or plain.", rich_help_panel=WHERE)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Results as JSON Lines.", rich_help_panel=WHERE)] = False,
) -> None:
    """Accuracy with an interval, and divergences from a teacher, of a model, a run, or text made elsewhere."""
    options = dict(locals())
    options |= {"targets": targets or [], "assignments": options.pop("set_") or []}
    dispatch(EvalRequest(**options))


# ── forms ───────────────────────────────────────────────────────────────────────────────────────────────────────────

ALWAYS = {"as_json", "table"}
#: What each form reads beside ALWAYS; anything else given with it is an error.
COMPLETIONS = {"completions", "verifier", "benchmark", "model", "limit", "allow_code_execution", "output", "overwrite"}
RESULTS = {"targets"}
FLAG_OF = {"as_json": "--json", "assignments": "--set", "targets": "a run or result file"}


def dispatch(request: EvalRequest) -> None:
    """Chooses the form and refuses what it would not read. Raises UserError."""
    check_values(request)
    if request.completions is not None:
        refuse_others(request, COMPLETIONS, "--completions")
        from .evaluation.forms import grade_completions

        grade_completions(request)
        return
    folders = [target for target in request.targets if Path(target).is_dir()]
    if request.targets and not folders:
        refuse_others(request, RESULTS, "result files")
        from .evaluation.forms import show_results

        show_results(request)
        return
    if len(request.targets) > 1:
        raise UserError(
            f"one run at a time: {' '.join(request.targets)}. Save results with --json and compare the files"
        )
    if request.targets and request.model is not None:
        raise UserError(f"'{request.targets[0]}' and --model '{request.model}': give a run or a model, not both")
    if request.before and not request.targets:
        raise UserError("--before needs a run directory: tropd eval RUN --before")
    from .evaluation.session import evaluate_models

    evaluate_models(request)


def check_values(request: EvalRequest) -> None:
    """Raises UserError naming the first number or word that is out of range."""
    for name in ("samples", "max_response_length", "limit", "num_processes"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: it must be 1 or more")
    if request.temperature is not None and not request.temperature >= 0.0:
        raise UserError(f"--temperature {request.temperature}: it must be 0 (greedy) or more")
    if request.top_p is not None and not 0.0 < request.top_p <= 1.0:
        raise UserError(f"--top-p {request.top_p}: it must be above 0 and at most 1")
    if request.table is not None and request.table not in ("markdown", "plain"):
        raise UserError(f"--table '{request.table}' is none of: markdown, plain")


def refuse_others(request: EvalRequest, read: set[str], form: str) -> None:
    """Raises UserError naming the first option that this form does not read."""
    for name in request.given():
        if name not in read | ALWAYS:
            flag = FLAG_OF.get(name, "--" + name.replace("_", "-"))
            raise UserError(f"{flag} means nothing with {form}. See: tropd eval --help")
