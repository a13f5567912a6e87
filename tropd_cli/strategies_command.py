"""`tropd strategies`: what there is to choose from. Tables in a terminal, one aligned line per row in a pipe, or JSON."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import typer
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .config import load_plugins
from .errors import UserError
from .presets import PRESETS, SETTINGS, Preset, get_preset

if TYPE_CHECKING:
    from strategies.catalog import Details, Option, Row

NOTHING = "–"
FACTS = ("needs", "memory", "scope", "paper")
TABLE_WIDTH = 110  #: narrower terminals get stacked lines
NAME_STYLE, QUIET_STYLE, WARNING_STYLE = "bold cyan", "dim", "bold red"


def strategies(name: str | None, *, presets: bool, as_json: bool, plugin: Sequence[str] = ()) -> None:
    """Prints every strategy and estimator, one of them, every preset, or one of those.

    Raises:
        UserError: unknown name, or a plug-in that clashes or does not load.
    """
    console = Console(highlight=False)
    if presets:
        chosen = [get_preset(name)] if name else list(PRESETS.values())
        if as_json:
            typer.echo(json.dumps([preset_json(p) for p in chosen][0 if name else slice(None)], indent=2))
        elif name:
            show_preset(console, chosen[0])
        else:
            list_presets(console)
        return
    load_plugins(list(plugin))
    if name:
        details = find(name)
        typer.echo(json.dumps(details_json(details), indent=2)) if as_json else show_details(console, details)
        return
    from strategies import catalog

    rows = catalog.describe_all()
    typer.echo(json.dumps([dataclasses.asdict(row) for row in rows], indent=2)) if as_json else list_rows(console, rows)


def find(name: str) -> Details:
    """The strategy or estimator of that name. Raises UserError."""
    from strategies import OUTLIERS, STRATEGIES, catalog
    from strategies.registry import RegistryError, suggest

    known = {*STRATEGIES.names(), *OUTLIERS.names()}
    if name not in known:
        if name in PRESETS:
            raise UserError(f"'{name}' is a preset, not a strategy. See: tropd strategies --presets {name}")
        raise UserError(
            f"unknown strategy or outlier estimator '{name}'.{suggest(name, sorted(known))} See: tropd strategies"
        )
    try:
        return catalog.describe(name)
    except RegistryError as error:
        raise UserError(str(error)) from error
    except Exception as error:  # a plug-in's own code: its class loads, an instance fails
        raise UserError(f"'{name}' cannot be shown: {type(error).__name__}: {error}") from error


# ── every strategy ──────────────────────────────────────────────────────────────────────────────────────────────────


def list_rows(console: Console, rows: list[Row]) -> None:
    """Strategies, then estimators."""
    for kind in dict.fromkeys(row.kind for row in rows):
        same = [row for row in rows if row.kind == kind]
        if not console.is_terminal:
            print_aligned((kind, *FACTS, "package", "summary"), ([*_facts(r), r.package, _summary(r)] for r in same))
            typer.echo()
        elif console.width >= TABLE_WIDTH:
            console.print(_overview(same, _plural(kind)))
        else:
            _print_stacked(console, same, _plural(kind))
    if console.is_terminal:
        console.print(Text("One with its options: tropd strategies NAME", style=QUIET_STYLE))
        console.print(Text("Rows of the paper's tables: tropd strategies --presets", style=QUIET_STYLE))


def _overview(rows: list[Row], title: str) -> Table:
    """Name and summary share a column, because the rest takes half of the width."""
    table = _table(title)
    table.add_column("name, and what it does", ratio=1)
    for heading in FACTS:
        table.add_column(heading, no_wrap=heading != "paper")
    for row in rows:
        name, needs, *facts = _facts(row)
        what = Text(name, style=NAME_STYLE) + Text("\n") + _summary_text(row)
        table.add_row(what, needs.replace(", ", "\n"), *facts)
    return table


def _print_stacked(console: Console, rows: list[Row], title: str) -> None:
    """For narrow terminals: what is short in columns, summary and needs on lines of their own below."""
    console.print(Text(title, style="bold"))
    console.print(Text(f"{'name':20}{'memory':14}{'scope':8}paper", style=QUIET_STYLE))
    for row in rows:
        name, needs, memory, scope, paper = _facts(row)
        console.print(Text(f"{name:20}", style=NAME_STYLE) + Text(f"{memory:14}{scope:8}{paper}"))
        console.print(Padding(_summary_text(row), (0, 0, 0, 2)))
        if row.needs:
            console.print(Padding(Text(f"needs {needs}", style=QUIET_STYLE), (0, 0, 0, 2)))
    console.print()


def _plural(kind: str) -> str:
    return f"{kind[:-1]}ies" if kind.endswith("y") else f"{kind}s"


def _summary_text(row: Row) -> Text:
    return Text(_summary(row), style=WARNING_STYLE if row.clash else "")


def _summary(row: Row) -> str:
    """The first line of its docstring; of a plug-in that was not imported, where it comes from."""
    if row.summary is not None:
        return row.summary
    origin = f"plug-in of package {row.package}, entry point {row.entry_point}"
    return f"{origin}; refused: the name is taken" if row.clash else origin


def _facts(row: Row) -> list[str]:
    """name, needs, memory, scope, paper."""
    facts = (", ".join(row.needs or []), row.memory, row.scope, row.paper)
    return [row.name, *(fact or NOTHING for fact in facts)]


# ── one strategy ────────────────────────────────────────────────────────────────────────────────────────────────────


def show_details(console: Console, details: Details) -> None:
    """Docstring, options with defaults, what it needs, and where it lives."""
    row = details.row
    text, meanings = split_options(details.documentation)
    write = _writer(console)
    write(Text(row.name, style=NAME_STYLE) + Text(f"   {row.kind}, {_origin(row)}", style=QUIET_STYLE))
    for paragraph in paragraphs(text):
        write(Text(f"\n{paragraph}"))
    for option in details.options:
        write(Text(f"\n{option.name}: {default_text(option)}", style=NAME_STYLE) + Text(f"   {values_text(option)}"))
        if option.name in meanings:
            write(Padding(Text(meanings[option.name]), (0, 0, 0, 4)) if console.is_terminal else meanings[option.name])
    write(Text())
    flag = "--strategy" if row.kind == "strategy" else "--outlier"
    facts = [*zip(FACTS, _facts(row)[1:], strict=True), ("file", details.location)]
    for label, value in (*facts, ("use", f"tropd distill {flag} {row.name}")):
        write(Text(f"{label:8}", style=QUIET_STYLE) + Text(value))


def _origin(row: Row) -> str:
    return "built in" if row.package == "tropd" else f"of {row.package}"


def split_options(documentation: str) -> tuple[str, dict[str, str]]:
    """(docstring without its section `Options:`, what that says about each option)."""
    before, found, rest = documentation.partition("\nOptions:\n")
    if not found:
        return documentation, {}
    section, _, after = rest.partition("\n\n")
    meanings: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        match = re.match(r" {4}(\w+(?:, \w+)*): (.*)", line)
        if match:
            names = match[1].split(", ")
            meanings |= dict.fromkeys(names, match[2])
        else:
            meanings |= {name: f"{meanings[name]} {line.strip()}" for name in names}
    return f"{before.rstrip()}\n\n{after}".rstrip(), meanings


def paragraphs(text: str) -> list[str]:
    """Docstring paragraphs with the lines joined, so that they wrap to any width; indented lines stay lines."""
    return [re.sub(r"(?<=\S)\n(?=\S)", " ", block) for block in text.split("\n\n") if block.strip()]


def default_text(option: Option) -> str:
    """The default as in YAML, a float with six digits."""
    return f"{option.default:.6g}" if isinstance(option.default, float) else flow(option.default)


def values_text(option: Option) -> str:
    """The allowed values, or the type."""
    return " | ".join(map(str, option.values)) if option.values else option.type


def details_json(details: Details) -> dict[str, Any]:
    """A strategy as JSON: its row's fields, then documentation, options and location."""
    whole = dataclasses.asdict(details)
    return {**whole.pop("row"), **whole}


