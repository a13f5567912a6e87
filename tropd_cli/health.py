"""Warnings about a run that goes wrong, once each, with advice."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Health:
    """Looks at each step's metrics. `warned` keeps the names of the warnings already given."""

    max_grad_norm: float = 1.0
    warned: set[str] = field(default_factory=set)
    first_entropy: float | None = None
    norms: list[float] = field(default_factory=list)

    def check(self, metrics: dict[str, Any]) -> list[str]:
        """New warnings for this step."""
        found = dict(self._problems(metrics))
        new = [text for name, text in found.items() if name not in self.warned]
        self.warned.update(found)
        return new

    def _problems(self, m: dict[str, Any]) -> list[tuple[str, str]]:
        problems = []
        smallest, largest = m.get("reward_min"), m.get("reward_max")
        if smallest is not None and max(abs(smallest), abs(largest)) < 1e-4:
            problems.append(
                (
                    "no-signal",
                    "teacher and student agree on every token (|log p - log q| < 1e-4): is the teacher the student?",
                )
            )
        if m.get("skipped_steps"):
            problems.append(
                ("non-finite", "a step had a non-finite loss or gradient and was skipped: lower --learning-rate")
            )
        entropy = m.get("entropy")
        if entropy is not None:
            self.first_entropy = entropy if self.first_entropy is None else self.first_entropy
            if entropy < 0.1 * self.first_entropy and entropy < 0.05:
                problems.append(
                    (
                        "entropy",
                        f"student entropy fell from {self.first_entropy:.3f} to {entropy:.3f} nats: it may be collapsing",
                    )
                )
        if (m.get("truncated_share") or 0.0) > 0.5:
            problems.append(
                (
                    "length",
                    "more than half of the responses hit --max-response-length without ending: raise it, or check the stop tokens",
                )
            )
        if (m.get("outlier_share") or 0.0) > 0.5:
            problems.append(
                (
                    "outliers",
                    "more than half of the student's tokens are outliers: the teacher can hardly judge this student; try longer guidance or a closer teacher",
                )
            )
        norm = m.get("grad_norm")
        if norm is not None:
            usual = sorted(self.norms)[len(self.norms) // 2] if len(self.norms) >= 5 else None
            if usual and norm > 20 * usual and norm > self.max_grad_norm:
                problems.append(("spike", f"gradient norm {norm:.3g} is over 20 times its median {usual:.3g}"))
            self.norms = [*self.norms[-19:], norm]
        return problems
