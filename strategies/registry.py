"""Registries: name -> class. Decorator for built-ins, entry points and files for plug-ins; listing imports nothing."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

T = TypeVar("T")


class RegistryError(ValueError):
    """An unknown name, option or value, a clash, or a plug-in that does not load. The message is for the user."""


@dataclass(frozen=True)
class Entry:
    """One registered name, without importing a plug-in. `target` is `module:Class` or a file path."""

    name: str
    package: str
    target: str
    built_in: bool
    clash: bool = False


class Registry(Generic[T]):
    """Name -> class of one kind of plug-in.

    Args:
        kind: what the names stand for, singular, as errors print it ("strategy").
        group: entry-point group that third-party packages use ("tropd.strategies").
        listing: the command that lists the names.
    """

    def __init__(self, kind: str, group: str, listing: str) -> None:
        self.kind, self.group, self.listing = kind, group, listing
        self._built_in: dict[str, type[T]] = {}
        self._files: dict[str, tuple[type[T], Path]] = {}
        self._loading_file: Path | None = None

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator. Raises RegistryError when the name is taken."""

        def add(cls: type[T]) -> type[T]:
            if not dataclasses.is_dataclass(cls):
                raise RegistryError(f"{self.kind} '{name}': {cls.__name__} must be a (frozen) dataclass")
            taken = self._built_in.get(name) or (self._files[name][0] if name in self._files else None)
            if taken is not None:
                raise RegistryError(
                    f"{self.kind} '{name}' in {where(cls)} clashes with the one in {where(taken)}: choose another name"
                )
            if self._loading_file is None:
                self._built_in[name] = cls
            else:
                self._files[name] = (cls, self._loading_file)
            return cls

        return add

    def load_file(self, path: Path) -> None:
        """Runs a Python file whose `@register` decorators add names to this registry, once per file."""
        path = path.resolve()
        if any(known == path for _, known in self._files.values()):
            return
        if not path.is_file():
            raise RegistryError(f"plug-in file '{path}' does not exist")
        spec = importlib.util.spec_from_file_location(f"tropd_plugin_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise RegistryError(f"plug-in file '{path}' is no Python file: its name must end in .py")
        self._loading_file = path
        try:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        except RegistryError:
            raise
        except Exception as error:
            raise RegistryError(f"plug-in file '{path}' failed: {type(error).__name__}: {error}") from error
        finally:
            self._loading_file = None

    def _points(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}

    def entries(self) -> list[Entry]:
        """Every name with its origin; built-ins first. Imports no plug-in."""
        rows = [Entry(n, "tropd", f"{c.__module__}:{c.__qualname__}", True) for n, c in sorted(self._built_in.items())]
        rows += [Entry(n, "file", str(path), False) for n, (_, path) in sorted(self._files.items())]
        for name, point in sorted(self._points().items()):
            package = point.dist.name if point.dist else "?"
            rows.append(Entry(name, package, point.value, False, clash=name in self._built_in))
        return rows

    def names(self) -> list[str]:
        """All usable names, built-ins and plug-ins, sorted. Imports no plug-in."""
        return sorted({entry.name for entry in self.entries()})

    def get(self, name: str) -> type[T]:
        """The class behind a name.

        Raises:
            RegistryError: unknown name (with a suggestion), a plug-in that clashes with a built-in, or one that fails.
        """
        point = self._points().get(name)
        if name in self._built_in:
            if point is not None:
                raise RegistryError(
                    f"{self.kind} '{name}' is built in ({where(self._built_in[name])}), and package "
                    f"'{point.dist.name if point.dist else '?'}' offers {point.value} under the same name. "
                    "Built-ins cannot be shadowed: rename the plug-in's entry point or uninstall the package"
                )
            return self._built_in[name]
        if name in self._files:
            return self._files[name][0]
        if point is None:
            raise RegistryError(
                f"unknown {self.kind} '{name}'.{suggest(name, self.names())} "
                f"Known: {', '.join(self.names())}. See: {self.listing}"
            )
        package = point.dist.name if point.dist else "?"
        try:
            cls = point.load()
        except Exception as error:
            raise RegistryError(
                f"{self.kind} '{name}' of package '{package}' ({point.value}) does not load: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not (inspect.isclass(cls) and dataclasses.is_dataclass(cls)):
            raise RegistryError(f"{self.kind} '{name}' of package '{package}' ({point.value}) is no dataclass")
        return typing.cast("type[T]", cls)

    def build(self, spec: str | Mapping[str, Any]) -> T:
        """An instance from a name or from `{"name": ..., option: value, ...}`, nested registries included.

        Raises:
            RegistryError: unknown name or option (with a suggestion), or a value of the wrong type or out of range.
        """
        options = {"name": spec} if isinstance(spec, str) else dict(spec)
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise RegistryError(f"{self.kind} needs a name, got {spec!r}. See: {self.listing}")
        cls = self.get(name)
        known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        hints = typing.get_type_hints(cls)
        values = {}
        for key, value in options.items():
            if key not in known:
                allowed = ", ".join(known) or "none"
                raise RegistryError(
                    f"unknown option '{key}' of {self.kind} '{name}'.{suggest(key, known)} "
                    f"Options: {allowed}. See: {self.listing} {name}"
                )
            nested = known[key].metadata.get("registry")
            if nested is not None:
                values[key] = value if value is None else nested().build(value)
            else:
                values[key] = _checked(value, hints[key], f"option '{key}' of {self.kind} '{name}'")
        try:
            return cls(**values)
        except RegistryError:
            raise
        except ValueError as error:
            raise RegistryError(f"{self.kind} '{name}': {error}") from error

    def describe(self, instance: T, name: str) -> dict[str, Any]:
        """The spec that `build` turns back into `instance`: every option with its value, nested ones included."""
        spec: dict[str, Any] = {"name": name}
        for f in dataclasses.fields(instance):  # type: ignore[arg-type]
            value = getattr(instance, f.name)
            nested = f.metadata.get("registry")
            if nested is not None and value is not None:
                registry = nested()
                value = registry.describe(value, registry.name_of(value))
            spec[f.name] = value
        return spec

    def name_of(self, instance: T) -> str:
        """The name under which the class of `instance` is registered."""
        cls = type(instance)
        for name in self._built_in.keys() | self._files.keys():
            if self.get(name) is cls:
                return name
        target = f"{cls.__module__}:{cls.__qualname__}"
        for name, point in self._points().items():
            if point.value == target:
                return name
        raise RegistryError(f"{cls.__qualname__} is not registered as a {self.kind}")


def where(cls: type) -> str:
    """`file:line` of a class, for error messages and `tropd strategies NAME`."""
    try:
        return f"{inspect.getsourcefile(cls)}:{inspect.getsourcelines(cls)[1]}"
    except (OSError, TypeError):
        return f"{cls.__module__}.{cls.__qualname__}"


def suggest(name: str, allowed: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for a close match among `allowed`, otherwise an empty string."""
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def _checked(value: Any, hint: Any, what: str) -> Any:
    """`value` if it fits the annotation (an int passes for a float), otherwise RegistryError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
        allowed = ", ".join(str(a) for a in args)
        raise RegistryError(f"{what} is {value!r}; allowed: {allowed}.{suggest(str(value), map(str, args))}")
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _checked(value, next(a for a in args if a is not type(None)), what)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise RegistryError(f"{what} is {value!r}; it must be {'a number' if hint is float else f'of type {hint}'}")
