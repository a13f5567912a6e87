"""All-token top-k forward KL, differentiated or used as a reward: `python -m tests.benchmarks.collapse`.

The demo's setting (50 steps, learning rate 5e-4, no guidance), several seeds. Fills its section of docs/benchmarks.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tropd_cli.commands import DEMO_PRESET
from tropd_cli.run_directory import read_json_lines

from .table import DOCS, Result, Run, run_missing, write_page

VARIANTS = {"fkl": "differentiated", "fkl-as-reward": "as a reward"}
COLUMNS = "eval_accuracy eval_acceptance eval_reverse_kl eval_entropy eval_response_length eval_truncated_share".split()


def table(results: list[Result]) -> str:
    """Held-out numbers after training, one line per variant and seed, and those before."""
    headings = [
        "the KL is",
        "seed",
        "accuracy %",
        "acceptance",
        "reverse KL",
        "entropy",
        "length",
        "cut off",
        "gradient norm",
    ]
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    first = results[0]
    lines.append(_line("(before training)", first["seed"], first["before"], None))
    for variant, meaning in VARIANTS.items():
        same = sorted((r for r in results if r["row"] == variant), key=lambda r: r["seed"])
        lines += [_line(meaning, r["seed"], r["after"], r["grad_norm"]) for r in same]
    return "\n".join(lines)


def _line(name: str, seed: int, numbers: dict[str, float], grad_norm: float | None) -> str:
    accuracy, acceptance, reverse_kl, entropy, length, cut_off = (numbers[column] for column in COLUMNS)
    norm = "–" if grad_norm is None else f"{grad_norm:.2g}"
    return (
        f"| {name} | {seed} | {100 * accuracy:.1f} | {acceptance:.3f} | {reverse_kl:.3f} | {entropy:.3f} | {length:.1f} | "
        f"{100 * cut_off:.0f} % | {norm} |"
    )


def main(
    seeds: Annotated[str, typer.Option(help="Numbers with , between them.")] = "0,1,2",
    results: Annotated[Path, typer.Option(help="One line per finished run.")] = DOCS / "collapse.jsonl",
    page: Annotated[Path, typer.Option(help="Gets the table.")] = DOCS / "benchmarks.md",
    only_render: Annotated[bool, typer.Option("--render", help="Run nothing.")] = False,
) -> None:
    """Run what is missing, then rewrite the section."""
    done = read_json_lines(results)
    rate, steps = DEMO_PRESET["learning_rate"], DEMO_PRESET["steps"]
    runs = (Run("demo", row, int(seed), rate, steps) for seed in seeds.split(",") for row in VARIANTS)
    if not only_render:
        run_missing(runs, done, Path(), results)
    if done:
        write_page(page, "collapse", table(done))
    typer.echo(str(page))


if __name__ == "__main__":
    typer.run(main)
