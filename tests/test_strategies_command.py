"""`tropd strategies`: every name with its facts, for people and for programs, without importing what is not asked for."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from strategies import OUTLIERS, STRATEGIES, catalog
from tropd_cli import strategies_command as command
from tropd_cli.main import app
from tropd_cli.presets import PRESETS, SETTINGS


def out(*args: str) -> str:
    result = CliRunner().invoke(app, ["strategies", *args])
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def refused(*args: str) -> str:
    result = CliRunner().invoke(app, ["strategies", *args])
    assert result.exit_code == 1 and result.stdout == "" and result.stderr.startswith("error: ")
    return result.stderr


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that offers a good strategy, a clash, a missing module and an estimator without what it must have."""
    metadata = tmp_path / "their_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[tropd.strategies]\nnewest = their_module:Newest\nopd = their_module:Newest\nsad = their_missing:Sad\n"
        "[tropd.outliers]\nbare = their_module:Bare\n"
    )
    (tmp_path / "their_module.py").write_text(
        "from dataclasses import dataclass\nfrom strategies import Needs\n\n"
        '@dataclass(frozen=True)\nclass Newest:\n    """The newest one.\n\n    Options:\n        sharpness: how sharp,\n'
        '            in nats.\n    """\n\n    scope = "token"\n    ratio_clip = None\n    sharpness: float = 0.5\n\n'
        "    @property\n    def needs(self):\n        return Needs(teacher_logprob=True, teacher_top_k=3)\n\n"
        "    def credit(self, signals):\n        raise NotImplementedError\n\n"
        "@dataclass(frozen=True)\nclass Bare:\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "their_module", raising=False)
    return tmp_path


# ── the list ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_pipe_gets_one_whole_line_per_name() -> None:
    lines = out().splitlines()
    rows = catalog.describe_all()
    for row in rows:
        (line,) = [x for x in lines if x.startswith(f"{row.name} ") and str(row.summary) in x]
        assert all(fact in line for fact in [*(row.needs or []), row.memory, row.scope or "–", row.paper])
    assert len(lines) == len(rows) + 4  # two headings, a blank line after each table
    assert not any("…" in line for line in lines)


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_gets_everything_within_its_width(width: int) -> None:
    for show in (
        lambda console: command.list_rows(console, catalog.describe_all()),
        command.list_presets,
        lambda console: command.show_preset(console, PRESETS["tropd"]),
        lambda console: command.show_details(console, catalog.describe("trust-region")),
    ):
        file = io.StringIO()
        show(Console(file=file, force_terminal=True, width=width, color_system=None))
        text = file.getvalue()
        assert max(map(len, text.splitlines())) <= width
        assert "…" not in text and "strategys" not in text
    file = io.StringIO()
    command.list_rows(Console(file=file, force_terminal=True, width=width, color_system=None), catalog.describe_all())
    words = file.getvalue().split()
    assert {*STRATEGIES.names(), *OUTLIERS.names()} <= set(words)


def test_json_has_every_field() -> None:
    rows = json.loads(out("--json"))
    assert [row["name"] for row in rows if row["kind"] == "strategy"] == STRATEGIES.names()
    by_name = {row["name"]: row for row in rows}
    assert by_name["trust-region"]["needs"] == ["teacher_logprob", "uniform", "teacher_top_k=64"]
    assert by_name["trust-region"]["memory"] == "O(nk)" and by_name["gkd"]["memory"] == "O(chunk x V)"
    assert by_name["top-d"]["scope"] == "batch" and by_name["mask"]["needs"] == []


def test_plug_ins_are_listed_by_package_and_entry_point_and_not_imported(installed: Path) -> None:
    lines = out().splitlines()
    for name, target in (
        ("newest", "their_module:Newest"),
        ("sad", "their_missing:Sad"),
        ("bare", "their_module:Bare"),
    ):
        (line,) = [x for x in lines if x.startswith(f"{name} ")]
        assert f"plug-in of package their-package, entry point {target}" in line
    assert any("entry point their_module:Newest; refused: the name is taken" in x for x in lines)
    rows = [row for row in json.loads(out("--json")) if row["package"] == "their-package"]
    assert {(row["name"], row["clash"], row["summary"]) for row in rows} == {
        ("newest", False, None),
        ("opd", True, None),
        ("sad", False, None),
        ("bare", False, None),
    }
    assert "their_module" not in sys.modules


# ── one name ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [*STRATEGIES.names(), *OUTLIERS.names()])
def test_one_name_shows_its_options_with_defaults_and_its_place(name: str) -> None:
    details = catalog.describe(name)
    text = out(name)
    assert details.documentation.partition("\n")[0] in text and "Options:" not in text
    assert details.location in text and Path(details.location.rpartition(":")[0]).is_file()
    _, meanings = command.split_options(details.documentation)
    assert set(meanings) <= {option.name for option in details.options}  # inherited ones need no second explanation
    for option in details.options:
        assert f"\n{option.name}: {command.default_text(option)}   {command.values_text(option)}\n" in text
        assert meanings.get(option.name, "") in text
    whole = json.loads(out(name, "--json"))
    assert whole["documentation"] == details.documentation and whole["location"] == details.location
    assert [option["default"] for option in whole["options"]] == [option.default for option in details.options]


def test_a_plug_in_is_imported_when_it_is_asked_for(installed: Path) -> None:
    text = out("newest")
    assert "strategy, of their-package" in text and "The newest one." in text
    assert "sharpness: 0.5   float\nhow sharp, in nats.\n" in text
    assert f"{installed / 'their_module.py'}:5" in text or f"{installed / 'their_module.py'}:4" in text


def test_a_file_of_ones_own(tmp_path: Path, installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from strategies.registry import Registry

    monkeypatch.setattr(STRATEGIES, "_classes", dict(STRATEGIES._classes))
    monkeypatch.setattr(Registry, "_files", {})
    code = (installed / "their_module.py").read_text().replace("import Needs", "import STRATEGIES, Needs")
    (tmp_path / "mine.py").write_text(code.replace("@dataclass", '@STRATEGIES.register("mine")\n@dataclass', 1))
    assert "strategy, of file" in out("mine", "--plugin", str(tmp_path / "mine.py"))


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("trust-regoin",), "unknown strategy or outlier estimator 'trust-regoin'. Did you mean 'trust-region'?"),
        (("forward-lk",), "Did you mean 'forward-kl'? See: tropd strategies"),
        (("tropd-mask",), "'tropd-mask' is a preset, not a strategy. See: tropd strategies --presets tropd-mask"),
        (("tropd-max", "--presets"), "unknown preset 'tropd-max'. Did you mean 'tropd-mask'?"),
        (("opd", "--plugin", "no/such.py"), "plug-in file"),
    ],
)
def test_wrong_names(args: tuple[str, ...], says: str) -> None:
    assert says in refused(*args)


