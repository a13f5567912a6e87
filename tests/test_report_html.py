"""The HTML page: its static promises, and its behaviour in a real browser against the rows it was made from."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tropd_cli.report.html import embedded_json, render_html
from tropd_cli.report.inspection import Inspection
from tropd_cli.report.rows import TokenRow
from tropd_cli.report.summary import summarise

from . import chromium
from .report_rows import HOSTILE, chain_rows, hostile_rows, with_strategy

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


class Elements(HTMLParser):
    """Tags, and what stands in scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.raw: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:
            self.raw.append(data)


def test_hostile_text_adds_no_element_and_no_character_with_a_meaning() -> None:
    plain = Elements(render_html(Inspection(chain_rows(1))))
    page = render_html(Inspection(hostile_rows(), facts={"student": "</title><script>", "run": "\x1b"}, notes=["<b>"]))
    hostile = Elements(page)
    assert hostile.tags == plain.tags and hostile.tags.count("script") == 2
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data and all(" " <= c <= "~" and c not in "<>&" for c in data[1])
    assert json.loads(data[1])["facts"][0] == ["student", "</title><script>"]


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec=None)))
def test_embedded_json_is_inert_and_true(text: str) -> None:
    embedded = embedded_json({text: text})
    assert not re.search(r"[^ -~]|[<>&]", embedded)
    assert json.loads(embedded) == {text: text}


