"""Which strategies `inspect-regions` asks: one or several, with options, each under a name of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from strategies import STRATEGIES, Strategy

from .config import build_config, build_strategy, load_plugins, merge, parse_set
from .errors import UserError


@dataclass(frozen=True)
class Asked:
    """One strategy. label: its name, with its options where the name alone would be taken twice. options: canonical."""

    label: str
    strategy: Strategy
    options: dict[str, Any]


def asked_strategies(
    configured: Any, names: Sequence[str], *, outlier: str | None, assignments: Sequence[str], plugins: list[str]
) -> list[Asked]:
    """The strategies of the command line over the configured one.

    Args:
        configured: the `strategy:` of a run or configuration; a strategy of the same name keeps its options.
        names: names, or YAML mappings like {name: trust-region, region_rule: soft}. None: the configured one.
        outlier: estimator of those that have one.
        assignments: `--set`'s, of which those under `strategy.` count.

    Raises:
        UserError: unknown name or option, an estimator that no strategy here has, options for one of several.
    """
    load_plugins(plugins)
    base = build_config({"strategy": configured or {}})
    changes = [parse_set(text) for text in assignments]
    changes = [{"strategy": change["strategy"]} for change in changes if "strategy" in change]
    if changes and len(names) > 1:
        raise UserError(
            "--set strategy... with several strategies does not say which. Write the options into the name: "
            "--strategy '{name: trust-region, region_rule: soft}'"
        )
    specs = [_mapping(name) for name in names] or [base.strategy]
    takes_outlier = [outlier is not None and _has_outlier(spec) for spec in specs]
    asked = []
    for spec, takes in zip(specs, takes_outlier, strict=True):
        layers = [{"strategy": base.strategy}, {"strategy": spec}, *changes]
        if takes or (outlier is not None and not any(takes_outlier)):
            layers.append({"strategy": {"outlier": {"name": outlier}}})
        merged: dict[str, Any] = {}
        for layer in layers:
            merged = merge(merged, layer)
        strategy = build_strategy(build_config(merged))
        asked.append((strategy, STRATEGIES.describe(strategy, merged["strategy"]["name"])))
    labels = _labels([options for _, options in asked])
    return [Asked(label, *parts) for label, parts in zip(labels, asked, strict=True)]


def _mapping(text: str) -> dict[str, Any]:
    if not text.lstrip().startswith("{"):
        return {"name": text}
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict) or not value.get("name"):
        raise UserError(
            f"--strategy {text!r} is no mapping with a name. Example: {{name: trust-region, region_rule: soft}}"
        )
    return value


def _has_outlier(spec: dict[str, Any]) -> bool:
    name = spec["name"]
    return name in STRATEGIES.names() and any(f.name == "outlier" for f in dataclasses.fields(STRATEGIES.get(name)))  # type: ignore[arg-type]


def _labels(canonical: list[dict[str, Any]]) -> list[str]:
    """Names; strategies of one name are told apart by the options in which they differ."""
    labels = []
    for options in canonical:
        twins = [other for other in canonical if other["name"] == options["name"]]
        differing = [key for key in options if any(other.get(key) != options[key] for other in twins)]
        told = ", ".join(f"{key} {_short(options[key])}" for key in differing)
        labels.append(f"{options['name']} ({told})" if told else options["name"])
    if len(set(labels)) < len(labels):
        raise UserError(f"--strategy names '{max(labels, key=labels.count)}' twice with the same options")
    return labels


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join([str(value["name"]), *(f"{k}={_short(v)}" for k, v in value.items() if k != "name")])
    return f"{value:.4g}" if isinstance(value, float) else str(value)
