"""THE METHOD: which token gets how much credit, as pure tensor mathematics. Imports torch, never the program.

Read `types` first, then `trust_region`. Every module below registers one strategy.
"""

from . import (  # noqa: F401  importing a module registers its strategy
    aopd,
    entropy,
    eopd,
    exopd,
    fkl,
    gkd,
    iw_opd,
    jsd,
    opd,
    opd_plus,
    reopold,
    top_d,
    trust_region,
    trust_region_aopd,
)
from .base import STRATEGIES
from .outliers import OUTLIERS
from .types import Credit, MissingSignal, Needs, OutlierEstimator, Region, Signals, Strategy

__all__ = [
    "OUTLIERS",
    "STRATEGIES",
    "Credit",
    "MissingSignal",
    "Needs",
    "OutlierEstimator",
    "Region",
    "Signals",
    "Strategy",
]
