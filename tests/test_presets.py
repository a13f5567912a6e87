"""The paper's rows as presets: each builds what its label says, and the transcribed numbers are consistent."""

from __future__ import annotations

import subprocess
import sys

import pytest

from strategies import STRATEGIES
from strategies.opd import OPD
from strategies.outliers import Clip, ForwardKL, Mask
from strategies.trust_region import TrustRegion
from strategies.trust_region_aopd import TrustRegionAOPD
from tropd_cli.config import build_config
from tropd_cli.errors import UserError
from tropd_cli.presets import PRESETS, SETTINGS, get_preset

ROWS = {
    "1, 5": "OPD, FKL, JSD, Entropy OPD 20%, Clip Outlier, Mask Outlier, FKL Outlier, TrOPD Mask, TrOPD Clip, TrOPD (FKL)",
    "3, 6": "OPD, EOPD, Entropy OPD 20%, REOPOLD 2Stage, REOPOLD, AOPD, TrOPD (FKL), TrOPD + AOPD",
    "4": "OPD, EOPD, Entropy OPD 20%, REOPOLD, TrOPD (FKL)",
}


@pytest.mark.parametrize("tables", ROWS)
def test_every_row_of_the_tables_has_a_preset(tables: str) -> None:
    settings = [name for name, setting in SETTINGS.items() if setting.tables == tables]
    rows = {preset.row for preset in PRESETS.values() for setting in settings if setting in preset.results}
    assert rows == set(ROWS[tables].split(", "))
    assert len({preset.row for preset in PRESETS.values()}) == len(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_valid_configuration(name: str) -> None:
    config = build_config(get_preset(name).config)
    strategy = STRATEGIES.build(config.strategy)
    assert config.guidance.enabled is name.startswith("tropd")
    assert STRATEGIES.build(STRATEGIES.describe(strategy)) == strategy


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("opd", OPD()),
        ("tropd", TrustRegion()),
        ("fkl-outlier", TrustRegion(outlier=ForwardKL(top_k=64))),
        ("tropd-mask", TrustRegion(outlier=Mask())),
        ("tropd-clip", TrustRegion(outlier=Clip())),
        ("mask-outlier", TrustRegion(region_rule="threshold", outlier=Mask())),
        ("clip-outlier", TrustRegion(region_rule="threshold", outlier=Clip())),
        ("tropd-aopd", TrustRegionAOPD()),
    ],
)
def test_what_the_labels_mean(name: str, expected: object) -> None:
    assert STRATEGIES.build(get_preset(name).strategy) == expected


def test_printed_averages_are_the_means_of_the_columns() -> None:
    """A slip in transcribing a digit would show here."""
    for name, setting in SETTINGS.items():
        rows = {preset.name: preset.scores(name) for preset in PRESETS.values() if name in preset.results}
        for label, scores in (("before", setting.before), ("teacher", setting.teacher_scores)):
            if scores:
                rows[label] = dict(zip((*setting.columns, "average"), scores, strict=True))
        for label, row in rows.items():
            *columns, average = row.values()
            assert sum(columns) / len(columns) == pytest.approx(average, abs=0.012), f"{name}: {label}"


def test_unknown_preset() -> None:
    with pytest.raises(
        UserError, match=r"unknown preset 'tropd-max'\. Did you mean 'tropd-mask'\? See: tropd strategie"
    ):
        get_preset("tropd-max")


def test_presets_are_listed_without_torch() -> None:
    code = "import sys, tropd_cli.presets; print('torch' in sys.modules, 'strategies' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