# ── presets ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def list_presets(console: Console) -> None:
    """Name, configuration and the paper's average in each setting; what the settings are below."""
    rows = []
    for preset in PRESETS.values():
        averages = [f"{preset.results[s][-1]:.2f}" if s in preset.results else NOTHING for s in SETTINGS]
        rows.append([preset.name, short(preset.strategy) + ("; guidance" if preset.guidance else ""), *averages])
    headings = ("preset", "configuration", *SETTINGS)
    if not console.is_terminal:
        print_aligned(headings, rows)
        return
    for label, scores in (("student before", "before"), ("teacher", "teacher_scores")):
        known = [getattr(setting, scores) for setting in SETTINGS.values()]
        rows.append(["", label, *(f"{score[-1]:.2f}" if score else NOTHING for score in known)])
    print_table(console, headings, rows, title="Rows of the paper's tables, and the averages printed there")
    for name, setting in SETTINGS.items():
        line = f"tables {setting.tables}, {setting.teacher} teaches {setting.student}, mean of "
        console.print(Text(f"{name}: ", style=NAME_STYLE) + Text(line + ", ".join(setting.columns)))
    console.print(Text("Every number of a row: tropd strategies --presets NAME", style=QUIET_STYLE))


def show_preset(console: Console, preset: Preset) -> None:
    """One row with every number the paper prints for it."""
    write = _writer(console)
    write(Text(preset.name, style=NAME_STYLE) + Text(f"   the paper's row '{preset.row}'", style=QUIET_STYLE))
    write(Text(flow(preset.config)))
    if preset.note:
        write(Text(f"Note: {preset.note}."))
    for name in preset.results:
        setting = SETTINGS[name]
        write(Text(f"\n{name}: tables {setting.tables}, {setting.teacher} teaches {setting.student}"))
        scores = {"student before": setting.before, preset.row: preset.results[name], "teacher": setting.teacher_scores}
        known = {heading: map("{:.2f}".format, column) for heading, column in scores.items() if column}
        benchmarks = (*setting.columns, "average")
        print_table(console, ("", *known), [list(row) for row in zip(benchmarks, *known.values(), strict=True)])
    write(Text(f"\nuse: tropd distill --preset {preset.name}"))


