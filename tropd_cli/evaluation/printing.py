"""Results as a person reads them: a few aligned lines each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WIDTH = 18
#: (key, what is shown, format) of the divergences.
DIVERGENCES = (
    ("reverse_kl", "reverse KL", ".4f"),
    ("forward_kl", "forward KL", ".4f"),
    ("acceptance", "acceptance", ".1%"),
    ("outlier_share", "outlier share", ".1%"),
    ("agreement", "top-1 agreement", ".1%"),
    ("student_perplexity", "student perplexity", ".3f"),
    ("teacher_perplexity", "teacher perplexity", ".3f"),
)


def describe(result: Mapping[str, Any]) -> str:
    """One result: model and benchmark, accuracy with its interval, pass@k, lengths, divergences."""
    split = f" ({result['split']} prompts)" if result.get("split") else ""
    lines = [f"{result['model']} on {result['benchmark']}{split}"]
    if result["accuracy"] is not None:
        low, high = result["ci95"]
        per = result.get("samples_per_problem")
        count = f"{result['problems']} problems" + (f" x {per} samples" if per else f", {result['samples']} samples")
        lines.append(line("accuracy", f"{result['accuracy']:.1%}  [{low:.1%}, {high:.1%}]  {count}"))
        lines += over_k("pass@k", result["pass_at_k"]) + over_k("majority@k", result["majority_at_k"])
    if result.get("mean_length") is not None:
        lines.append(line("length", f"{result['mean_length']:.1f} tokens, {result['truncated_share']:.1%} truncated"))
    divergence = result.get("divergence")
    if divergence:
        places = {name: divergence[name] for name in ("on_samples", "on_responses") if divergence[name]}
        lines.append(
            line(f"against {result['teacher']}", "  ".join(f"{name.replace('_', ' '):>12}" for name in places))
        )
        for key, shown, form in DIVERGENCES:
            values = [place[key] for place in places.values()]
            lines.append(line(shown, "  ".join(f"{'–' if v is None else format(v, form):>12}" for v in values)))
    return "\n".join(lines)


def describe_comparison(one: Mapping[str, Any]) -> str:
    """A paired comparison in a sentence, and what makes it no like-for-like one."""
    (low, high), (first, second) = one["ci95"], one["models"]
    text = (
        f"{one['benchmark']}: {second} against {first}: {100 * one['difference']:+.2f} points [{100 * low:+.2f}, "
        f"{100 * high:+.2f}] over {one['problems']} problems, real with probability {one['probability']:.3f}"
    )
    return text + "".join(f"\n  not made alike: {reason}" for reason in one["differs"])


def over_k(name: str, values: Mapping[str, float] | None) -> list[str]:
    """pass@k or majority@k beyond k = 1, which is the accuracy."""
    shown = {k: v for k, v in (values or {}).items() if k != "1"}
    return [line(name, "  ".join(f"{v:.1%} (k={k})" for k, v in shown.items()))] if shown else []


def line(name: str, value: str) -> str:
    return f"  {name:<{WIDTH}}  {value}"
