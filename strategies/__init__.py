"""THE METHOD: which token gets how much credit, as pure tensor mathematics. Imports torch, never the program.

Read `types` first, then `trust_region`. Every module below registers one strategy.
"""

from . import opd, trust_region
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
    "opd",
    "trust_region",
]