def test_the_policy_allows_exactly_the_pages_own_script_and_style() -> None:
    page = render_html(Inspection(hostile_rows()))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    assert style and script
    for part, name in ((style[1], "style"), (script[1], "script")):
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy[1]
    assert "default-src 'none'" in policy[1] and "unsafe" not in policy[1] and "http" not in policy[1]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(", script[1])
    external = {"src", "href", "action", "style"}
    assert not [name for name, _ in Elements(page).attributes if name in external or name.startswith("on")]


def test_ten_thousand_tokens_stay_below_two_megabytes() -> None:
    rows = chain_rows(216)
    assert len(rows) > 10_000
    assert len(render_html(Inspection(rows)).encode()) < 2_000_000


def test_no_rows_and_rows_with_little_in_them() -> None:
    assert '"texts":[]' in render_html(Inspection([]))
    assert render_html(Inspection([TokenRow(0, 0, None, "x", None, None, "trust")]))


# ── in a browser ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def page() -> Iterator[chromium.Page]:
    if not chromium.executable():
        pytest.skip("needs Chromium on the PATH (Debian: apt-get install chromium)")
    with chromium.browser() as opened:
        yield opened


def show(page: chromium.Page, path: Path, inspection: Inspection) -> None:
    """Opens a report; it may ask for nothing but itself and complain about nothing."""
    path.write_text(render_html(inspection), encoding="utf-8")
    page.open(path)
    assert page.complaints == [] and page.requests == [path.resolve().as_uri()]


def counted(page: chromium.Page, pane: int = 0) -> dict[str, Any]:
    """The counts a row of the table shows."""
    cells = f"document.querySelectorAll('#counts tr[data-pane=\"{pane}\"] td[data-region]')"
    values = page.run(f"[...{cells}].map(cell => [cell.dataset.region, Number(cell.dataset.count)])")
    return dict(values)


def choose(page: chromium.Page, control: str, value: object) -> None:
    event = "input" if control == "threshold" else "change"
    page.run(
        f"(() => {{ const c = document.getElementById('{control}'); c.value = {json.dumps(value)};"
        f" c.dispatchEvent(new Event('{event}')); }})()"
    )
    page.settle()


def coloured_outliers(page: chromium.Page, pane: int = 0) -> int:
    return int(page.run(f"document.querySelectorAll('.pane[data-pane=\"{pane}\"] .k.o').length"))


def expected(rows: list[TokenRow]) -> dict[str, int]:
    return {name: Counter(row.region for row in rows)[name] for name in ("trust", "outlier", "guidance", "ignored")}


def test_slider_recolours_and_recounts(page: chromium.Page, tmp_path: Path) -> None:
    rows = chain_rows(12)
    show(page, tmp_path / "page.html", Inspection(rows))
    recorded = counted(page)
    assert {name: recorded[name] for name in expected(rows)} == expected(rows)
    student = [row for row in rows if row.written_by == "student"]
    assert recorded["share"] == pytest.approx(sum(row.region == "outlier" for row in student) / len(student))
    for threshold in (-5.0, -2.01, -0.3, -0.01):
        choose(page, "threshold", threshold)
        below = sum(row.log_ratio < threshold for row in student)
        assert counted(page)["outlier"] == below == coloured_outliers(page)
        changed = sum((row.region == "outlier") != (row.log_ratio < threshold) for row in student)
        assert int(page.run("document.querySelectorAll('.k.differs').length")) == changed
    assert page.run("document.getElementById('rule').value") == "threshold"


def test_draw_and_soft_rules(page: chromium.Page, tmp_path: Path) -> None:
    rows = chain_rows(12)
    show(page, tmp_path / "page.html", Inspection(rows))
    recorded = counted(page)
    choose(page, "rule", "acceptance")
    assert counted(page) == recorded, "the same uniform numbers draw the recorded regions again"
    choose(page, "rule", "soft")
    student = [row for row in rows if row.written_by == "student"]
    assert counted(page)["share"] == pytest.approx(sum(1 - row.p_trust for row in student) / len(student), abs=1e-4)
    assert "1 − w" in page.run("document.getElementById('legend').textContent")
    choose(page, "rule", "recorded")
    assert counted(page) == recorded


def test_page_counts_what_the_summary_counts(page: chromium.Page, tmp_path: Path) -> None:
    inspection = Inspection(chain_rows(12))
    show(page, tmp_path / "page.html", inspection)
    summary = summarise(inspection.sequences)
    found = page.run(
        "frequentOutliers(views[0], RECORDED).map(e => [texts[e.text], e.outliers, e.occurrences, e.wanted[0][1]])"
    )
    listed = [
        [e["token"], e["outliers"], e["occurrences"], e["teacher_wanted"][0]["count"]]
        for e in summary["outlier_tokens"]
    ]
    assert found[:6] == listed[:6] and [e[1] for e in found] == [e[1] for e in listed]
    assert page.run("shareByTenth(views[0], RECORDED)") == pytest.approx(summary["outlier_share_by_tenth"])
    assert page.run("document.querySelectorAll('#position rect').length") == 10
    bars = page.run("ratioBins(views[0], RECORDED).map(bins => bins.reduce((a, b) => a + b))")
    assert bars == [summary["regions"][name]["tokens"] for name in ("trust", "outlier")]


def test_hover_and_keyboard_show_a_token(page: chromium.Page, tmp_path: Path) -> None:
    rows = chain_rows(3)
    show(page, tmp_path / "page.html", Inspection(rows))
    place = next(i for i, row in enumerate(rows) if row.region == "outlier" and i > 60)
    row = rows[place]
    page.hover(f'.text [data-i="{place}"]')
    panel = page.run("document.getElementById('details').innerText").replace("−", "-")
    labels = page.run("[...document.querySelectorAll('#details dt')].map(e => e.textContent)")
    values = page.run("[...document.querySelectorAll('#details dd')].map(e => e.textContent)")
    facts = dict(zip(labels, values, strict=True))
    assert facts["region"] == "outlier" and facts["token id"] == str(row.token_id)
    assert float(facts["R = log p − log q"].replace("−", "-")) == pytest.approx(row.log_ratio, abs=2e-3)
    assert float(facts["acceptance min(p/q, 1)"]) == pytest.approx(row.p_trust, abs=2e-4)
    assert float(facts["student's entropy"]) == pytest.approx(row.student_entropy, abs=1e-3)
    names = page.run("[...document.querySelectorAll('#details .choice .mono')].map(e => e.textContent)")
    assert names == [choice.token for choice in row.teacher_top_k] and len(names) == 5
    assert "teacher" in panel and page.run("document.querySelectorAll('#details .track').length") == 10
    page.press("Tab")
    page.run("document.querySelector('.text [data-i=\"0\"]').focus()")
    page.press("ArrowRight")
    assert page.run("document.activeElement.dataset.i") == "1"
    page.press("o")
    following = next(i for i, row in enumerate(rows) if i > 1 and row.region == "outlier")
    assert page.run("document.activeElement.dataset.i") == str(following)


def test_strategies_side_by_side(page: chromium.Page, tmp_path: Path) -> None:
    rows = chain_rows(4)
    first, second = with_strategy(rows, "opd"), with_strategy(rows, "floor <b>", floor=-2.0)
    show(page, tmp_path / "page.html", Inspection(first + second))
    assert [counted(page, pane)["outlier"] for pane in (0, 1)] == [0, expected(second)["outlier"]]
    different = sum(a.region != b.region for a, b in zip(first, second, strict=True))
    assert page.run("document.getElementById('differences').dataset.count") == str(different)
    assert page.run("document.querySelectorAll('.k.differs').length") == 2 * different
    page.press("d")
    assert page.run("document.activeElement.matches('.differs')")
    page.run("document.querySelector('#strategies input').click()")
    assert page.run("document.querySelectorAll('.pane').length") == len({row.sequence for row in rows})
    assert counted(page)["outlier"] == expected(second)["outlier"] == coloured_outliers(page)
    assert page.run("document.querySelector('#strategies').textContent").endswith("floor <b>")


@pytest.mark.parametrize("colour", ["ratio", "acceptance", "credit", "student_entropy", "teacher_entropy", "region"])
def test_every_colour_has_a_legend_and_colours(page: chromium.Page, tmp_path: Path, colour: str) -> None:
    rows = chain_rows(4)
    rows[2] = dataclasses.replace(rows[2], teacher_logprob=None, p_trust=0.0, student_entropy=None, uniform=None)
    show(page, tmp_path / "page.html", Inspection(rows))
    choose(page, "colour", colour)
    used = set(page.run("[...document.querySelectorAll('.text .k')].flatMap(e => [...e.classList])"))
    known = set(page.run("[...document.querySelectorAll('#legend .k')].flatMap(e => [...e.classList])"))
    shades = {name for name in used if re.fullmatch(r"[a-z]+\d", name)}
    assert shades and shades <= known
    assert page.complaints == []


def test_hostile_text_in_a_browser(page: chromium.Page, tmp_path: Path) -> None:
    show(page, tmp_path / "page.html", Inspection(hostile_rows()))
    assert page.run("document.querySelectorAll('.text .k').length") == len(HOSTILE)
    assert page.run("document.querySelector('.text .k').textContent") == HOSTILE[0]
    for place in range(len(HOSTILE)):
        page.run(f"document.querySelector('.text [data-i=\"{place}\"]').focus()")
    assert page.run("[typeof window.hacked, document.querySelectorAll('img, b, body script').length]") == [
        "undefined",
        2,
    ]
    text = page.run("document.querySelector('.text').textContent")
    assert "😀" in text and "⟨ESC⟩[31mred" in text and "\u202e" not in text
    assert page.complaints == []


def test_four_thousand_tokens_on_one_line_are_wrapped_and_quick(page: chromium.Page, tmp_path: Path) -> None:
    template = chain_rows(1)[1]
    rows = [dataclasses.replace(template, position=place, token="7x"[place % 2]) for place in range(4000)]
    show(page, tmp_path / "page.html", Inspection(rows))
    assert page.run("document.documentElement.scrollWidth <= window.innerWidth")
    milliseconds = page.run(
        "(async () => { const t = performance.now(); state.kind = 'threshold';"
        "for (let k = 0; k < 5; k++) { state.threshold = -k / 9; refresh(); } return (performance.now() - t) / 5; })()"
    )
    assert milliseconds < 1000
