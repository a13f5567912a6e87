"""docs/extending.md is run as it stands: its file is loaded as a plug-in and keeps the contract."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from strategies import STRATEGIES
from strategies.registry import Registry
from strategies.testing import check_contract, expected_gradient

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()


@pytest.fixture
def example(tmp_path: Path) -> Path:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    path = tmp_path / "square.py"
    path.write_text(blocks[0])
    return path


def test_the_example_is_about_twenty_lines_and_works(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(STRATEGIES, "_classes", dict(STRATEGIES._classes))
    monkeypatch.setattr(Registry, "_files", {})
    code = [line for line in example.read_text().splitlines() if line.strip()]
    assert len(code) <= 25
    STRATEGIES.load_file(example)
    check_contract(STRATEGIES.build({"name": "square", "power": 1.0}))
    student, teacher = torch.randn(2, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    soft = STRATEGIES.build({"name": "trust-region", "region_rule": "soft", "outlier": "mask"})
    expected = expected_gradient(soft, student, teacher)
    torch.testing.assert_close(
        expected_gradient(STRATEGIES.build({"name": "square", "power": 1}), student, teacher), expected
    )


def test_the_example_as_an_installed_package(example: Path, tmp_path: Path) -> None:
    """A folder with package metadata is what pip leaves behind; a fresh process finds the entry point in it."""
    source = example.read_text().replace('@STRATEGIES.register("square")\n', "")
    (tmp_path / "site" / "my_package").mkdir(parents=True)
    (tmp_path / "site" / "my_package" / "square.py").write_text(source)
    (tmp_path / "site" / "my_package" / "__init__.py").touch()
    metadata = tmp_path / "site" / "my_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[tropd.strategies]\nsquare = my_package.square:Square\nopd = my_package.square:Square\n"
        "sad = my_package.missing:Sad\n"
    )
    code = """
import sys
from strategies import STRATEGIES, catalog
from strategies.registry import RegistryError
rows = [(r.name, r.package, r.clash) for r in catalog.describe_all() if r.package != "tropd"]
print(rows, "my_package" in sys.modules)
for name in ("opd", "sad"):
    try:
        STRATEGIES.build(name)
    except RegistryError as error:
        print(error)
print(STRATEGIES.describe(STRATEGIES.build({"name": "square", "power": 3})), catalog.describe("square").row.package)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    listing, clash, broken, described = done.stdout.splitlines()
    assert listing == (
        "[('opd', 'my-package', True), ('sad', 'my-package', False), ('square', 'my-package', False)] False"
    )
    assert "'opd' is built in" in clash and "package 'my-package' offers my_package.square:Square" in clash
    assert "'sad' of package 'my-package'" in broken and "ModuleNotFoundError" in broken
    assert described == "{'name': 'square', 'power': 3.0} my-package"


@pytest.mark.parametrize("page", ["method.md", "extending.md"])
def test_links_and_names_in_the_pages_exist(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for name in ("method.md", "extending.md")
        for line in (ROOT / "docs" / name).read_text().splitlines()
        if line.startswith("#")
    }
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        if not target.startswith("http"):
            assert not path or (ROOT / "docs" / path).exists(), target
            assert not anchor or anchor in headings, target
    for module, function in re.findall(r"`(functional|returns)\.((?!py`)\w+)`", text):
        assert hasattr(__import__(f"strategies.{module}", fromlist=[function]), function), function
    if page == "method.md":
        assert all(f"`{name}`" in text for name in STRATEGIES.names())
