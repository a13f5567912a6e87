"""The paper-style figure as PNG: where R lies, where outliers fall in the response, and a run's curves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tropd_cli.errors import UserError

from .inspection import Inspection
from .palette import COLOURS
from .summary import TENTHS, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RANGE = (-10.0, 4.0)  #: nats on R's axis; what lies beyond is counted in the outermost bins
BINS = 56
#: Metric of metrics.jsonl -> title of its panel.
CURVES = {
    "entropy": "student's entropy (nats)",
    "grad_norm": "gradient norm",
    "outlier_share": "outlier share",
    "response_length": "response length (tokens)",
}


def write_png(inspection: Inspection, path: Path, *, dpi: int = 160) -> None:
    """Draws the figure of the first strategy, with a second row of curves for a run.

    Raises:
        UserError: matplotlib is not installed, or the path cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--format png draws with matplotlib. Install it with: pip install 'tropd[plot]'") from error
    curves = [name for name in CURVES if _curve(inspection.metrics, name)]
    figure = Figure(figsize=(9.0, 5.4 if curves else 3.0), layout="constrained")
    FigureCanvasAgg(figure)
    top, *below = figure.subfigures(2 if curves else 1, 1, squeeze=False)[:, 0]
    left, right = top.subplots(1, 2, width_ratios=(3, 2))
    _draw_ratio(left, inspection)
    _draw_position(right, inspection)
    if curves:
        _draw_curves(below[0].subplots(1, len(curves), squeeze=False)[0], inspection.metrics, curves)
    _tidy(figure)
    try:
        figure.savefig(path, dpi=dpi, format="png")
    except OSError as error:
        raise UserError(f"'{path}' cannot be written: {error.strerror}") from error


def _draw_ratio(axes: Axes, inspection: Inspection) -> None:
    """R's histogram by region on a logarithmic scale, with each region's share of the student's tokens."""
    rows = [row for s in inspection.sequences for row in s.rows if row.written_by == "student"]
    low, high = RANGE
    edges = [low + k * (high - low) / BINS for k in range(BINS + 1)]
    for region, width in (("trust", 1.0), ("outlier", 0.55)):
        chosen = [row for row in rows if row.region == region]
        ratios = [min(max(row.log_ratio, low), high) for row in chosen if row.log_ratio is not None]
        share = f"{len(chosen) / len(rows):.1%}" if rows else "none"
        axes.hist(ratios, bins=edges, color=COLOURS[region], rwidth=width, label=f"{region}: {share}", log=bool(ratios))
    axes.axvline(0.0, color="0.3", linewidth=0.8)
    axes.set(xlabel="R = log p − log q of the sampled token (nats)", ylabel="tokens", xlim=RANGE)
    axes.legend(frameon=False, loc="upper left", title="student's tokens")


def _draw_position(axes: Axes, inspection: Inspection) -> None:
    shares = summarise(inspection.sequences)["outlier_share_by_tenth"]
    places = [tenth for tenth in range(TENTHS) if shares[tenth] is not None]
    axes.bar([place + 1 for place in places], [100 * shares[place] for place in places], color=COLOURS["outlier"])
    axes.set(xlabel="tenth of the response", ylabel="outlier share (%)", xticks=range(1, TENTHS + 1))


def _draw_curves(panels: Any, metrics: list[dict[str, Any]], names: list[str]) -> None:
    for axes, name in zip(panels, names, strict=True):
        steps, values = zip(*_curve(metrics, name), strict=True)
        axes.plot(steps, values, color=COLOURS["outlier" if name == "outlier_share" else "trust"], linewidth=1.4)
        axes.set_title(CURVES[name], fontsize=9)
        axes.set_xlabel("step")
        if name == "grad_norm":
            axes.set_yscale("log" if min(values) > 0 else "linear")
        else:
            axes.set_ylim(bottom=0)


def _curve(metrics: list[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) where both are numbers; a single point is no curve."""
    points = [
        (entry["step"], entry[name])
        for entry in metrics
        if all(isinstance(entry.get(key), (int, float)) and math.isfinite(entry[key]) for key in ("step", name))
    ]
    return points if len(points) > 1 else []


def _tidy(figure: Figure) -> None:
    for axes in figure.get_axes():
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", labelsize=8)