def short(spec: dict[str, Any]) -> str:
    """A strategy and its options in one line: `trust-region, region_rule: threshold, outlier: clip`."""
    options = {key: flow(value) for key, value in spec.items() if key not in ("name", "outlier")}
    texts = [spec["name"], *(f"{key}: {value}" for key, value in options.items())]
    if "outlier" in spec:
        inner = short(spec["outlier"])
        texts.append(f"outlier: ({inner})" if "," in inner else f"outlier: {inner}")
    return ", ".join(texts)


def preset_json(preset: Preset) -> dict[str, Any]:
    """A preset as JSON, with every number and the setting it belongs to."""
    results = []
    for name in preset.results:
        setting = SETTINGS[name]
        columns = (*setting.columns, "average")
        before, teacher = (
            None if scores is None else dict(zip(columns, scores, strict=True))
            for scores in (setting.before, setting.teacher_scores)
        )
        models = {key: getattr(setting, key) for key in ("tables", "student", "teacher", "prompts")}
        scores = {"scores": preset.scores(name), "student_before": before, "teacher_scores": teacher}
        results.append({"setting": name, **models, **scores})
    return {"name": preset.name, "row": preset.row, "config": preset.config, "note": preset.note, "results": results}


# ── printing ────────────────────────────────────────────────────────────────────────────────────────────────────────


def flow(value: Any) -> str:
    """A value as YAML in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def print_table(console: Console, headings: Sequence[str], rows: Iterable[list[str]], *, title: str = "") -> None:
    """A table that wraps in a terminal, and aligned lines elsewhere."""
    if not console.is_terminal:
        print_aligned(headings, rows)
        return
    table = _table(title)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    table.columns[0].style, table.columns[0].no_wrap = NAME_STYLE, True
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def print_aligned(headings: Sequence[str], rows: Iterable[list[str]]) -> None:
    """One line per row, columns two spaces apart, nothing cut."""
    lines = [list(headings), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _table(title: str) -> Table:
    return Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )


def _writer(console: Console) -> Any:
    """Prints a line: wrapped in a terminal, whole elsewhere."""
    return lambda text: console.print(text, soft_wrap=not console.is_terminal)
