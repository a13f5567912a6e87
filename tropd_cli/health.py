"""Warnings about a run that goes wrong, once each, with advice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

#: |R| below this on every token means that the teacher has nothing to say, nats.
NO_SIGNAL = 1e-4
#: Student entropy under this share of its first value, and under this many nats, looks like a collapse.
COLLAPSE_SHARE, COLLAPSE_NATS = 0.1, 0.05
#: A student this close to its teacher may be as certain as that: no collapse. Mean acceptance.
CLOSE = 0.9
#: Share of outliers, or of truncated responses, that is worth a word when it lasts so many steps.
TOO_MANY, LASTING = 0.5, 3
#: A gradient norm of so many times the median of the last ones is a spike; so many of them are remembered.
SPIKE, REMEMBERED, ENOUGH = 20.0, 20, 5


@dataclass
class Health:
    """Looks at each step's metrics. `warned` keeps the names of the warnings already given."""

    max_grad_norm: float = 1.0
    warned: set[str] = field(default_factory=set)
    first_entropy: float | None = None
    norms: list[float] = field(default_factory=list)
    lasted: dict[str, int] = field(default_factory=dict)

    def check(self, metrics: dict[str, Any]) -> list[str]:
        """New warnings for this step."""
        found = dict(self._problems(metrics))
        new = [text for name, text in found.items() if name not in self.warned]
        self.warned.update(found)
        return new

    def _problems(self, metrics: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """(name, advice) of everything that is off."""
        smallest, largest = metrics.get("reward_min"), metrics.get("reward_max")
        if smallest is not None and max(abs(smallest), abs(largest)) < NO_SIGNAL:
            yield (
                "no-signal",
                f"teacher and student agree on every token (|R| < {NO_SIGNAL}): is the teacher the student?",
            )
        if metrics.get("skipped_steps"):
            yield "non-finite", "a loss or gradient was not finite and its step was skipped: lower --learning-rate"
        yield from self._entropy(metrics.get("entropy"), metrics.get("acceptance"))
        if self._lasts(metrics, "truncated_share"):
            yield (
                "length",
                "more than half of the responses hit --max-response-length without ending: raise it, or check the stop tokens",
            )
        if self._lasts(metrics, "outlier_share"):
            yield (
                "outliers",
                "more than half of the student's tokens are outliers, so the teacher can hardly judge it: "
                "try longer guidance or a closer teacher",
            )
        yield from self._spike(metrics.get("grad_norm"))

    def _lasts(self, metrics: dict[str, Any], name: str) -> bool:
        """Whether a share has been over TOO_MANY for LASTING steps."""
        above = (metrics.get(name) or 0.0) > TOO_MANY
        self.lasted[name] = self.lasted.get(name, 0) + 1 if above else 0
        return self.lasted[name] >= LASTING

    def _entropy(self, entropy: float | None, acceptance: float | None) -> Iterator[tuple[str, str]]:
        if entropy is None or (acceptance or 0.0) > CLOSE:
            return
        self.first_entropy = entropy if self.first_entropy is None else self.first_entropy
        if entropy < COLLAPSE_SHARE * self.first_entropy and entropy < COLLAPSE_NATS:
            yield (
                "entropy",
                f"student entropy fell from {self.first_entropy:.3f} to {entropy:.3f} nats: it may be collapsing",
            )

    def _spike(self, norm: float | None) -> Iterator[tuple[str, str]]:
        if norm is None:
            return
        median = sorted(self.norms)[len(self.norms) // 2] if len(self.norms) >= ENOUGH else None
        if median and norm > SPIKE * median and norm > self.max_grad_norm:
            yield "spike", f"gradient norm {norm:.3g} is over {SPIKE:.0f} times its median {median:.3g}"
        self.norms = [*self.norms[1 - REMEMBERED :], norm]
