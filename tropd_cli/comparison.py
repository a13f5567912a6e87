"""Results side by side: tables as papers print them, and a paired comparison of two."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tropd_cli import statistics
from tropd_cli.benchmarks.rows import from_file
from tropd_cli.errors import UserError
from tropd_cli.grading import SCHEMA, rounded

Result = Mapping[str, Any]
NEEDED = ("benchmark", "model", "accuracy", "ci95", "problems", "samples", "per_problem")
HARMLESS = ("samples", "seed", "batch_tokens")  # sampling that may differ without making results incomparable
AVERAGE = "avg"


def load_results(names: Sequence[str]) -> list[dict[str, Any]]:
    """Result objects out of JSON or JSON Lines files, `-` for stdin.

    Raises:
        UserError: no such file, no result in it, or one of another schema.
    """
    found: list[dict[str, Any]] = []
    for name in names:
        rows = [(name, row) for row in whole_json(name)] or list(from_file(name))
        if not rows:
            raise UserError(f"{name} has no results. Make some with: tropd eval MODEL --benchmark NAME --json")
        for place, row in rows:
            missing = [key for key in NEEDED if key not in row]
            if row.get("schema") != SCHEMA or missing:
                why = f"schema {row.get('schema')!r} is not '{SCHEMA}'" if row.get("schema") != SCHEMA else None
                raise UserError(f"{place}: no result of `tropd eval`: {why or 'without ' + ', '.join(missing)}")
            found.append(row)
    return found


def whole_json(name: str) -> list[dict[str, Any]]:
    """The objects of a file that is one JSON value over several lines, else nothing."""
    if name == "-":
        return []
    try:
        with open(name, encoding="utf-8") as file:
            value = json.load(file)
    except (ValueError, OSError):
        return []
    return [row for row in (value if isinstance(value, list) else [value]) if isinstance(row, dict)]


def differences(a: Result, b: Result) -> list[str]:
    """What makes two results of one benchmark no like-for-like comparison, in words; empty if nothing does."""
    found = []
    if a["benchmark"] != b["benchmark"]:
        found.append(f"benchmark: {a['benchmark']} and {b['benchmark']}")
    if a.get("prompt_hash") != b.get("prompt_hash"):
        found.append(f"prompts: {a.get('prompt_hash')} and {b.get('prompt_hash')}")
    one, other = a.get("sampling") or {}, b.get("sampling") or {}
    for key in sorted((one.keys() | other.keys()) - set(HARMLESS)):
        if one.get(key) != other.get(key):
            found.append(f"{key}: {one.get(key)} and {other.get(key)}")
    if set(a["per_problem"]) != set(b["per_problem"]):
        shared = len(set(a["per_problem"]) & set(b["per_problem"]))
        found.append(f"problems: {shared} in common of {a['problems']} and {b['problems']}")
    return found


def compare(a: Result, b: Result) -> dict[str, Any]:
    """Paired bootstrap of result b against result a; `differs` says what else differs between them.

    Raises:
        UserError: they are of different benchmarks or share no problem.
    """
    differs = differences(a, b)
    if a["benchmark"] != b["benchmark"]:
        raise UserError(f"results of different benchmarks cannot be compared: {differs[0]}")
    means = [{p: counts["correct"] / counts["samples"] for p, counts in r["per_problem"].items()} for r in (a, b)]
    try:
        found = statistics.compare(*means)
    except ValueError as error:
        raise UserError(f"{a['model']} and {b['model']} on {a['benchmark']}: {error}") from error
    return {
        "schema": "tropd-comparison/1",
        "benchmark": a["benchmark"],
        "models": [a["model"], b["model"]],
        "difference": rounded(found.difference),
        "ci95": [rounded(end) for end in found.ci95],
        "probability": rounded(found.probability),
        "problems": found.problems,
        "differs": differs,
    }


def table(results: Sequence[Result], style: str = "markdown") -> tuple[str, list[str]]:
    """Models down, benchmarks across, per cent with the 95 % interval, the best of each column in bold.

    Args:
        results: any number of models and benchmarks; a model's second result of one benchmark gets a row of its own.
        style: "markdown", or "plain" for aligned columns without marks.

    Returns:
        The table, and warnings about columns whose results are not made alike; such columns have no bold number.

    Raises:
        UserError: an unknown style.
    """
    if style not in ("markdown", "plain"):
        raise UserError(f"--table {style!r} is none of: markdown, plain")
    lines, benchmarks = grid(results)
    warnings = []
    unlike = set()
    for name in benchmarks:
        column = [line[name] for _, line in lines if name in line]
        found = sorted({text for other in column[1:] for text in differences(column[0], other)})
        if found:
            unlike.add(name)
            warnings.append(f"{name}: not made alike, so no best is marked ({'; '.join(found)})")
    header = ["model", *benchmarks, *([AVERAGE] if len(benchmarks) > 1 else [])]
    scores = [[line[name]["accuracy"] if name in line else None for name in benchmarks] for _, line in lines]
    if len(benchmarks) > 1:
        for row in scores:
            row.append(None if None in row else sum(row) / len(row))
    body = []
    for (label, line), row in zip(lines, scores, strict=True):
        cells = [label]
        for number, (name, score) in enumerate(zip(header[1:], row, strict=True)):
            column_scores = [other[number] for other in scores if other[number] is not None]
            comparable = name not in unlike and not (name == AVERAGE and unlike) and len(column_scores) > 1
            best = comparable and score is not None and shown(score) == shown(max(column_scores))
            cells.append(cell(score, line.get(name), best and style == "markdown"))
        body.append(cells)
    return render([header, *body], style), warnings


def grid(results: Sequence[Result]) -> tuple[list[tuple[str, dict[str, Result]]], list[str]]:
    """Rows (label, benchmark -> result) and the benchmarks, both in order of appearance."""
    lines: list[tuple[str, dict[str, Result]]] = []
    for result in results:
        model, benchmark = str(result["model"]), str(result["benchmark"])
        mine = [line for label, line in lines if label == model or label.startswith(f"{model} (")]
        free = next((line for line in mine if benchmark not in line), None)
        if free is None:
            free = {}
            lines.append((f"{model} ({len(mine) + 1})" if mine else model, free))
        free[benchmark] = result
    return lines, list(dict.fromkeys(str(result["benchmark"]) for result in results))


def shown(score: float) -> str:
    return f"{100 * score:.2f}"


def cell(score: float | None, result: Result | None, bold: bool) -> str:
    if score is None:
        return ""
    text = f"**{shown(score)}**" if bold else shown(score)
    return text if result is None else f"{text} [{100 * result['ci95'][0]:.1f}, {100 * result['ci95'][1]:.1f}]"


def render(rows: Sequence[Sequence[str]], style: str) -> str:
    """Rows as text, the first one as header."""
    if style == "markdown":
        safe = [[text.replace("|", "\\|") for text in row] for row in rows]
        head, *body = ["| " + " | ".join(row) + " |" for row in safe]
        return "\n".join([head, "|---|" + "---:|" * (len(rows[0]) - 1), *body])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
