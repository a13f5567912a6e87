"""What a run directory recorded, and rows from any other JSON lines. A torn last line is skipped and said."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tropd_cli.errors import UserError

from .inspection import Inspection, Rule
from .rows import RowError, TokenRow, parse_row

ROLLOUTS, METRICS, CONFIG = "rollouts", "metrics.jsonl", "config.yaml"


def recording_path(run: Path, step: int) -> Path:
    """Where a run keeps the rows of a step: rollouts/step-000010.jsonl."""
    return run / ROLLOUTS / f"step-{step:06d}.jsonl"


def recorded_steps(run: Path) -> list[int]:
    """The steps a run has recorded, ascending."""
    names = (re.fullmatch(r"step-(\d+)\.jsonl", path.name) for path in (run / ROLLOUTS).glob("step-*.jsonl"))
    return sorted(int(name[1]) for name in names if name)


def read_run(run: Path, step: int | None = None) -> Inspection:
    """What a run recorded at a step, the last one by default, with its curves and what its configuration says.

    Raises:
        UserError: no such directory, nothing recorded, another step, or a line that is no token row.
    """
    if not run.is_dir():
        raise UserError(f"'{run}' is no run directory. See: tropd distill --help")
    steps = recorded_steps(run)
    if not steps:
        raise UserError(
            f"'{run}' has recorded no sequences. Record some with: tropd distill --set record.every=10 ..., "
            "or give --student, --teacher and --data"
        )
    if step is None:
        step = steps[-1]
    if step not in steps:
        raise UserError(f"'{run}' has no recording of step {step}. Recorded: {_listed(steps)}")
    path = recording_path(run, step)
    notes: list[str] = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        rows = list(read_rows(lines, str(path), notes))
    facts, rule = config_facts(read_config(run))
    facts = {"run": run.name, "step": str(step)} | facts
    return Inspection(rows, facts=facts, metrics=read_metrics(run), notes=notes, rule=rule)


def read_rows(lines: Iterable[str], source: str, notes: list[str] | None = None) -> Iterator[TokenRow]:
    """Token rows from JSON lines.

    Args:
        source: the name used in messages.
        notes: a torn last line is skipped and noted here; without it, it is an error like any other.

    Raises:
        UserError: a line that is no token row, with its number.
    """
    for number, value in _read_json_lines(lines, source, notes):
        try:
            yield parse_row(value)
        except RowError as error:
            raise UserError(f"{source}, line {number} {error}. A token row is what --format jsonl writes") from error


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The objects of metrics.jsonl, one per step; empty where the run has none yet."""
    path = run / METRICS
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", errors="replace") as lines:
        return [value for _, value in _read_json_lines(lines, str(path), []) if isinstance(value, dict)]


def _read_json_lines(lines: Iterable[str], source: str, notes: list[str] | None) -> Iterator[tuple[int, Any]]:
    """(line number, value). A line is torn when it is the last, has no line break and is no JSON."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            if line.endswith("\n") or notes is None:
                raise UserError(f"{source}, line {number} is no JSON: {error}") from error
            notes.append(f"The last line of {Path(source).name} is incomplete and was skipped.")
            return
        yield number, value


def read_config(run: Path) -> dict[str, Any]:
    """A run's configuration as YAML has it; {} where there is none."""
    path = run / CONFIG
    if not path.is_file():
        return {}
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        config = None
    return config if isinstance(config, dict) else {}


def config_facts(config: dict[str, Any]) -> tuple[dict[str, str], Rule]:
    """What the reports say about models and strategy of a configuration. Missing or odd values are left out."""
    facts = {name: str(config[name]) for name in ("student", "teacher") if config.get(name)}
    strategy = config.get("strategy")
    options = strategy if isinstance(strategy, dict) else {"name": strategy}
    if options.get("name"):
        facts["strategy"] = spelled_out(options)
    kind, threshold = options.get("region_rule"), options.get("threshold")
    return facts, Rule(
        kind if kind in Rule.KINDS else Rule.kind, threshold if isinstance(threshold, float) else Rule.threshold
    )


def spelled_out(options: dict[str, Any]) -> str:
    """`trust-region, region_rule soft, outlier forward-kl`; the threshold only where it rules."""
    parts = [str(options["name"])]
    for name, value in options.items():
        if name == "name" or value is None or (name == "threshold" and options.get("region_rule") != "threshold"):
            continue
        value = value.get("name") if isinstance(value, dict) else value
        parts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(parts)


def _listed(steps: list[int]) -> str:
    shown = steps if len(steps) <= 12 else [*steps[:5], "...", *steps[-5:]]
    return ", ".join(map(str, shown))