def test_trouble_with_plug_ins_names_the_package(installed: Path) -> None:
    clash = refused("opd")
    assert "'opd' is built in" in clash and "package 'their-package' offers their_module:Newest" in clash
    broken = refused("sad")
    assert "'sad' of package 'their-package'" in broken and "ModuleNotFoundError" in broken
    assert "'bare' cannot be shown: AttributeError" in refused("bare")


# ── presets ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_presets_stand_beside_the_printed_averages() -> None:
    lines = out("--presets").splitlines()
    assert lines[0].split() == ["preset", "configuration", *SETTINGS]
    assert len(lines) == 1 + len(PRESETS)
    by_name = {line.split()[0]: line for line in lines[1:]}
    assert by_name["tropd"].endswith("49.85  40.63   37.61  51.73")
    assert "trust-region, region_rule: threshold, outlier: clip  " in by_name["clip-outlier"]
    assert "outlier: (forward-kl, top_k: 64); guidance" in by_name["tropd"]


@pytest.mark.parametrize("name", PRESETS)
def test_one_preset_shows_every_number_and_its_yaml(name: str) -> None:
    preset, text = PRESETS[name], out("--presets", name)
    assert yaml.safe_load(text.splitlines()[1]) == preset.config
    assert all(f"{score:.2f}" in text for scores in preset.results.values() for score in scores)
    as_json: dict[str, Any] = json.loads(out("--presets", name, "--json"))
    assert as_json["config"] == preset.config
    assert {r["setting"]: r["scores"] for r in as_json["results"]} == {s: preset.scores(s) for s in preset.results}
    assert [p["name"] for p in json.loads(out("--presets", "--json"))] == list(PRESETS)
