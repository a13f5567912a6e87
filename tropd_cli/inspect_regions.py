"""`tropd inspect-regions`: where the teacher can be trusted, token by token. A recording needs no model and no torch."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import UserError
from .processes import is_first, one_voice
from .report.inspection import Inspection, Rule
from .report.output import output_format, tell, write_report, write_rows
from .report.rows import TokenRow
from .report.source import config_facts, read_config, read_rows, read_run

EXAMPLES = (
    "Examples:  tropd inspect-regions runs/a --step 50   ·   tropd inspect-regions runs/a --strategy trust-region "
    "--strategy reopold -o compare.html   ·   head -20 prompts.jsonl | tropd inspect-regions --student S --teacher T "
    "--data - --format jsonl | jq -c 'select(.region==\"outlier\")'"
)
#: Formats that are written row by row.
STREAMED = ("jsonl", "csv")

MODELS, STRATEGY, OUTPUT = "Models and data", "Strategy", "Output"


def inspect_regions(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="Run directory, or a file of rows (- for standard input).")
    ] = None,
    step: Annotated[int | None, typer.Option(help="Recorded step of the run (default: the last).")] = None,
    student: Annotated[str | None, typer.Option(help="Hub name or folder.", rich_help_panel=MODELS)] = None,
    teacher: Annotated[str | None, typer.Option(help="Hub name or folder.", rich_help_panel=MODELS)] = None,
    reference: Annotated[
        str | None, typer.Option(help="Of strategies that read one (default: the student).", rich_help_panel=MODELS)
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Prompts: a JSONL file, - or a hub data set. Rows with `response` are scored as they are.",
            rich_help_panel=MODELS,
        ),
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many rows.", rich_help_panel=MODELS)
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Responses per prompt (default: 1).", rich_help_panel=MODELS)
    ] = None,
    max_prompt_length: Annotated[int | None, typer.Option(help="Tokens.", rich_help_panel=MODELS)] = None,
    max_response_length: Annotated[
        int | None, typer.Option(help="Tokens of a sampled response (default: 512).", rich_help_panel=MODELS)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Teacher tokens listed per position (default: 5).", rich_help_panel=MODELS)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of samples and regions.", rich_help_panel=MODELS)] = None,
    skip_bad_rows: Annotated[
        bool | None, typer.Option("--skip-bad-rows", help="Count bad rows instead of stopping.", rich_help_panel=MODELS)
    ] = None,
    num_processes: Annotated[
        int | None, typer.Option(help="Workers to start, which share the prompts.", rich_help_panel=MODELS)
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda ...", rich_help_panel=MODELS)] = None,
    config: Annotated[
        str | None, typer.Option(help="YAML of options, a run's config.yaml too; flags win.", rich_help_panel=MODELS)
    ] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(help="Name, or {name: ..., option: value}. May be repeated.", rich_help_panel=STRATEGY),
    ] = None,
    outlier: Annotated[str | None, typer.Option(help="Outlier estimator.", rich_help_panel=STRATEGY)] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any option by its YAML path.", rich_help_panel=STRATEGY),
    ] = None,
    plugin: Annotated[
        list[str] | None, typer.Option(help="Python file that registers strategies.", rich_help_panel=STRATEGY)
    ] = None,
    format_: Annotated[
        str | None,
        typer.Option("--format", help="terminal, jsonl, csv, html or png.", rich_help_panel=OUTPUT),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="File; its ending implies the format.", rich_help_panel=OUTPUT)
    ] = None,
    summary: Annotated[
        bool, typer.Option("--summary", help="Print only the summary, as JSON.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Show token by token where the teacher can be trusted: of a run's recording, or of two models on any text."""
    given = dict(locals())
    flags = {name: given[name] for name in CONFIG_FLAGS if given[name] is not None}
    if samples is not None:
        flags["rollouts_per_prompt"] = samples
    if top_k is not None:
        flags["record"] = {"top_k": top_k}
    inspect(
        InspectRequest(
            run=run,
            step=step,
            flags=flags,
            config=config,
            assignments=set_ or [],
            strategies=strategy or [],
            outlier=outlier,
            plugins=plugin or [],
            prompts=prompts,
            format=format_,
            output=output,
            summary=summary,
        )
    )


CONFIG_FLAGS = (
    "student teacher reference data max_prompt_length max_response_length seed skip_bad_rows num_processes device"
).split()  # fmt: skip


#: Options whose flag is called otherwise.
FLAG_OF = {"rollouts_per_prompt": "--samples", "record": "--top-k"}


