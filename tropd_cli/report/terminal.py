"""Regions as coloured text in the terminal, by marks where there are no colours, and the summary below.

Every text of a model goes through `visible` and into a Rich `Text`: neither markup nor escapes are interpreted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from .inspection import Inspection, Sequence
from .palette import strength
from .rows import REGIONS, RegionName, TokenRow
from .summary import summarise
from .text import NEWLINE, visible

#: Styles by region and strength. In 16 colours a background with its own foreground is readable on light and dark.
RICH_COLOURS: dict[RegionName, tuple[str, str, str]] = {
    "trust": ("", "#3f8fd2", "bold #3f8fd2"),
    "outlier": ("#000000 on #ffdf9e", "#000000 on #f0ab2e", "bold #ffffff on #b04a00"),
    "guidance": ("italic #b5739d",) * 3,
    "ignored": ("dim",) * 3,
}
SIXTEEN_COLOURS: dict[RegionName, tuple[str, str, str]] = {
    "trust": ("", "bright_blue", "bold bright_blue"),
    "outlier": ("underline", "black on yellow", "bold white on red"),
    "guidance": ("magenta",) * 3,
    "ignored": ("dim",) * 3,
}
#: Marks by region and strength; guidance and ignored tokens are marked as runs.
OUTLIER_MARKS = (("‹", "›"), ("«", "»"), ("«", "»"))
RUN_MARKS: dict[RegionName, tuple[str, str]] = {"guidance": ("{|", "|}"), "ignored": ("(|", "|)")}
SPARKS = "▁▂▃▄▅▆▇█"
BAR = 24
TAILS = ("0.01", "0.05", "0.5", "0.95", "0.99")
FINISH = {"eos": "ended", "length": "cut at the cap", "given": "given text", None: "no end recorded"}


def render(inspection: Inspection, console: Console, *, most_sequences: int | None = None) -> None:
    """Prints texts, legend and summary.

    Args:
        console: its width, colours and NO_COLOR decide the looks.
        most_sequences: show only so many texts; the summary counts all.
    """
    palette = _palette(console)
    console.print(_head(inspection))
    console.print(_legend(palette))
    sequences = inspection.sequences
    shown = len(sequences) if most_sequences is None else min(most_sequences, len(sequences))
    for place in range(shown):
        console.print(_response(inspection, place, palette))
    if shown < len(sequences):
        console.print(f"\n{len(sequences) - shown} more sequences are counted below and shown by --format html.")
    for name, responses in inspection.by_strategy.items():
        console.print(_summary(name if len(inspection.by_strategy) > 1 else "", summarise(responses)))
    if len(inspection.by_strategy) > 1:
        console.print(_disagreement(inspection))
    for note in inspection.notes:
        console.print(Text(f"\n{visible(note)}", style="dim"))


Palette = dict[RegionName, tuple[str, str, str]]


def _palette(console: Console) -> Palette | None:
    """None: marks instead of colours."""
    if console.no_color or console.color_system is None:
        return None
    return SIXTEEN_COLOURS if console.color_system in ("standard", "windows") else RICH_COLOURS


# ── texts ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _head(inspection: Inspection) -> Text:
    tokens = sum(len(sequence.rows) for sequence in inspection.sequences)
    head = Text(f"{_count(len(inspection.sequences), 'sequence')}, {_count(tokens, 'token')}", style="bold")
    for name, value in inspection.facts.items():
        head.append(f"\n{name:<9}", style="dim not bold").append(visible(value), style="not bold")
    return head


def _legend(palette: Palette | None) -> Text:
    if palette is None:
        return Text("\nplain: trust  ‹outlier› |R| < 1  «outlier» ≥ 1  {|teacher-written|}  (|ignored|)")
    legend = Text("\n")
    for name in REGIONS:
        legend.append(name, style=palette[name][0])
        if name in ("trust", "outlier"):
            for limit, style in zip(("|R|≥1", "≥3"), palette[name][1:], strict=True):
                legend.append(" ").append(limit, style=style)
        legend.append("   ")
    return legend.append("R = log p − log q", style="dim")


def _response(inspection: Inspection, place: int, palette: Palette | None) -> RenderableType:
    first = inspection.sequences[place]
    title = f"sequence {first.index} · {_count(len(first.rows), 'token')} · {FINISH[first.finish]}"
    parts: list[RenderableType] = [Text(), Rule(Text(title), align="left", style="dim")]
    if first.prompt is not None:
        parts.append(Text(visible(first.prompt), style="dim", overflow="fold"))
    for name, responses in inspection.by_strategy.items():
        if len(inspection.by_strategy) > 1:
            parts.append(Text(visible(name), style="bold"))
        parts.append(coloured(responses[place], palette))
    return Group(*parts)


def coloured(sequence: Sequence, palette: Palette | None) -> Text:
    """The response as text, by colours or marks. A break follows every sign for a line break."""
    text = Text(overflow="fold")
    for shown, style in _marked(sequence) if palette is None else _styled(sequence, palette):
        text.append(re.sub(f"{NEWLINE}[›»]?", r"\g<0>\n", shown), style=style)
    return text


def _styled(sequence: Sequence, palette: Palette) -> Iterator[tuple[str, str]]:
    for row, shown in zip(sequence.rows, sequence.shown, strict=True):
        yield shown, palette[row.region][_strength(row)]


def _marked(sequence: Sequence) -> Iterator[tuple[str, str]]:
    run: RegionName = "trust"
    for row, shown in zip(sequence.rows, sequence.shown, strict=True):
        if row.region != run:
            yield RUN_MARKS.get(run, ("", ""))[1] + RUN_MARKS.get(row.region, ("", ""))[0], ""
            run = row.region
        opening, closing = OUTLIER_MARKS[_strength(row)] if row.region == "outlier" else ("", "")
        core = shown.strip(" ")  # marks hug the word, so that lines break between words
        yield shown.replace(core, opening + core + closing, 1), ""
    yield RUN_MARKS.get(run, ("", ""))[1], ""


def _strength(row: TokenRow) -> int:
    return strength(row.log_ratio)


# ── summary ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _summary(name: str, summary: dict[str, Any]) -> RenderableType:
    title = "summary" if not name else f"summary: {visible(name)}"
    parts: list[RenderableType] = [Text(), Rule(Text(title), align="left", style="dim")]
    parts += [_regions(summary), _numbers(summary)]
    if summary["outlier_tokens"]:
        parts += [Text("\nmost frequent outliers", style="dim"), Padding(_outliers(summary), (0, 0, 0, 2))]
    parts += [Text(f"\n! {line}", style="bold") for line in summary["advice"]]
    return Group(*parts)


def _regions(summary: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    for justify in ("left", "right", "right", "left"):
        table.add_column(justify=justify)
    for name, part in summary["regions"].items():
        bar = "█" * round(BAR * (part["share"] or 0.0)) or ("▏" if part["tokens"] else "")
        table.add_row(name, f"{part['tokens']:,}", _percent(part["share"]), bar)
    return table


def _numbers(summary: dict[str, Any]) -> Table:
    ratio, finish, length = summary["log_ratio"], summary["finish"], summary["response_length"]
    tail = "   ".join(f"{float(level):.0%} {_nats(ratio['quantiles'][level])}" for level in TAILS)
    infinite = f"; infinite on {_count(ratio['infinite'], 'token')}" if ratio["infinite"] else ""
    tenths = summary["outlier_share_by_tenth"]
    ends = ", ".join(f"{count} {FINISH.get(name, 'unknown')}" for name, count in finish.items() if count)
    rows = [
        ("acceptance", f"{_percent(summary['acceptance'])} mean min(p/q, 1) on the student's tokens"),
        ("R, nats", f"mean {_nats(ratio['mean'])}   from {_nats(ratio['min'])} to {_nats(ratio['max'])}{infinite}"),
        ("  quantiles", tail),
        ("reverse KL", f"{_nats(summary['reverse_kl'])} nats per token, student to teacher (−mean R)"),
        ("forward KL", _forward_kl(summary)),
        ("entropy", f"student {_nats(summary['student_entropy'])}   teacher {_nats(summary['teacher_entropy'])} nats"),
        ("outliers", f"{_percent(summary['outlier_share'])} of the student's tokens; by tenth of the response:"),
        ("", f"{_sparks(tenths)}   {' '.join('–' if share is None else f'{share:.0%}' for share in tenths)}"),
        ("|credit|", f"{_percent(summary['outlier_credit_share'])} carried by outliers"),
        ("wanted", _wanted(summary["wanted_logprob"])),
        ("length", f"mean {_one(length['mean'])}, {length['min']} to {length['max']} tokens; {ends}"),
        ("repetition", f"{_percent(summary['repetition'])} of the 4-grams occurred before in their response"),
    ]
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="dim")
    table.add_column()
    table.add_row()
    for label, value in rows:
        table.add_row(Text(label), Text(value))
    return table


def _wanted(logprob: float | None) -> str:
    if logprob is None:
        return "–"
    return f"{_nats(logprob)} nats for the teacher's choice at a response's first outlier"


def _forward_kl(summary: dict[str, Any]) -> str:
    if summary["forward_kl"] is None:
        return "–"
    return f"≥ {_nats(summary['forward_kl'])} nats per token, teacher to student ({summary['forward_kl_method']})"


def _outliers(summary: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("token", overflow="fold", max_width=24)
    for title in ("outliers", "of", "mean R"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("the teacher wanted", overflow="fold")
    for entry in summary["outlier_tokens"]:
        wanted = ", ".join(_wish(wish, entry["token"]) for wish in entry["teacher_wanted"])
        numbers = (f"{entry['outliers']}", f"{entry['occurrences']}", _nats(entry["mean_log_ratio"]))
        table.add_row(Text(quoted(entry["token"])), *numbers, Text(wanted or "–"))
    return table


def _wish(wish: dict[str, Any], token: str) -> str:
    return f"{'the same' if wish['token'] == token else quoted(wish['token'])} {wish['count']}×"


def quoted(token: str, longest: int = 40) -> str:
    """A token between marks that show its spaces, cut where it is long."""
    shown = visible(token)
    return f"“{shown if len(shown) <= longest else shown[: longest - 1] + '…'}”"


def _disagreement(inspection: Inspection) -> Text:
    columns = [[row.region for s in sequences for row in s.rows] for sequences in inspection.by_strategy.values()]
    different = sum(len(set(regions)) > 1 for regions in zip(*columns, strict=True))
    return Text(f"\nThe strategies disagree on the region of {different:,} of {len(columns[0]):,} tokens.")


def _sparks(shares: list[float | None]) -> str:
    """Bars from 0 to the largest share."""
    most = max((share for share in shares if share is not None), default=0.0) or 1.0
    return "".join(" " if share is None else SPARKS[round(share / most * (len(SPARKS) - 1))] for share in shares)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _nats(value: float | None) -> str:
    return "–" if value is None else f"{round(value, 3) + 0.0:.3f}".replace("-", "−")


def _one(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
