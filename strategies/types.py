"""What a credit-assignment strategy reads (`Signals`), asks for (`Needs`) and returns (`Credit`).

Axes: B sequences, T response tokens, N tokens of any leading shape, K teacher top-k, V vocabulary. Units: nats.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

Scope = Literal["token", "batch"]


class Region(IntEnum):
    """Which supervision a token got. Stored per token as int8."""

    IGNORED = 0  #: no credit: masked by the strategy, or padding
    TRUST = 1  #: student-written, supervised by the reward
    OUTLIER = 2  #: student-written, handed to the outlier estimator
    GUIDANCE = 3  #: teacher-written prefix


class MissingSignal(KeyError):
    """A strategy read a signal that its `needs` do not declare."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Needs:
    """What a strategy reads beyond the student's own log-probability. The engine computes the union and nothing more.

    Memory follows: O(n) for everything per token, O(nk) for `teacher_top_k`, O(chunk x V) for `full_distribution`.
    `|` is the union; the larger `teacher_top_k` wins.
    """

    teacher_logprob: bool = False
    reference_logprob: bool = False
    student_entropy: bool = False
    teacher_entropy: bool = False
    uniform: bool = False
    full_distribution: bool = False
    teacher_top_k: int = 0

    def __or__(self, other: Needs) -> Needs:
        return Needs(**{f.name: max(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)})

    def signal_names(self) -> frozenset[str]:
        """Names of the `Signals` a strategy with these needs may read."""
        names = set(Signals.ALWAYS)
        names.update(
            name
            for name in ("teacher_logprob", "reference_logprob", "student_entropy", "teacher_entropy", "uniform")
            if getattr(self, name)
        )
        if self.teacher_top_k:
            names.update(("teacher_topk_logprob", "student_topk_logprob"))
        if self.full_distribution:
            names.update(("student_logprobs", "teacher_logprobs"))
        return frozenset(names)


