"""Makes the pictures of docs/inspect.md from a run directory: python docs/images/make.py RUN [TOKEN] (needs Chromium)."""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.chromium import Page, browser
from tropd_cli.inspect_regions import InspectRequest, recorded
from tropd_cli.report.html import render_html
from tropd_cli.report.inspection import Inspection
from tropd_cli.report.terminal import render

HERE = Path(__file__).resolve().parent
COMPARED = ["trust-region", "reopold"]
LIGHT = TerminalTheme(
    (255, 255, 255), (40, 40, 40),
    [(0, 0, 0), (170, 0, 0), (0, 120, 0), (150, 100, 0), (0, 90, 170), (140, 0, 140), (0, 130, 130), (255, 255, 255)],
)  # fmt: skip


def terminal_picture(page: Page, inspection: Inspection, path: Path) -> None:
    """What a terminal of 100 columns shows of three texts, with the summary."""
    console = Console(
        file=io.StringIO(), record=True, width=100, force_terminal=True, color_system="truecolor", highlight=False
    )
    render(inspection, console, most_sequences=3)
    form = (
        '<meta charset="utf-8"><style>{stylesheet} body {{ margin: 14px 18px; width: max-content }} '
        "pre {{ font: 14px/1.35 'DejaVu Sans Mono', monospace; margin: 0; unicode-bidi: bidi-override }}</style><pre>{code}</pre>"
    )
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "terminal.html"
        source.write_text(console.export_html(theme=LIGHT, code_format=form, inline_styles=True), encoding="utf-8")
        page.open(source, width=910, height=100)
        height = page.run("document.body.getBoundingClientRect().height")
        page.open(source, width=910, height=int(height) + 30)
        page.screenshot(path)


def page_picture(page: Page, inspection: Inspection, path: Path, *, hover: str, height: int = 1150) -> None:
    """The HTML page with one token's details open."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "page.html"
        source.write_text(render_html(inspection), encoding="utf-8")
        page.open(source, width=1280, height=height)
        page.settle()
        page.run("document.documentElement.dataset.theme = 'light'")
        page.hover(hover)
        page.run("window.scrollTo(0, 0)")
        page.settle()
        page.screenshot(path)


if __name__ == "__main__":
    run = sys.argv[1]
    own = recorded(InspectRequest(run=run)).inspection()
    both = recorded(InspectRequest(run=run, strategies=COMPARED)).inspection()
    hover = f"[data-i='{sys.argv[2] if len(sys.argv) > 2 else 20}']"
    with browser() as tab:
        terminal_picture(tab, own, HERE / "inspect-terminal.png")
        page_picture(tab, own, HERE / "inspect-page.png", hover=hover)
        page_picture(tab, both, HERE / "inspect-compare.png", hover=hover)
