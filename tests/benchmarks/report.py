"""The speed and memory section of docs/benchmarks.md from the JSON of the benchmarks: `python -m tests.benchmarks.report`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer

from .process import RESULTS
from .table import DOCS, write_page

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MEBI = 2**20
#: Okabe and Ito's palette, told apart with every kind of colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7")

Document = dict[str, Any]


def table(heading: list[str], rows: list[list[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def bars(path: Path, labels: list[str], series: dict[str, list[float]], ylabel: str, title: str) -> None:
    """Groups of bars, one group per label."""
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    width = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        places = [place + (number - (len(series) - 1) / 2) * width for place in range(len(labels))]
        drawn = axes.bar(places, values, width, label=name, color=COLOURS[number])
        axes.bar_label(drawn, fmt="%.3g", fontsize=8)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# ── one part per benchmark: Markdown, and a picture beside it ───────────────────────────────────────────────────────


def step(document: Document, images: Path) -> str:
    (case,) = document["cases"]
    medians = case["medians"]
    stages = {"rollout": "rollout", "score_update": "score + update", "step": "whole step"}
    rows = []
    for side, measured in medians.items():
        seconds = [f"{measured[stage]['cpu_seconds']:.1f}" for stage in stages]
        rows.append([side, *seconds, f"{measured['score_update']['growth'] / MEBI:,.0f}"])
    if "ratios" in case:
        ratios = case["ratios"]
        found = [f"**{ratios[f'{stage}_cpu_seconds']:.2f}**" for stage in stages]
        rows.append(["**ours / peer**", *found, f"**{ratios['score_update_growth']:.2f}**"])
    heading = ["", *(f"{name}, CPU-s" for name in stages.values()), "growth in score + update, MiB"]
    series = {side: [m[stage]["cpu_seconds"] for stage in stages] for side, m in medians.items()}
    bars(
        images / "bench-step.png", list(stages.values()), series, "CPU-seconds", "One step, median of alternating runs"
    )
    return (
        "### A whole step beside a peer\n\n"
        f"Two random Qwen2 models, vocabulary {case['vocabulary']:,}, hidden {case['hidden']}, {case['layers']} layers; "
        f"{case['responses']} responses of {case['length']} tokens to prompts of {case['prompt']}; float32, "
        f"{case['threads']} threads, strategy `{case['strategy']}`; median of {case['repeats']} alternating runs, each in a "
        "process of its own. The peer is TRL 1.16's DistillationTrainer with beta 1. Growth: peak resident memory during the "
        "stage minus the memory just before.\n\n"
        f"{table(heading, rows)}\n\n![CPU-seconds by stage](images/bench-step.png)"
    )


def bucketing(document: Document, images: Path) -> str:
    cases = document["cases"]
    gaps = ("logprob_gap", "loss_gap", "gradient_gap")
    rows = [
        [c["plan"], str(c["micro_batches"]), f"{c['tokens_per_cpu_second']:.0f}", f"{c['speed_up']:.2f}"]
        + [f"{c[gap]:.1e}" if c[gap] else "–" for gap in gaps]
        for c in cases
    ]
    heading = ["micro-batches", "how many", "tokens per CPU-second", "times as fast", "log-prob", "loss", "gradient"]
    speed = {"": [c["tokens_per_cpu_second"] for c in cases]}
    bars(
        images / "bench-micro-batches.png", [c["plan"] for c in cases], speed, "tokens per CPU-second", "Score + update"
    )
    first = cases[0]
    return (
        "### Micro-batches\n\n"
        f"Score and update of {first['rows']} responses, {first['tokens']:,} tokens, random weights of the 135M shape "
        f"({first['layers']} layers), at most {first['token_budget']:,} tokens in a micro-batch; against one padded batch in "
        "arrival order. The last three columns: largest differences from that batch in float32, of log-probabilities in nats, "
        "of loss and gradient relative to sum |credit x log q| / N.\n\n"
        f"{table(heading, rows)}\n\n"
        "![Tokens per CPU-second](images/bench-micro-batches.png)"
    )


def mebibytes(case: dict[str, Any], *keys: str) -> list[str]:
    return [f"{case[key] / MEBI:,.0f}" for key in keys]


def optional(case: dict[str, Any], key: str, form: str) -> str:
    return format(case[key], form) if key in case else "–"


def growth(document: Document, images: Path) -> str:
    by_length = [c for c in document["cases"] if c["kind"] == "length"]
    by_vocabulary = [c for c in document["cases"] if c["kind"] == "vocabulary"]
    peaks = {"score + update": "peak", "backbone alone": "backbone_peak"}
    series = {name: [c[key] / MEBI for c in by_length] for name, key in peaks.items()}
    labels = [f"{c['length']:,}" for c in by_length]
    bars(images / "bench-growth.png", labels, series, "peak, MiB", "By response length")
    rows = [
        [label, *mebibytes(c, *peaks.values()), optional(c, "ratio", ".3f")]
        for label, c in zip(labels, by_length, strict=True)
    ]
    others = [
        [f"{c['vocabulary']:,}", *mebibytes(c, "peak", "logits"), optional(c, "share_of_logits", ".2%")]
        for c in by_vocabulary
    ]
    return (
        "### Growth of memory\n\nPeak of tensor allocations in score + update, through backward, weight-shaped tensors left "
        "out. With response length it grows as the activations of the backbone do; with the vocabulary it does not.\n\n"
        f"{table(['response length', 'peak, MiB', 'backbone alone, MiB', 'growth / growth of the backbone'], rows)}\n\n"
        f"{table(['vocabulary', 'peak, MiB', 'one [N, V] tensor, MiB', 'growth / that tensor'], others)}\n\n"
        "![Peak by response length](images/bench-growth.png)"
    )


def credit_loss(document: Document, images: Path) -> str:
    cases = document["cases"]
    rows = [
        [
            f"{c['vocabulary']:,}", f"{c['tokens']:,}", f"{c['cpu_seconds']:.2f}", f"{c['bare_cpu_seconds']:.2f}",
            str(c["bare_chunk"]), f"{c['fraction_of_limit']:.2f}", *mebibytes(c, "peak_bytes", "logits_bytes"),
        ]
        for c in cases
    ]  # fmt: skip
    tokens = sorted({c["tokens"] for c in cases})
    vocabularies = sorted({c["vocabulary"] for c in cases})
    found = {(c["vocabulary"], c["tokens"]): c["fraction_of_limit"] for c in cases}
    series = {f"V = {v:,}": [found.get((v, n), 0.0) for n in tokens] for v in vocabularies}
    bars(
        images / "bench-credit-loss.png", [f"{n:,}" for n in tokens], series, "fraction of the limit",
        "Credit loss: time of the four bare products / time taken, by response tokens",
    )  # fmt: skip
    heading = ["vocabulary", "tokens", "CPU-s", "four products, CPU-s", "in chunks of", "fraction of the limit"]
    return (
        "### Credit loss beside the bare matrix products\n\n"
        f"Teacher scores with top-k, the student's loss and gradient, from given hidden states of {cases[0]['hidden']} "
        f"numbers; float32, {cases[0]['threads']} threads, strategy `{cases[0]['strategy']}`; median of {cases[0]['repeats']} "
        f"alternating runs, one run beyond 4,096 tokens. The limit: one product for the teacher's logits and three for the "
        "student, in chunks of the fastest size out of five. Peak: of tensor allocations through backward, the gradient "
        "of the head among them.\n\n"
        f"{table([*heading, 'peak, MiB', 'one [N, V] tensor, MiB'], rows)}\n\n"
        "![Fraction of the limit](images/bench-credit-loss.png)"
    )


def rollout(document: Document, images: Path) -> str:
    cases = document["cases"]
    rows = [
        [
            c["case"], f"{c['rows'] // c['samples']} x {c['samples']}", str(c["prompt"]), f"{c['tokens']:,}",
            f"{c['plain_tokens_per_cpu_second']:.0f}", f"{c['tokens_per_cpu_second']:.0f}", f"{c['speed_up']:.2f}",
        ]
        for c in cases
    ]  # fmt: skip
    series = {
        "plain generate": [c["plain_tokens_per_cpu_second"] for c in cases],
        "ours": [c["tokens_per_cpu_second"] for c in cases],
    }
    bars(images / "bench-rollout.png", [c["case"] for c in cases], series, "tokens per CPU-second", "Rollout")
    first = cases[0]
    heading = ["case", "prompts x samples", "prompt", "tokens kept", "plain, tokens/CPU-s", "ours", "times as fast"]
    return (
        "### Rollout beside plain `generate`\n\n"
        f"A random Qwen2 model, vocabulary {first['vocabulary']:,}, hidden {first['hidden']}, {first['layers']} layers; "
        f"at most {first['longest']} tokens a response, {first['threads']} threads. Both sample at temperature 1 from the "
        "whole vocabulary. Plain `generate` has one limit for all rows; what it writes beyond a row's own is not "
        f"counted.\n\n{table(heading, rows)}\n\n![Tokens per CPU-second](images/bench-rollout.png)"
    )


def gpu(document: Document, images: Path) -> str:
    """Of one device, which is named; no picture, since its parts have nothing in common but that."""
    show = lambda value, form: "–" if value is None else format(value, form)  # noqa: E731
    rows = []
    for case in document["cases"]:
        stages = [("", case)] if "seconds" in case else [(f" {name}", case[name]) for name in ("score", "update")]
        for name, found in stages:
            who = case.get("who", "ours") + (", out of memory" if case.get("out_of_memory") else "")
            size = case.get("tokens") or case["rows"] * case["length"]
            seconds, peak = show(found["seconds"], ".2f"), found["peak_bytes"]
            gibi = show(None if peak is None else peak / 2**30, ".1f")
            rate, mfu = show(found.get("tokens_per_second"), ",.0f"), show(found.get("mfu"), ".0%")
            rows.append([case["part"] + name, who, f"{size:,}", seconds, gibi, rate, mfu])
    heading = ["part", "who", "tokens", "seconds", "peak, GiB", "tokens/s", "MFU"]
    return f"### On a GPU\n\n{document['environment']['device']}.\n\n{table(heading, rows)}"


#: In the order of the page.
PARTS: dict[str, Callable[[Document, Path], str]] = {
    "step": step, "credit_loss": credit_loss, "rollout": rollout, "bucketing": bucketing, "growth": growth, "gpu": gpu,
}  # fmt: skip


def command(document: Document) -> str:
    """As one types it anywhere: without the place of the results, and with a word for the peer's Python."""
    words, kept = iter(document["command"].split()), []
    for word in words:
        if word == "--out":
            next(words)
        else:
            kept += [word, "PATH"] if word == "--peer-python" else [word]
            if word == "--peer-python":
                next(words)
    return " ".join(kept)


def main(
    results: Annotated[Path, typer.Option(help="Folder with the JSON of the benchmarks.")] = RESULTS,
    page: Annotated[Path, typer.Option(help="Gets the section.")] = DOCS / "benchmarks.md",
) -> None:
    """Write the tables and pictures of every benchmark that has been run."""
    images = page.parent / "images"
    images.mkdir(exist_ok=True)
    parts = []
    for name, part in PARTS.items():
        if (path := results / f"{name}.json").is_file():
            document = json.loads(path.read_text(encoding="utf-8"))
            parts.append(f"{part(document, images)}\n\n    {command(document)}")
    write_page(page, "speed", "\n\n".join(parts))
    typer.echo(str(page))


if __name__ == "__main__":
    typer.run(main)