class Signals:
    """Detached per-token tensors, natural logarithms, all with the same leading shape.

    Token scope: any leading shape, in the engine [N] valid tokens. Batch scope: [B, T], right-padded, with `mask`.

    mask, teacher_wrote            [...] bool   valid response token; written by the teacher as guidance prefix
    student_logprob                [...]        log q(x) at rollout time
    teacher_logprob                [...]        log p(x)
    reference_logprob              [...]        log-probability of x under the reference model
    student_entropy, teacher_entropy [...]      H_S, H_T in nats
    teacher_topk_logprob           [..., K]     log p of the teacher's K most likely tokens, descending
    student_topk_logprob           [..., K]     log q of the same tokens
    student_logprobs, teacher_logprobs [..., V] whole distributions, only inside a chunk
    uniform                        [...]        one U(0, 1) per token, fixed for the rollout
    group                          [B] int64    global prompt index (batch scope only)
    progress                       float        fraction of the run completed, 0 to 1

    Raises:
        MissingSignal: on reading a signal that was not declared or not given.
        ValueError: when two per-token tensors differ in their leading shape.
    """

    ALWAYS: ClassVar[tuple[str, ...]] = ("mask", "teacher_wrote", "student_logprob", "group", "progress")
    VECTOR: ClassVar[tuple[str, ...]] = (
        "teacher_topk_logprob",
        "student_topk_logprob",
        "student_logprobs",
        "teacher_logprobs",
    )
    NAMES: ClassVar[tuple[str, ...]] = (
        *ALWAYS,
        "teacher_logprob",
        "reference_logprob",
        "student_entropy",
        "teacher_entropy",
        "uniform",
        *VECTOR,
    )

    def __init__(self, **tensors: Tensor | float) -> None:
        unknown = set(tensors) - set(self.NAMES)
        if unknown:
            raise TypeError(f"unknown signals {sorted(unknown)}; the names are {', '.join(self.NAMES)}")
        if "student_logprob" not in tensors:
            raise TypeError("student_logprob is always needed")
        self._tensors = dict(tensors)
        shape = self.student_logprob.shape
        for name, value in tensors.items():
            if not isinstance(value, Tensor) or name == "group":
                continue
            leading = value.shape[:-1] if name in self.VECTOR else value.shape
            if leading != shape:
                raise ValueError(f"shapes differ: student_logprob {list(shape)}, {name} {list(value.shape)}")
        self._tensors.setdefault("mask", torch.ones(shape, dtype=torch.bool, device=self.student_logprob.device))
        self._tensors.setdefault("teacher_wrote", torch.zeros_like(self.mask))

    def _read(self, name: str) -> Tensor:
        try:
            value = self._tensors[name]
        except KeyError:
            raise MissingSignal(
                f"signal '{name}' was not declared: add it to the strategy's `needs` (given: {', '.join(self)})"
            ) from None
        assert isinstance(value, Tensor)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._tensors))

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def only(self, needs: Needs) -> Signals:
        """The same signals restricted to what `needs` declares, top-k cut to its k: what a strategy is handed."""
        allowed = needs.signal_names()
        kept = {name: value for name, value in self._tensors.items() if name in allowed}
        for name in ("teacher_topk_logprob", "student_topk_logprob"):
            if name in kept:
                kept[name] = self._read(name)[..., : needs.teacher_top_k]
        return Signals(**kept)

    def replace(self, **tensors: Tensor | float) -> Signals:
        """A copy with some tensors changed or added."""
        return Signals(**{**self._tensors, **tensors})

    @property
    def mask(self) -> Tensor:
        return self._read("mask")

    @property
    def teacher_wrote(self) -> Tensor:
        return self._read("teacher_wrote")

    @property
    def student_wrote(self) -> Tensor:
        """Valid tokens that the student sampled itself: what quantiles, groups and sums are taken over."""
        return self.mask & ~self.teacher_wrote

    @property
    def student_logprob(self) -> Tensor:
        return self._read("student_logprob")

    @property
    def teacher_logprob(self) -> Tensor:
        return self._read("teacher_logprob")

    @property
    def reference_logprob(self) -> Tensor:
        return self._read("reference_logprob")

    @property
    def student_entropy(self) -> Tensor:
        return self._read("student_entropy")

    @property
    def teacher_entropy(self) -> Tensor:
        return self._read("teacher_entropy")

    @property
    def teacher_topk_logprob(self) -> Tensor:
        return self._read("teacher_topk_logprob")

    @property
    def student_topk_logprob(self) -> Tensor:
        return self._read("student_topk_logprob")

    @property
    def student_logprobs(self) -> Tensor:
        return self._read("student_logprobs")

    @property
    def teacher_logprobs(self) -> Tensor:
        return self._read("teacher_logprobs")

    @property
    def uniform(self) -> Tensor:
        return self._read("uniform")

    @property
    def group(self) -> Tensor:
        return self._read("group")

    @property
    def progress(self) -> float:
        if "progress" not in self._tensors:
            raise MissingSignal("signal 'progress' was not given")
        return float(self._tensors["progress"])


@dataclass(frozen=True)
class Credit:
    """Minus the derivative of the loss with respect to the student's log-probabilities, per token. Plain numbers.

    Args:
        sampled: [...] on log q(x) of the sampled token.
        top_k: [..., K] on log q(v) of the teacher's top-k tokens, or None.
        full: [..., V] on log q(v) of every token, or None (needs `full_distribution`).
        region: [...] int8 of `Region`, or None: TRUST for every valid token.
        outlier_weight: [...] in [0, 1] share of the outlier supervision, or None: 1 where region is OUTLIER.
        floored: [...] bool, a floor raised `sampled` above the reward, or None: nowhere. For metrics only.
    """

    sampled: Tensor
    top_k: Tensor | None = None
    full: Tensor | None = None
    region: Tensor | None = None
    outlier_weight: Tensor | None = None
    floored: Tensor | None = None


@runtime_checkable
class Strategy(Protocol):
    """Which token gets how much credit. A frozen dataclass whose fields are its YAML options.

    scope "token": `credit` sees any chunk of valid tokens, so it must not look across tokens.
    scope "batch": `credit` sees [B, T], right-padded, the rows of all processes and micro-batches.
    ratio_clip: the published PPO range for `sampled` as widths (below, above): (0.2, 0.2) keeps q / q_old within
        [0.8, 1.2]. None: no clip. The engine applies it.
    """

    @property
    def needs(self) -> Needs: ...

    @property
    def scope(self) -> Scope: ...

    @property
    def ratio_clip(self) -> tuple[float, float] | None: ...

    def credit(self, signals: Signals) -> Credit: ...


@runtime_checkable
class OutlierEstimator(Protocol):
    """What an outlier token is supervised with. Evaluated on all student tokens; the strategy mixes."""

    @property
    def needs(self) -> Needs: ...

    def estimate(self, signals: Signals) -> Credit: ...