@dataclass
class InspectRequest:
    """`tropd inspect-regions` as typed. flags: options of `Config` that name models, data and sampling."""

    run: str | None = None
    step: int | None = None
    flags: dict[str, Any] = field(default_factory=dict)
    config: str | None = None
    assignments: list[str] = field(default_factory=list)
    strategies: list[str] = field(default_factory=list)
    outlier: str | None = None
    plugins: list[str] = field(default_factory=list)
    prompts: int | None = None
    format: str | None = None
    output: str | None = None
    summary: bool = False

    @property
    def recredits(self) -> bool:
        """Whether a recording is asked under other strategies or options than its own."""
        return bool(self.strategies or self.outlier or self.assignments)


@dataclass
class Found:
    """What there is to show; rows may be made while they are read. The other fields are as in `Inspection`."""

    rows: Iterable[TokenRow]
    facts: dict[str, str]
    rule: Rule
    metrics: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def inspection(self) -> Inspection:
        return Inspection(list(self.rows), self.facts, self.metrics, self.notes, self.rule)


def inspect(request: InspectRequest) -> None:
    """Finds the rows and writes them in the asked format, on the first process where there are several.

    Raises:
        UserError: options that exclude each other, nothing recorded, models or data that do not fit.
    """
    form = output_format(request.format, request.output, summary=request.summary)
    if request.run is not None:
        if is_first():  # reading a recording leaves nothing to share
            write(recorded(request), form, request.output)
        return
    from .inspection_session import modelled

    with one_voice(), modelled(request, form) as found:
        if is_first():
            write(found, form, request.output)
        for _ in found.rows:  # the others make their share
            pass


def write(found: Found, form: str, output: str | None) -> None:
    """Everything found, in a format of `report`."""
    if form in STREAMED:
        for note in found.notes:
            tell(f"note: {note}")
        write_rows(found.rows, form, output)
        return
    write_report(found.inspection(), form, output)


# ── where rows come from ────────────────────────────────────────────────────────────────────────────────────────────


def recorded(request: InspectRequest) -> Found:
    """Rows of a run directory, or of a file that --format jsonl wrote; under other strategies where asked for."""
    assert request.run is not None
    path = Path(request.run)
    excluded = [FLAG_OF.get(name, f"--{name.replace('_', '-')}") for name in request.flags]
    excluded += ["--config"] if request.config else []
    if excluded:
        student = path / "student"
        raise UserError(
            f"'{path}' is shown as recorded, so {excluded[0]} does not apply. Leave it out, or ask its student anew: "
            f"tropd inspect-regions --student {student} --teacher T --data D"
        )
    from_run = path.is_dir() or (not path.is_file() and str(path) != "-")
    if from_run:
        inspection = read_run(path, request.step)
        config, step = read_config(path), int(inspection.facts["step"])
    else:
        if request.step is not None:
            raise UserError(f"--step chooses among the recordings of a run directory; '{path}' is a file of rows")
        inspection, config, step = read_file(path), {}, None
    found = Found(inspection.rows, inspection.facts, inspection.rule, inspection.metrics, inspection.notes)
    return recredited(found, request, config, step) if request.recredits else found


def read_file(path: Path) -> Inspection:
    """Token rows from a file, or from standard input for `-`."""
    notes: list[str] = []
    if str(path) == "-":
        return Inspection(
            list(read_rows(sys.stdin, "standard input", notes)), facts={"rows": "standard input"}, notes=notes
        )
    with path.open(encoding="utf-8", errors="replace") as lines:
        rows = list(read_rows(lines, str(path), notes))
    if not rows:
        raise UserError(f"'{path}' has no token rows. It takes a run directory, or what --format jsonl wrote")
    return Inspection(rows, facts={"rows": path.name}, notes=notes)


def recredited(found: Found, request: InspectRequest, config: dict[str, Any], step: int | None) -> Found:
    """The recorded tokens under the asked strategies."""
    from .inspected_strategies import asked_strategies
    from .recredit import recredit

    rows = list(found.rows)
    names = {row.strategy for row in rows}
    if len(names) > 1:
        raise UserError("the rows hold several strategies already. Record one, or leave --strategy out to see them")
    asked = asked_strategies(
        config.get("strategy"),
        request.strategies,
        outlier=request.outlier,
        assignments=request.assignments,
        plugins=request.plugins,
    )
    made, notes = recredit(rows, asked, config=config, step=step)
    facts, rule = strategy_facts(found.facts, [one.options for one in asked])
    return Found(made, facts, rule, found.metrics, [*found.notes, *notes])


def strategy_facts(facts: dict[str, str], options: list[dict[str, Any]]) -> tuple[dict[str, str], Rule]:
    """The facts with the strategy spelled out when there is one; the rule where the page's slider starts."""
    told, rule = config_facts({"strategy": options[0]})
    others = {name: value for name, value in facts.items() if name != "strategy"}
    return (others | {"strategy": told["strategy"]} if len(options) == 1 else others), rule
