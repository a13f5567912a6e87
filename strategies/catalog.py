"""What there is to choose from, as plain data: `tropd strategies` prints it. Listing imports no plug-in."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from dataclasses import dataclass
from typing import Any, Literal

from .base import STRATEGIES
from .outliers import OUTLIERS
from .registry import Registry, where
from .types import Needs, Scope

Memory = Literal["O(n)", "O(nk)", "O(chunk x V)"]


@dataclass(frozen=True)
class Row:
    """One name. Of a plug-in that was not loaded only name, kind, package and entry point are known; the rest is None.

    summary: first line of its docstring. needs: what it reads beyond the student's own log-probability, for the default
    options; so are memory and scope.
    """

    name: str
    kind: str
    package: str
    entry_point: str | None
    clash: bool = False
    summary: str | None = None
    needs: list[str] | None = None
    memory: Memory | None = None
    scope: Scope | None = None
    paper: str | None = None


@dataclass(frozen=True)
class Option:
    """One option of a strategy or estimator. `default` as in YAML; `values`: the allowed ones, if few."""

    name: str
    type: str
    default: Any
    values: list[Any] | None = None


@dataclass(frozen=True)
class Details:
    """Everything about one name: its row, its whole docstring, its options with their defaults, and where it lives."""

    row: Row
    documentation: str
    options: list[Option]
    location: str


def describe_all() -> list[Row]:
    """A row per registered strategy and per outlier estimator, strategies first."""
    return [*_rows(STRATEGIES), *_rows(OUTLIERS)]


def describe(name: str) -> Details:
    """Details of a strategy, or of an outlier estimator when no strategy has that name. Loads it if it is a plug-in.

    Raises:
        RegistryError: unknown name, or a plug-in that clashes or does not load.
    """
    estimator = name in OUTLIERS.names() and name not in STRATEGIES.names()
    return _details(OUTLIERS, name) if estimator else _details(STRATEGIES, name)


def memory_class(needs: Needs) -> Memory:
    """How much memory the signals take, for n tokens, k teacher tokens and a vocabulary of V. Never O(nV)."""
    if needs.full_distribution:
        return "O(chunk x V)"
    return "O(nk)" if needs.teacher_top_k else "O(n)"


def needs_list(needs: Needs) -> list[str]:
    """`["teacher_logprob", "teacher_top_k=64"]`: the fields that are set."""
    values = {f.name: getattr(needs, f.name) for f in dataclasses.fields(needs)}
    return [name if value is True else f"{name}={value}" for name, value in values.items() if value]


def _rows(registry: Registry[Any]) -> list[Row]:
    return [
        Row(entry.name, registry.kind, entry.package, entry.target, entry.clash)
        if entry.cls is None
        else _row(registry, entry.name, entry.package, entry.cls)
        for entry in registry.entries()
    ]


def _row(registry: Registry[Any], name: str, package: str, cls: type) -> Row:
    summary = (inspect.getdoc(cls) or "").partition("\n")[0]
    try:
        instance = cls()
    except (TypeError, ValueError):  # a plug-in with an option that has no default
        return Row(name, registry.kind, package, None, summary=summary)
    return Row(
        name=name,
        kind=registry.kind,
        package=package,
        entry_point=None,
        summary=summary,
        needs=needs_list(instance.needs),
        memory=memory_class(instance.needs),
        scope=getattr(instance, "scope", None),
        paper=getattr(instance, "paper", None),
    )


def _details(registry: Registry[Any], name: str) -> Details:
    cls = registry.get(name)
    package = next(entry.package for entry in registry.entries() if entry.name == name)
    return Details(
        row=_row(registry, name, package, cls),
        documentation=inspect.getdoc(cls) or "",
        options=[_option(cls, field) for field in dataclasses.fields(cls)],
        location=where(cls),
    )


def _option(cls: type, field: dataclasses.Field[Any]) -> Option:
    default = None if field.default is dataclasses.MISSING else field.default
    nested = field.metadata.get("registry")
    if nested is not None:
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else default
        registry: Registry[Any] = nested()
        spec = None if made is None else registry.describe(made)
        return Option(field.name, registry.kind, spec, registry.names())
    hint = typing.get_type_hints(cls)[field.name]
    values = list(typing.get_args(hint)) if typing.get_origin(hint) is Literal else None
    return Option(field.name, "choice" if values else getattr(hint, "__name__", str(hint)), default, values)
