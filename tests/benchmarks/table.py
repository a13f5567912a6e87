"""Every method on every task, several seeds each: `python -m tests.benchmarks.table` fills docs/benchmarks.md.

One JSON line per finished run, so that it can be stopped and started again at any time; what is there is not repeated.
Each row first gets its own best learning rate out of the same three, in runs of half the length on a seed that no
reported number uses, and then runs on its seeds. About a CPU-minute a run; with one thread each, one process per task uses two cores best.

    python -m tests.benchmarks.astray models                    # the second task's teacher, once
    python -m tests.benchmarks.gap models/gap                   # the third task's models and prompts, once
    python -m tests.benchmarks.table --models models            # everything: 504 runs
    python -m tests.benchmarks.table --tasks demo --rows opd,tropd --seeds 0,1,2 --steps 20
    python -m tests.benchmarks.table --render                   # only rewrite the page
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

import typer

from tropd_cli.commands import DEMO_PRESET, DistillRequest, distill
from tropd_cli.config import merge, read_yaml
from tropd_cli.errors import UserError
from tropd_cli.run_directory import RunDirectory, read_json_lines
from tropd_cli.statistics import student_quantile

from .rows import LEARNING_RATES, ROWS, TASKS, TUNING_SEED, Row, Task

DOCS = Path(__file__).parents[2] / "docs"
HELD_OUT = tuple(
    f"eval_{name}"
    for name in "accuracy reverse_kl forward_kl acceptance reward_p01 entropy response_length truncated_share".split()
)
LAST = 10  #: steps over which gradient norm and entropy are averaged
NOT_KEPT = ("student", "teacher", "reference", "data", "eval_data", "output", "seed", "plugin")

Result = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One cell before it is averaged."""

    task: str
    row: str
    seed: int
    learning_rate: float
    steps: int

    def is_in(self, results: list[Result]) -> bool:
        """Whether it has been run."""
        return any(self == Run(*(r[key] for key in ("task", "row", "seed", "learning_rate", "steps"))) for r in results)


# ── running ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def execute(run: Run, models: Path) -> Result:
    """Trains in this process; a run that stops with an error has accuracy None and says why."""
    folder = Path(tempfile.mkdtemp(prefix="tropd-benchmark-"))
    own = {"steps": run.steps, "learning_rate": run.learning_rate, "seed": run.seed, "output": str(folder / "run")}
    layers = merge(merge(TASKS[run.task].config(models), ROWS[run.row].config), own)
    started, problem = time.monotonic(), None
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            distill(DistillRequest(flags=layers))
    except UserError as error:
        problem = str(error)
    result = summary(run, RunDirectory(folder / "run"), time.monotonic() - started, problem)
    shutil.rmtree(folder)
    return result


def summary(run: Run, directory: RunDirectory, seconds: float, problem: str | None) -> Result:
    """The line of a finished run. Raises UserError when it never began."""
    rows = directory.rows()
    if not rows:
        raise UserError(f"{run}: {problem}")
    first, last = rows[0], rows[-1]
    config = read_yaml(str(directory.config))
    return {
        **vars(run),
        "accuracy": None if problem else last["eval_accuracy"],
        "grad_norm": _mean_of(rows[1:][-LAST:], "grad_norm"),
        "entropy": _mean_of(rows[1:][-LAST:], "entropy"),
        "skipped_steps": last.get("skipped_steps", 0),
        "before": {key: first.get(key) for key in ("outlier_share", *HELD_OUT)},
        "after": {key: last.get(key) for key in HELD_OUT},
        "seconds": round(seconds, 1),
        "problem": problem,
        "config": {key: value for key, value in config.items() if key not in NOT_KEPT},
    }


