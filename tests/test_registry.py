"""Names, options, plug-ins from packages and files, and the catalogue that `tropd strategies` prints."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import yaml

from strategies import OUTLIERS, STRATEGIES, Credit, Needs, Signals, catalog, registry
from strategies.outliers import Clip, ForwardKL
from strategies.registry import Registry, RegistryError
from strategies.trust_region import TrustRegion

NAMES = ("aopd entropy eopd exopd fkl gkd iw-opd jsd opd opd-plus reopold top-d trust-region trust-region-aopd").split()


@dataclass(frozen=True)
class Mine:
    """Halves the reward.

    Options:
        factor: of the reward.
    """

    scope: ClassVar[str] = "token"
    ratio_clip: ClassVar[None] = None
    paper: ClassVar[str] = "none"

    factor: float = 0.5
    times: int = 1
    loud: bool = False
    mode: Literal["a", "b"] = "a"
    limit: float | None = None

    @property
    def needs(self) -> Needs:
        return Needs(teacher_logprob=True)

    def credit(self, signals: Signals) -> Credit:
        return Credit(sampled=self.factor * (signals.teacher_logprob - signals.student_logprob))


@dataclass(frozen=True)
class Lacking:
    needs: ClassVar[Needs] = Needs()


class Distribution:
    def __init__(self, name: str) -> None:
        self.name = name


class Point(EntryPoint):
    """An entry point of a package that is not installed."""

    def __init__(self, name: str, value: str, group: str, package: str) -> None:
        super().__init__(name, value, group)
        vars(self).update(dist=Distribution(package))


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """offer(name, "module:Class", package): as if a package with that entry point were installed."""
    offered: list[Point] = []

    def add(name: str, value: str, package: str = "third-party", group: str = "tropd.strategies") -> None:
        offered.append(Point(name, value, group, package))

    monkeypatch.setattr(registry, "entry_points", lambda *, group: [p for p in offered if p.group == group])
    yield add


@pytest.fixture
def plugin_module(monkeypatch: pytest.MonkeyPatch) -> str:
    module = types.ModuleType("a_plugin")
    module.Mine, module.Lacking, module.number = Mine, Lacking, 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_plugin", module)
    return "a_plugin"


@pytest.fixture(autouse=True)
def forget_files() -> Iterator[None]:
    before = [(r, dict(r._classes)) for r in Registry._all]
    files = dict(Registry._files)
    yield
    for known, classes in before:
        known._classes = classes
    Registry._files.clear()
    Registry._files.update(files)


# ── names and options ───────────────────────────────────────────────────────────────────────────────────────────────


def test_built_in_names() -> None:
    assert [entry.name for entry in STRATEGIES.entries() if entry.built_in] == NAMES
    assert [entry.name for entry in OUTLIERS.entries() if entry.built_in] == ["clip", "forward-kl", "mask"]


def test_the_program_s_own_registries_count_as_built_in() -> None:
    from tropd_cli.verifiers import VERIFIERS

    assert VERIFIERS.entries() and all(entry.built_in and entry.package == "tropd" for entry in VERIFIERS.entries())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("trust-regoin", r"unknown strategy 'trust-regoin'\. Did you mean 'trust-region'\? Known: .*See: tropd strat"),
        ("zzzz", r"unknown strategy 'zzzz'\. Known: aopd, "),
        ({}, r"strategy needs a name, got \{\}"),
        ({"name": 3}, r"strategy needs a name"),
        ({"name": "opd", "k": 3}, r"unknown option 'k' of strategy 'opd'\. Options: none\. See: tropd strategies opd"),
        ({"name": "fkl", "topk": 3}, r"unknown option 'topk' of strategy 'fkl'\. Did you mean 'top_k'\?"),
        ({"name": "fkl", "top_k": 0}, r"strategy 'fkl': top_k must be at least 1, got 0"),
        ({"name": "fkl", "top_k": 1.5}, r"option 'top_k' of strategy 'fkl' is 1\.5; it must be a whole number"),
        ({"name": "fkl", "top_k": True}, r"must be a whole number"),
        ({"name": "fkl", "tail": 1}, r"must be true or false"),
        ({"name": "fkl", "tail": True, "renormalize": "both"}, r"tail: true and renormalize: both exclude each other"),
        ({"name": "fkl", "renormalize": "teachr"}, r"allowed: none, teacher, both\. Did you mean 'teacher'\?"),
        ({"name": "trust-region", "outlier": "forwardkl"}, r"unknown outlier estimator .*Did you mean 'forward-kl'\?"),
        ({"name": "trust-region", "outlier": {"name": "clip", "floor": 0.0}}, r"floor must be below 0 nats, got 0"),
        ({"name": "trust-region", "threshold": "low"}, r"it must be a number"),
        ({"name": "trust-region", "threshold": float("nan")}, r"threshold must be below 0 nats, got nan"),
        ({"name": "reopold", "stages": 3}, r"allowed: 1, 2"),
        ({"name": "reopold", "stages": True}, r"allowed: 1, 2"),
        ({"name": "reopold", "switch_at": 2}, r"switch_at must be between 0 and 1, got 2"),
        ({"name": "entropy", "share": 0}, r"share must be above 0 and at most 1, got 0"),
        ({"name": "jsd", "mix": 1}, r"mix must be between 0 and 1, both excluded, got 1"),
        ({"name": "gkd", "mix": -0.1}, r"mix must be between 0 and 1, got -0\.1"),
        ({"name": "opd-plus", "divergence": "jds"}, r"Did you mean 'jsd'\?"),
        ({"name": "aopd", "margin": 1.5}, r"margin must be between -1 and 1"),
        ({"name": "iw-opd", "strength": -1}, r"strength must be at least 0"),
        ({"name": "eopd", "entropy_threshold": -1.0}, r"entropy_threshold must be at least 0"),
        ({"name": "trust-region-aopd", "positive_weight": -1}, r"positive_weight must be at least 0"),
    ],
    ids=str,
)
def test_mistakes_are_answered(spec: Any, message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        STRATEGIES.build(spec)


@pytest.mark.parametrize("name", NAMES)
def test_defaults_survive_yaml(name: str) -> None:
    instance = STRATEGIES.build(name)
    spec = yaml.safe_load(yaml.safe_dump(STRATEGIES.describe(instance)))
    assert spec["name"] == name
    assert STRATEGIES.build(spec) == instance


@pytest.mark.parametrize(
    "instance",
    [
        TrustRegion(region_rule="soft", threshold=-0.1 - 0.2, outlier=Clip(floor=-1e-17)),
        TrustRegion(outlier=ForwardKL(top_k=3, tail=True)),
        STRATEGIES.build({"name": "reopold", "stages": 2, "switch_at": 1 / 3}),
        STRATEGIES.build({"name": "opd-plus", "divergence": "hellinger", "mix": 0.1}),
        STRATEGIES.build({"name": "fkl", "renormalize": "both", "as_reward": True}),
    ],
    ids=str,
)
def test_options_survive_yaml(instance: Any) -> None:
    assert STRATEGIES.build(yaml.safe_load(yaml.safe_dump(STRATEGIES.describe(instance)))) == instance


def test_no_option_bears_a_greek_name() -> None:
    for known in (STRATEGIES, OUTLIERS):
        for name in known.names():
            options = {f.name for f in dataclasses.fields(known.get(name))}  # type: ignore[arg-type]
            assert not options & {"tau", "beta", "lambda", "lambda_", "alpha", "gamma", "epsilon"}


# ── packages ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_package_is_listed_without_being_imported(offer: Any) -> None:
    offer("mine", "no_such_module:Mine")
    assert "mine" in STRATEGIES.names()
    row = next(row for row in catalog.describe_all() if row.name == "mine")
    assert (row.package, row.entry_point, row.summary, row.needs) == ("third-party", "no_such_module:Mine", None, None)
    assert "no_such_module" not in sys.modules


def test_a_package_is_loaded_when_asked_for(offer: Any, plugin_module: str) -> None:
    offer("mine", f"{plugin_module}:Mine")
    instance = STRATEGIES.build({"name": "mine", "factor": 2, "limit": 3, "mode": "b", "loud": True})
    assert instance == Mine(factor=2.0, limit=3.0, mode="b", loud=True)
    assert STRATEGIES.describe(instance)["name"] == "mine"
    assert STRATEGIES.build({"name": "mine", "limit": None}) == Mine()
    details = catalog.describe("mine")
    assert details.row.package == "third-party" and details.row.summary == "Halves the reward."
    assert details.location.startswith(__file__)
    options = {option.name: (option.type, option.default, option.values) for option in details.options}
    assert options["factor"] == ("float", 0.5, None) and options["mode"] == ("choice", "a", ["a", "b"])
    with pytest.raises(RegistryError, match=r"unknown option 'facto' of strategy 'mine'\. Did you mean 'factor'\?"):
        STRATEGIES.build({"name": "mine", "facto": 2})


def test_a_broken_package_fails_only_when_asked_for(offer: Any, plugin_module: str) -> None:
    offer("broken", "no_such_module:Mine", "sad-package")
    offer("attribute", f"{plugin_module}:Missing", "sad-package")
    offer("number", f"{plugin_module}:number", "sad-package")
    offer("lacking", f"{plugin_module}:Lacking", "sad-package")
    assert STRATEGIES.build("opd") == STRATEGIES.get("opd")()
    with pytest.raises(
        RegistryError, match=r"'broken' of package 'sad-package' \(no_such_module:Mine\) does not load: M"
    ):
        STRATEGIES.get("broken")
    with pytest.raises(RegistryError, match=r"'sad-package' .* does not load: AttributeError"):
        STRATEGIES.get("attribute")
    with pytest.raises(RegistryError, match=r"'sad-package' .* is no dataclass"):
        STRATEGIES.get("number")
    with pytest.raises(RegistryError, match=r"strategy 'lacking' in .* lacks scope, ratio_clip, credit"):
        STRATEGIES.build("lacking")


def test_a_built_in_cannot_be_shadowed(offer: Any, plugin_module: str) -> None:
    offer("opd", f"{plugin_module}:Mine", "shady")
    with pytest.raises(
        RegistryError, match=r"'opd' is built in \(.*opd\.py:\d+\), and package 'shady' offers a_plugin:M"
    ):
        STRATEGIES.build("opd")
    clashes = [(entry.name, entry.package) for entry in STRATEGIES.entries() if entry.clash]
    assert clashes == [("opd", "shady")]
    assert STRATEGIES.build("fkl") is not None


def test_two_packages_with_one_name_are_refused(offer: Any, plugin_module: str) -> None:
    offer("mine", f"{plugin_module}:Mine", "one")
    offer("mine", "elsewhere:Mine", "two")
    with pytest.raises(
        RegistryError, match=r"offered twice: a_plugin:Mine of package 'one' and elsewhere:Mine of packa"
    ):
        STRATEGIES.get("mine")
    assert [entry.clash for entry in STRATEGIES.entries() if entry.name == "mine"] == [True, True]


def test_estimators_have_their_own_group(offer: Any) -> None:
    offer("soften", "no_such_module:Soften", "third-party", "tropd.outliers")
    assert "soften" in OUTLIERS.names() and "soften" not in STRATEGIES.names()
    with pytest.raises(RegistryError, match="outlier estimator 'soften' of package 'third-party'"):
        STRATEGIES.build({"name": "trust-region", "outlier": "soften"})


# ── files ───────────────────────────────────────────────────────────────────────────────────────────────────────────

PLUGIN = '''
from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from strategies import OUTLIERS, STRATEGIES, Credit, Needs, OutlierEstimator, Signals


@OUTLIERS.register("half")
@dataclass(frozen=True)
class Half:
    """Half the reward."""

    factor: float = 0.5

    @property
    def needs(self) -> Needs:
        return Needs(teacher_logprob=True)

    def estimate(self, signals: Signals) -> Credit:
        return Credit(sampled=self.factor * (signals.teacher_logprob - signals.student_logprob))


@STRATEGIES.register("only-outliers")
@dataclass(frozen=True)
class OnlyOutliers:
    """An estimator everywhere."""

    scope: ClassVar[str] = "token"
    ratio_clip: ClassVar[tuple[float, float] | None] = None
    outlier: OutlierEstimator = field(default_factory=Half, metadata={"registry": lambda: OUTLIERS})

    @property
    def needs(self) -> Needs:
        return self.outlier.needs

    def credit(self, signals: Signals) -> Credit:
        return self.outlier.estimate(signals)
'''


def test_a_file_may_register_strategies_and_estimators(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN)
    STRATEGIES.load_file(path)
    STRATEGIES.load_file(path)  # once is enough
    made = STRATEGIES.build({"name": "only-outliers", "outlier": {"name": "half", "factor": 0.25}})
    spec = {"name": "only-outliers", "outlier": {"name": "half", "factor": 0.25}}
    assert STRATEGIES.describe(made) == spec and STRATEGIES.build(spec) == made
    assert {(e.name, e.package, e.target) for e in STRATEGIES.entries() if not e.built_in} == {
        ("only-outliers", "file", str(path))
    }
    assert not next(e for e in OUTLIERS.entries() if e.name == "half").built_in
    row = next(row for row in catalog.describe_all() if row.name == "only-outliers")
    assert (row.package, row.summary, row.memory) == ("file", "An estimator everywhere.", "O(n)")
    from strategies.testing import check_contract

    check_contract(made)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("1 / 0", r"mine\.py' failed: ZeroDivisionError: division by zero"),
        ("import no_such_module", r"mine\.py' failed: ModuleNotFoundError"),
        ("def", r"mine\.py' failed: SyntaxError"),
        (PLUGIN.replace('"only-outliers"', '"opd"'), r"'opd' in .*mine\.py:\d+ clashes with the one in .*opd\.py:\d+"),
        (PLUGIN.replace("@dataclass(frozen=True)", ""), r"'half': Half must be a \(frozen\) dataclass"),
        (PLUGIN + "\nraise ValueError('late')", r"failed: ValueError: late"),
    ],
    ids=["error", "import", "syntax", "clash", "no dataclass", "late"],
)
def test_a_broken_file_leaves_nothing_behind(tmp_path: Path, source: str, message: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(source)
    with pytest.raises(RegistryError, match=message):
        STRATEGIES.load_file(path)
    assert "half" not in OUTLIERS.names() and "only-outliers" not in STRATEGIES.names()
    path.write_text(PLUGIN)
    STRATEGIES.load_file(path)  # mended
    assert "half" in OUTLIERS.names()


def test_a_file_must_be_there_and_be_python(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"plug-in file '.*nowhere\.py' does not exist"):
        STRATEGIES.load_file(tmp_path / "nowhere.py")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(RegistryError, match=r"its name must end in \.py"):
        STRATEGIES.load_file(tmp_path / "notes.txt")


# ── the catalogue ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_catalogue_of_built_ins() -> None:
    rows = {row.name: row for row in catalog.describe_all() if row.kind == "strategy"}
    assert list(rows) == NAMES
    assert all(row.summary and row.summary.endswith(".") and row.paper and row.scope for row in rows.values())
    assert {name for name, row in rows.items() if row.scope == "batch"} == {"entropy", "iw-opd", "top-d"}
    assert [rows[name].memory for name in ("opd", "trust-region", "gkd")] == ["O(n)", "O(nk)", "O(chunk x V)"]
    assert rows["eopd"].needs == ["teacher_logprob", "teacher_entropy", "teacher_top_k=16"]
    assert [row.name for row in catalog.describe_all() if row.kind != "strategy"] == ["clip", "forward-kl", "mask"]


@pytest.mark.parametrize("name", [*NAMES, "clip", "forward-kl", "mask"])
def test_details_are_complete(name: str) -> None:
    details = catalog.describe(name)
    json.dumps(dataclasses.asdict(details))
    file, _, line = details.location.rpartition(":")
    assert f'"{name}"' in "".join(Path(file).read_text().splitlines()[int(line) - 2 : int(line) + 1])
    for option in details.options:
        assert f"    {option.name}: " in details.documentation or "others are those of" in details.documentation
        assert option.default is not None
    assert "Source: " in details.documentation or name == "trust-region"


def test_nested_estimator_is_shown_with_its_options() -> None:
    outlier = next(option for option in catalog.describe("trust-region").options if option.name == "outlier")
    assert outlier.default == {"name": "forward-kl", "top_k": 64, "tail": False, "renormalize": "none"}
    assert outlier.values == ["clip", "forward-kl", "mask"]


def test_a_plug_in_whose_option_has_no_default_is_still_listed() -> None:
    @STRATEGIES.register("demanding")
    @dataclass(frozen=True)
    class Demanding(Mine):
        """Wants to be asked."""

        must: int = field(kw_only=True)

    row = next(row for row in catalog.describe_all() if row.name == "demanding")
    assert (row.summary, row.package, row.needs) == ("Wants to be asked.", "python", None)
    with pytest.raises(RegistryError, match=r"strategy 'demanding': .*missing 1 required"):
        STRATEGIES.build("demanding")
