"""The forms of `tropd eval` without a model: grading text made elsewhere, and setting results side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from tropd_cli import comparison, grading
from tropd_cli.benchmarks import load_all
from tropd_cli.benchmarks import prompt_hash as prompt_hash_of
from tropd_cli.display import Display
from tropd_cli.errors import UserError
from tropd_cli.evaluate import EvalRequest

from .printing import describe, describe_comparison
from .tasks import WITHOUT_VOTES, build_verifier, label_of

#: Graded completions between two progress lines.
EVERY = 1000


def grade_completions(request: EvalRequest) -> None:
    """`--completions`: verdicts as JSON Lines with --output, and one result. Raises UserError."""
    display = Display()
    references = None
    prompt_hash = None
    name = label_of(str(request.completions))
    chosen: Any = request.verifier
    if request.benchmark is not None:
        found = load_all(request.benchmark)
        if len(found) > 1:
            raise UserError(f"--completions belongs to one benchmark, not to {len(found)}: --benchmark NAME")
        if found[0].file == "-" == request.completions:
            raise UserError("completions and benchmark cannot both come from standard input")
        problems = found[0].problems(request.limit)
        references = {problem.id: problem.reference for problem in problems}
        name, prompt_hash = found[0].name, prompt_hash_of(problems)
        chosen = chosen or found[0].spec.verifier
    if chosen is None:
        raise UserError(
            "--completions needs to know what is correct: --verifier NAME (math, number, choice, exact, code, ifbench), "
            "or --benchmark NAME"
        )
    verifier, verifier_name = build_verifier(chosen)
    grading.check_allowed(verifier, request.allow_code_execution)
    rows = grading.read_completions(str(request.completions), references)
    graded = []
    with Sink(request.output, overwrite=request.overwrite) as sink:
        for one in grading.grade(rows, verifier):
            graded.append(one)
            sink.write(one.as_row())
            if len(graded) % EVERY == 0:
                display.note(f"{len(graded)} completions graded, {sum(g.correct for g in graded)} correct")
    result = grading.summarize(
        graded,
        benchmark=name,
        model=request.model or "completions",
        prompt_hash=prompt_hash,
        votes=verifier_name not in WITHOUT_VOTES,
    )
    emit([result | {"verifier": verifier_name, "split": None}], request, display)


class Sink:
    """A JSON Lines file that is written line by line; without a name nothing is."""

    def __init__(self, name: str | None, *, overwrite: bool) -> None:
        path = Path(name) if name else None
        if path is not None and path.is_dir():
            path = path / "graded.jsonl"
        if path is not None and path.exists() and not overwrite:
            raise UserError(f"'{path}' exists already. Choose another --output, or replace it with --overwrite")
        self.path = path
        self.file: Any = None

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def write(self, row: Mapping[str, Any]) -> None:
        """One line, flushed. Nothing is made before the first one. Raises UserError when it cannot be written."""
        if self.path is None:
            return
        try:
            if self.file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.file = self.path.open("w", encoding="utf-8")
            self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(f"'{self.path}' cannot be written: {error.strerror}") from error


def show_results(request: EvalRequest) -> None:
    """Result files: a table, and every further result of a benchmark against the first one of it. Raises UserError."""
    missing = [name for name in request.targets if name != "-" and not Path(name).is_file()]
    if missing:
        raise UserError(
            f"'{missing[0]}' is neither a run directory nor a result file. Results come from: tropd eval ... --json > a.json"
        )
    results = comparison.load_results(request.targets)
    first: dict[str, Mapping[str, Any]] = {}
    compared = []
    for result in results:
        if result["accuracy"] is None:
            continue
        base = first.setdefault(result["benchmark"], result)
        if base is not result:
            compared.append(comparison.compare(base, result))
    if request.as_json:
        if not compared:
            raise UserError("nothing to compare: no benchmark has two results with an accuracy in these files")
        for one in compared:
            typer.echo(json.dumps(one, ensure_ascii=False))
        return
    print_table(results, request.table or "plain", Display())
    if request.table is None:
        for one in compared:
            typer.echo(describe_comparison(one))


def emit(results: Sequence[Mapping[str, Any]], request: EvalRequest, display: Display) -> None:
    """Results on stdout: JSON Lines, the table that was asked for, or a few lines each."""
    if request.as_json:
        for result in results:
            typer.echo(json.dumps(result, ensure_ascii=False))
    elif request.table is not None:
        print_table(results, request.table, display)
    else:
        typer.echo("\n\n".join(describe(result) for result in results))


def print_table(results: Sequence[Mapping[str, Any]], style: str, display: Display) -> None:
    """The table on stdout, its warnings on stderr. Raises UserError when no result has an accuracy."""
    with_accuracy = [result for result in results if result["accuracy"] is not None]
    if not with_accuracy:
        raise UserError("no accuracy to tabulate: these results hold divergences only. Leave --table out")
    text, warnings = comparison.table(with_accuracy, style)
    typer.echo(text)
    for warning in warnings:
        display.warn(warning)
