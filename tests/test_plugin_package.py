"""A strategy in a package of its own: built and installed by pip, found by `tropd`, trained with, checked, refused."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from .test_distill import arguments, invoke, lasting, metrics

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()

PROJECT = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "my-package"
version = "1.0"

[tool.setuptools]
packages = ["my_package"]

"""
#: Names that must be refused, and an estimator; the strategy's own line comes from the page.
MORE_ENTRY_POINTS = """\
opd = "my_package.square:Square"
missing = "my_package.no_such_module:Square"
raising = "my_package.raising:Square"

[project.entry-points."tropd.outliers"]
half = "my_package.half:Half"
"""
ESTIMATOR = '''\
from dataclasses import dataclass

from strategies import Credit, Needs, Signals
from strategies.functional import k1_reward


@dataclass(frozen=True)
class Half:
    """Half of the reward, never below a floor."""

    floor: float = -1.0

    @property
    def needs(self) -> Needs:
        return Needs(teacher_logprob=True)

    def estimate(self, signals: Signals) -> Credit:
        reward = k1_reward(signals.student_logprob, signals.teacher_logprob)
        return Credit(sampled=0.5 * reward.clamp_min(self.floor))
'''
#: One process for every question, because importing torch takes longer than the answers.
DRIVER = """
import json, sys
from typer.testing import CliRunner
from strategies import OUTLIERS, STRATEGIES
from strategies.testing import check_contract
from tropd_cli.main import app

answers = {}
for name, arguments in json.load(sys.stdin).items():
    result = CliRunner().invoke(app, arguments)
    imported = sorted(module for module in sys.modules if module.startswith("my_package"))
    answers[name] = [result.exit_code, result.stdout, result.stderr, imported]
for power in (0.0, 2.0):
    check_contract(STRATEGIES.build({"name": "square", "power": power}))
check_contract(STRATEGIES.build({"name": "trust-region", "outlier": "half"}))
print(json.dumps(answers))
"""

needs_pip = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("pip", "setuptools"))), reason="pip and setuptools build the package"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which pip has installed the page's package, with no other package and no network."""
    root = tmp_path_factory.mktemp("plugin")
    strategy = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0].replace('@STRATEGIES.register("square")\n', "")
    (entry_points,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    source = root / "source" / "my_package"
    source.mkdir(parents=True)
    (source / "__init__.py").touch()
    (source / "square.py").write_text(strategy)
    (source / "half.py").write_text(ESTIMATOR)
    (source / "raising.py").write_text("raise RuntimeError('out of order')\n")
    (root / "source" / "pyproject.toml").write_text(PROJECT + entry_points + MORE_ENTRY_POINTS)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(root / "site")]
    subprocess.run([*command, *offline, str(root / "source")], check=True, capture_output=True, text=True)
    return root / "site"


def ask(site: Path, questions: dict[str, list[str]], folder: Path) -> dict[str, tuple[int, str, str, list[str]]]:
    """Exit code, stdout, stderr and imported modules of the package after each command, in one fresh process."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(questions),
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name: tuple(answer) for name, answer in json.loads(done.stdout.splitlines()[-1]).items()}


def small_run(pair: dict[str, Path], output: Path, strategy: Any) -> list[str]:
    """`tropd distill` for two steps with a strategy written as YAML."""
    arguments_ = arguments(pair, output, steps=2, strategy=strategy, guidance__enabled=False)
    unwanted = next(i for i, argument in enumerate(arguments_) if argument.startswith("strategy.outlier.top_k"))
    return arguments_[: unwanted - 1] + arguments_[unwanted + 1 :]


@needs_pip
def test_an_installed_package_trains_and_is_refused_where_it_must_be(
    site: Path, tiny_pair: dict[str, Path], tmp_path: Path
) -> None:
    half = {"name": "trust-region", "outlier": {"name": "half", "floor": -2.0}}
    answers = ask(
        site,
        {
            "list": ["strategies", "--json"],
            "opd": small_run(tiny_pair, tmp_path / "opd", {"name": "opd"}),
            "missing": small_run(tiny_pair, tmp_path / "missing", {"name": "missing"}),
            "raising": ["strategies", "raising"],
            "mistyped": small_run(tiny_pair, tmp_path / "mistyped", {"name": "square", "powr": 1}),
            "zero": small_run(tiny_pair, tmp_path / "zero", {"name": "square", "power": 0}),
            "two": small_run(tiny_pair, tmp_path / "two", {"name": "square"}),
            "half": small_run(tiny_pair, tmp_path / "half", half),
            "show": ["strategies", "square", "--json"],
        },
        tmp_path,
    )
    invoke(*small_run(tiny_pair, tmp_path / "reference", {"name": "opd"}))

    code, stdout, _, imported = answers["list"]
    theirs = {(r["kind"], r["name"], r["clash"]) for r in json.loads(stdout) if r["package"] == "my-package"}
    assert code == 0 and imported == []
    assert theirs == {
        ("strategy", "square", False),
        ("strategy", "opd", True),
        ("strategy", "missing", False),
        ("strategy", "raising", False),
        ("outlier estimator", "half", False),
    }

    for name, says in {
        "opd": ("'opd' is built in", "opd.py", "package 'my-package' offers my_package.square:Square"),
        "missing": ("'missing' of package 'my-package'", "ModuleNotFoundError", "no_such_module"),
        "raising": ("'raising' of package 'my-package'", "RuntimeError: out of order"),
        "mistyped": ("unknown option 'powr' of strategy 'square'. Did you mean 'power'?",),
    }.items():
        code, stdout, stderr, _ = answers[name]
        assert code == 1 and stdout == "" and stderr.count("error:") == 1 and "Traceback" not in stderr
        assert all(text in stderr for text in says), stderr
        assert not (tmp_path / name).exists()

    for name in ("zero", "two", "half"):
        assert answers[name][0] == 0, answers[name][2]
        assert answers[name][1].strip() == str(tmp_path / name)
    assert yaml.safe_load((tmp_path / "two" / "config.yaml").read_text())["strategy"] == {
        "name": "square",
        "power": 2.0,
    }
    assert yaml.safe_load((tmp_path / "half" / "config.yaml").read_text())["strategy"]["outlier"] == half["outlier"]
    runs = {name: lasting(metrics(tmp_path / name)) for name in ("reference", "zero", "two", "half")}
    assert [row["step"] for row in runs["zero"]] == [0, 1, 2]
    assert runs["zero"] == runs["reference"]  # power 0 is `opd`, as its docstring says
    assert runs["two"][1]["grad_norm"] != runs["reference"][1]["grad_norm"] != runs["half"][1]["grad_norm"]

    shown = json.loads(answers["show"][1])
    assert shown["package"] == "my-package" and shown["location"].startswith(str(site / "my_package" / "square.py"))