def _mean_of(rows: list[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row.get(key) is not None]
    return statistics.fmean(values) if values else None


def best_learning_rate(task: str, row: str, steps: int, results: list[Result]) -> float | None:
    """The one with the highest accuracy after half of `steps` on the tuning seed, the smaller one of equals; None until
    all have run."""
    found = {
        r["learning_rate"]: -1.0 if r["accuracy"] is None else r["accuracy"]
        for r in results
        if (r["task"], r["row"], r["steps"], r["seed"]) == (task, row, steps // 2, TUNING_SEED)
    }
    if not found.keys() >= set(LEARNING_RATES):
        return None
    return min(found, key=lambda rate: (-found[rate], rate))


def wanted(
    tasks: list[Task], rows: list[Row], seeds: list[int] | None, steps: int, results: list[Result]
) -> Iterator[Run]:
    """Tuning runs first, then seed after seed over all rows, so that a half-finished table is already a fair one."""
    for task in tasks:
        for row in rows:
            yield from (Run(task.name, row.name, TUNING_SEED, rate, steps // 2) for rate in LEARNING_RATES)
    for seed in range(max(row.seeds for row in rows)) if seeds is None else seeds:
        for task in tasks:
            for row in rows:
                if seeds is not None or seed < row.seeds:
                    rate = best_learning_rate(task.name, row.name, steps, results)
                    assert rate is not None, "tuning runs come first"
                    yield Run(task.name, row.name, seed, rate, steps)


# ── the page ────────────────────────────────────────────────────────────────────────────────────────────────────────


def render(results: list[Result], steps: int) -> str:
    """One table per task, best mean first."""
    parts = []
    for task in TASKS.values():
        reported = [r for r in results if (r["task"], r["steps"]) == (task.name, steps) and r["seed"] != TUNING_SEED]
        if reported:
            parts.append(f"### {task.title}\n\n{_before(reported)}\n\n{_table(task, reported, results, steps)}")
    return "\n\n".join(parts)


def _before(reported: list[Result]) -> str:
    before = reported[0]["before"]
    return (
        f"Before training, seed {reported[0]['seed']}: accuracy {_percent(before['eval_accuracy'])} %, outlier share "
        f"{_percent(before['outlier_share'])} %, acceptance {_percent(before['eval_acceptance'])} %, lowest 1 % of R "
        f"{_number(before['eval_reward_p01'], '.1f')} nats."
    )


def _table(task: Task, reported: list[Result], results: list[Result], steps: int) -> str:
    lines = []
    for row in ROWS.values():
        rate = best_learning_rate(task.name, row.name, steps, results)
        same = [r for r in reported if (r["row"], r["learning_rate"]) == (row.name, rate)]
        if not same:
            continue
        # A run that stopped solved nothing that could be counted: it enters as 0 and is named.
        accuracies = [100.0 * (r["accuracy"] or 0.0) for r in same]
        failed = sum(r["accuracy"] is None for r in same)
        seeds = f"{len(same)}" + (f" ({failed} stopped)" if failed else "")
        norm, entropy = (_number(_mean_of(same, key), ".3g") for key in ("grad_norm", "entropy"))
        line = f"| {row.name} | {rate:g} | {seeds} | {_interval(accuracies)} | {norm} | {entropy} |"
        lines.append((statistics.fmean(accuracies), line))
    heading = "| row | learning rate | seeds | accuracy % | gradient norm | entropy |\n|---|---|---|---|---|---|"
    return "\n".join([heading, *(line for _, line in sorted(lines, key=lambda item: -item[0]))])


def _interval(values: list[float]) -> str:
    """Mean ± half the 95 % interval of Student's t over seeds."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.1f}"
    half = student_quantile(len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.1f} ± {half:.1f}"


def _percent(value: float | None) -> str:
    return _number(None if value is None else 100.0 * value, ".1f")


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def markers(section: str) -> tuple[str, str]:
    """The comments around a generated part of the page."""
    return f"<!-- {section}: begin -->", f"<!-- {section}: end -->"


def write_page(page: Path, section: str, text: str) -> None:
    """Replaces what stands between the two markers of a section; adds them at the end of a page that has none."""
    begin, end = markers(section)
    old = page.read_text(encoding="utf-8") if page.is_file() else "# Benchmarks\n"
    before, found, rest = old.partition(begin)
    after = rest.partition(end)[2] if found else ""
    if not found:
        before = before.rstrip() + "\n\n"
    page.write_text(f"{before}{begin}\n{text}\n{end}{after or chr(10)}", encoding="utf-8")


def run_missing(runs: Iterable[Run], done: list[Result], models: Path, file: Path) -> None:
    """Runs what `done` lacks, adding each to it and to the file as soon as it is finished."""
    for run in runs:
        if not run.is_in(done):
            typer.echo(f"{run}", err=True)
            done.append(execute(run, models))
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(done[-1]) + "\n")


# ── command ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def chosen(names: str | None, known: dict[str, Any]) -> list[Any]:
    """The named ones, or all that have seeds. Raises typer.BadParameter for an unknown name."""
    if names is None:
        return [item for item in known.values() if getattr(item, "seeds", 1)]
    unknown = [name for name in names.split(",") if name not in known]
    if unknown:
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}. Known: {', '.join(known)}")
    return [known[name] for name in names.split(",")]


def main(
    rows: Annotated[str | None, typer.Option(help="Names with , between them. Default: all.")] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Numbers with , between them. Default: as many as a row has.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Names with , between them. Default: all.")] = None,
    steps: Annotated[int, typer.Option(help="Updates per run.")] = DEMO_PRESET["steps"],
    models: Annotated[Path, typer.Option(help="Where tests.benchmarks.astray and tests.benchmarks.gap wrote.")] = Path(
        "models"
    ),
    results: Annotated[Path, typer.Option(help="One line per finished run.")] = DOCS / "benchmarks.jsonl",
    page: Annotated[Path, typer.Option(help="Gets the tables.")] = DOCS / "benchmarks.md",
    only_render: Annotated[bool, typer.Option("--render", help="Run nothing.")] = False,
) -> None:
    """Run what is missing, then rewrite the tables."""
    numbers = None if seeds is None else [int(seed) for seed in seeds.split(",")]
    done = read_json_lines(results)
    picked = chosen(tasks, TASKS), chosen(rows, ROWS)
    if not only_render:
        run_missing(wanted(*picked, numbers, steps, done), done, models, results)
    write_page(page, "table", render(done, steps))
    typer.echo(str(page))


if __name__ == "__main__":
    typer.run(main)
