"""Registries: name -> class. Decorator for built-ins, entry points and files for plug-ins; listing imports nothing."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

T = TypeVar("T")

OWN_PACKAGES = ("strategies", "tropd_cli")  #: what they register is built in


class RegistryError(ValueError):
    """An unknown name, option or value, a clash, or a plug-in that does not load. The message is for the user."""


@dataclass(frozen=True)
class Entry:
    """One registered name, without importing a plug-in.

    package: "tropd", a distribution's name, "file" or "python". target: `module:Class` or a file path. clash: refused
    when asked for, because the name is taken or two packages offer it. cls: the class, if it is in memory anyway.
    """

    name: str
    package: str
    target: str
    built_in: bool
    clash: bool = False
    cls: type | None = None


@dataclass(frozen=True)
class _Registered(Generic[T]):
    cls: type[T]
    file: Path | None  #: of a `--plugin` file

    @property
    def built_in(self) -> bool:
        return self.file is None and self.cls.__module__.partition(".")[0] in OWN_PACKAGES


class Registry(Generic[T]):
    """Name -> class of one kind of plug-in.

    Args:
        kind: what the names stand for, singular, as errors print it ("strategy").
        group: entry-point group that third-party packages use ("tropd.strategies").
        listing: the command that lists the names.
        attributes: what an instance must have besides its options.
    """

    _all: ClassVar[list[Registry[Any]]] = []
    _files: ClassVar[dict[Path, None]] = {}
    _loading: ClassVar[Path | None] = None

    def __init__(self, kind: str, group: str, listing: str, attributes: tuple[str, ...] = ()) -> None:
        self.kind, self.group, self.listing, self.attributes = kind, group, listing, attributes
        self._classes: dict[str, _Registered[T]] = {}
        Registry._all.append(self)

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator. Raises RegistryError when the name is taken."""

        def add(cls: type[T]) -> type[T]:
            if not dataclasses.is_dataclass(cls):
                raise RegistryError(f"{self.kind} '{name}': {cls.__name__} must be a (frozen) dataclass")
            taken = self._classes.get(name)
            if taken is not None:
                raise RegistryError(
                    f"{self.kind} '{name}' in {where(cls)} clashes with the one in {where(taken.cls)}: "
                    "choose another name"
                )
            self._classes[name] = _Registered(cls, Registry._loading)
            return cls

        return add

    @staticmethod
    def load_file(path: Path) -> None:
        """Runs a Python file, once, whose `@register` decorators add names to this registry or any other.

        Raises:
            RegistryError: no such file, no Python file, or it fails; then none of its names is kept.
        """
        path = path.resolve()
        if path in Registry._files:
            return
        if not path.is_file():
            raise RegistryError(f"plug-in file '{path}' does not exist")
        module_name = f"tropd_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
        spec = importlib.util.spec_from_file_location(module_name, path)
        if spec is None or spec.loader is None:
            raise RegistryError(f"plug-in file '{path}' is no Python file: its name must end in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module  # dataclasses look up string annotations there
        Registry._loading = path
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            for registry in Registry._all:
                registry._classes = {n: r for n, r in registry._classes.items() if r.file != path}
            if isinstance(error, RegistryError):
                raise
            raise RegistryError(f"plug-in file '{path}' failed: {type(error).__name__}: {error}") from error
        finally:
            Registry._loading = None
        Registry._files[path] = None

    def _points(self) -> dict[str, list[EntryPoint]]:
        """Entry points by name: what packages offer, not imported."""
        found: dict[str, list[EntryPoint]] = {}
        for point in entry_points(group=self.group):
            same = found.setdefault(point.name, [])
            if all((point.value, _package(point)) != (p.value, _package(p)) for p in same):
                same.append(point)
        return found

    def entries(self) -> list[Entry]:
        """Every name with its origin; built-ins first. Imports no plug-in."""
        rows = []
        for name, known in sorted(self._classes.items(), key=lambda item: (not item[1].built_in, item[0])):
            package = "tropd" if known.built_in else "file" if known.file else "python"
            target = str(known.file) if known.file else f"{known.cls.__module__}:{known.cls.__qualname__}"
            rows.append(Entry(name, package, target, known.built_in, cls=known.cls))
        for name, points in sorted(self._points().items()):
            clash = len(points) > 1 or (name in self._classes and self._clash(name, points[0]) is not None)
            rows += [Entry(name, _package(p), p.value, False, clash) for p in points]
        return rows

    def names(self) -> list[str]:
        """All names, built-ins and plug-ins, sorted. Imports no plug-in."""
        return sorted({entry.name for entry in self.entries()})

    def get(self, name: str) -> type[T]:
        """The class behind a name.

        Raises:
            RegistryError: unknown name (with a suggestion), a plug-in that clashes with a built-in, or one that fails.
        """
        known, points = self._classes.get(name), self._points().get(name, [])
        if len(points) > 1:
            offers = " and ".join(f"{p.value} of package '{_package(p)}'" for p in points)
            raise RegistryError(f"{self.kind} '{name}' is offered twice: {offers}. Uninstall or rename one of them")
        if known is not None:
            clash = self._clash(name, points[0]) if points else None
            if clash is not None:
                raise RegistryError(clash)
            return known.cls
        if not points:
            raise RegistryError(
                f"unknown {self.kind} '{name}'.{suggest(name, self.names())} "
                f"Known: {', '.join(self.names())}. See: {self.listing}"
            )
        return self._load(name, points[0])

    def _clash(self, name: str, point: EntryPoint) -> str | None:
        """The message when a package offers a name that is taken; None when it is the same class."""
        known = self._classes[name]
        if point.value == f"{known.cls.__module__}:{known.cls.__qualname__}":
            return None  # a package that also uses the decorator
        origin = "is built in" if known.built_in else "is registered"
        return (
            f"{self.kind} '{name}' {origin} ({where(known.cls)}), and package '{_package(point)}' offers {point.value} "
            f"under the same name. Nothing can be shadowed: rename one of them or uninstall the package"
        )

    def _load(self, name: str, point: EntryPoint) -> type[T]:
        what = f"{self.kind} '{name}' of package '{_package(point)}' ({point.value})"
        try:
            cls = point.load()
        except Exception as error:
            raise RegistryError(f"{what} does not load: {type(error).__name__}: {error}") from error
        if not (inspect.isclass(cls) and dataclasses.is_dataclass(cls)):
            raise RegistryError(f"{what} is no dataclass")
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
                values[key] = value if value is None else nested().build(_named(value, known[key], nested()))
            else:
                values[key] = _checked(value, hints[key], f"option '{key}' of {self.kind} '{name}'")
        try:
            instance = cls(**values)
        except RegistryError:
            raise
        except (TypeError, ValueError) as error:
            raise RegistryError(f"{self.kind} '{name}': {error}") from error
        missing = [attribute for attribute in self.attributes if not hasattr(instance, attribute)]
        if missing:
            raise RegistryError(f"{self.kind} '{name}' in {where(cls)} lacks {', '.join(missing)}")
        return instance

    def describe(self, instance: T, name: str | None = None) -> dict[str, Any]:
        """The spec that `build` turns back into `instance`: every option with its value, nested ones included."""
        spec: dict[str, Any] = {"name": name or self.name_of(instance)}
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
        for name, known in self._classes.items():
            if known.cls is cls:
                return name
        for name, points in self._points().items():
            module, _, attribute = points[0].value.partition(":")
            if getattr(sys.modules.get(module), attribute.strip(), None) is cls:
                return name
        raise RegistryError(f"{cls.__qualname__} is not registered as a {self.kind}")


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "?"


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


def _named(spec: Any, field: dataclasses.Field[Any], registry: Registry[Any]) -> Any:
    """Options without a name belong to the field's default: `outlier: {top_k: 32}`."""
    if isinstance(spec, Mapping) and "name" not in spec and field.default_factory is not dataclasses.MISSING:
        return {"name": registry.name_of(field.default_factory()), **spec}
    return spec


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
    raise RegistryError(f"{what} is {value!r}; it must be {_wanted(hint)}")


def _wanted(hint: Any) -> str:
    return {float: "a number", int: "a whole number", bool: "true or false", str: "text"}.get(hint, f"of type {hint}")
