"""Prompts -> responses, sampled exactly from the model's own distribution.

Axes: B rows, T response tokens (right-padded). Sampling is keyed by (seed, stream, step, slot, sample, position), so a
row gets the same tokens alone, in any batch, on any rank, and after any prefix of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from strategies.guidance import prefix_limit

from .data import Prompt
from .models import LanguageModel, Vocabulary
from .randomness import inverse_cdf, nucleus, uniform
from .sharding import in_step


@dataclass(frozen=True)
class Request:
    """One row to sample: prompt and prefix ids, how long prefix plus continuation may be, and its key."""

    prompt_ids: list[int]
    prefix_ids: list[int]
    max_length: int
    key: tuple[int, int, int]  # step, slot or prompt, sample


class Generator(Protocol):
    """Whatever writes responses. Returns prefix plus continuation per request, the final stop id included."""

    def __call__(self, requests: Sequence[Request]) -> list[list[int]]: ...


@dataclass
class Rollout:
    """Responses of one step on this process.

    ids, mask, teacher_wrote [B, T]; group [B] index of the prompt within the global step; sample [B]; ended [B] whether
    a stop id was written; prompt_ids / teacher_prompt_ids per row as the two models see them.
    """

    step: int
    ids: Tensor
    mask: Tensor
    teacher_wrote: Tensor
    group: Tensor
    sample: Tensor
    ended: Tensor
    prompt_ids: list[list[int]]
    teacher_prompt_ids: list[list[int]]
    prompts: list[Prompt]

    @property
    def lengths(self) -> Tensor:
        """[B] response tokens per row, prefix included."""
        return self.mask.sum(-1)

    def __len__(self) -> int:
        return self.ids.shape[0]


class KeyedSampling(LogitsProcessor):
    """Turns one keyed uniform number per row into a token by the inverse CDF, under greedy decoding.

    With top_p 1 the draw is from softmax(logits / temperature) itself, as training needs it. Temperature 0 takes the
    most probable token. Truncation comes before the draw, so a row still does not depend on its batch.
    """

    def __init__(
        self, requests: Sequence[Request], width: int, stream: tuple[int, str], temperature: float, allowed: Tensor,
        top_p: float = 1.0,
    ):  # fmt: skip
        self.seed, self.stream = stream
        self.width, self.temperature, self.top_p = width, temperature, top_p
        self.key = torch.tensor([r.key for r in requests], device=allowed.device).T  # [3, rows]
        self.offset = torch.tensor([len(r.prefix_ids) for r in requests], device=allowed.device)
        self.forbidden = ~allowed

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        width = min(scores.shape[1], len(self.forbidden))  # padded vocabularies differ
        logits = scores[:, :width].float().masked_fill(self.forbidden[:width], -torch.inf)
        token = logits.argmax(-1) if self.temperature == 0.0 else self._draw(input_ids, logits / self.temperature)
        return torch.full_like(scores, -torch.inf).scatter_(1, token.unsqueeze(1), 0.0)

    def _draw(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        position = input_ids.shape[1] - self.width + self.offset
        draw = uniform(self.seed, self.stream, *self.key, position)
        return inverse_cdf(logits if self.top_p == 1.0 else nucleus(logits, self.top_p), draw)


class RowLimit(StoppingCriteria):
    """Stops each row at its own maximum length."""

    def __init__(self, requests: Sequence[Request], width: int, device: torch.device):
        self.limit = torch.tensor([width + r.max_length - len(r.prefix_ids) for r in requests], device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        return input_ids.shape[1] >= self.limit


@dataclass
class TransformersGenerator:
    """`generate` of transformers, batched by a token budget, longest context first.

    Args:
        language_model: the model that writes.
        vocabulary: which ids may be sampled and which stop.
        seed, stream: the random stream ("student", "teacher", "evaluation").
        temperature: 1 unless q itself is tempered everywhere; 0 is greedy (evaluation only).
        token_budget: most tokens (rows x longest possible row) in one batch.
        context: a context manager around generation (autocast).
        top_p: below 1 cuts the tail off (evaluation only: training needs samples of q itself).
        sharded: every forward takes all processes, so all of them make as many batches and as many steps in each.
    """

    language_model: LanguageModel
    vocabulary: Vocabulary
    seed: int
    stream: str
    temperature: float
    token_budget: int
    context: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    top_p: float = 1.0
    sharded: bool = False

    def __call__(self, requests: Sequence[Request]) -> list[list[int]]:
        results: list[list[int]] = [list(r.prefix_ids) for r in requests]
        open_rows = [i for i, r in enumerate(requests) if not self._is_complete(r)]
        open_rows.sort(key=lambda i: (-_longest(requests[i]), -len(requests[i].prefix_ids), i))
        plan: list[list[int]] = []
        while open_rows:
            count = max(1, self.token_budget // _longest(requests[open_rows[0]]))
            plan.append(open_rows[:count])
            open_rows = open_rows[count:]
        if self.sharded:
            plan = in_step(plan)
        if plan:
            for index, response in self.language_model.run(lambda: self._written(plan, requests)):
                results[index] = response
        return results

    @torch.no_grad()
    def _written(self, plan: list[list[int]], requests: Sequence[Request]) -> list[tuple[int, list[int]]]:
        """(number of the request, response), batch by batch. A batch without rows is one token that nobody asked for."""
        idle = Request([self.vocabulary.stop_ids[0]], [], 1, (0, 0, 0))
        pairs: list[tuple[int, list[int]]] = []
        for batch in plan:
            responses = self._generate([requests[i] for i in batch] or [idle])
            pairs += zip(batch, responses, strict=bool(batch))
        return pairs

    def _is_complete(self, request: Request) -> bool:
        """A prefix that ends the response or fills it has no continuation."""
        prefix = request.prefix_ids
        return len(prefix) >= request.max_length or bool(prefix and prefix[-1] in self.vocabulary.stop_ids)

    def _generate(self, requests: list[Request]) -> list[list[int]]:
        model = self.language_model.model
        device = self.language_model.device
        contexts = [r.prompt_ids + r.prefix_ids for r in requests]
        width = max(map(len, contexts))
        ids = torch.full((len(contexts), width), self.vocabulary.pad_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, context in enumerate(contexts):
            ids[row, width - len(context) :] = torch.tensor(context)
            mask[row, width - len(context) :] = 1
        sampling = KeyedSampling(
            requests, width, (self.seed, self.stream), self.temperature, self.vocabulary.allowed.to(device), self.top_p
        )
        was_training = model.training
        model.eval()
        try:
            with self.context():
                output = model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    generation_config=exact_sampling_config(
                        max(r.max_length - len(r.prefix_ids) for r in requests), self.vocabulary
                    ),
                    logits_processor=LogitsProcessorList([sampling]),
                    stopping_criteria=StoppingCriteriaList([RowLimit(requests, width, device)]),
                    synced_gpus=self.sharded,
                )
        finally:
            model.train(was_training)
        written = output[:, width:].tolist()
        return [r.prefix_ids + self._cut(row, r) for r, row in zip(requests, written, strict=True)]

    def _cut(self, written: list[int], request: Request) -> list[int]:
        """Up to and including the first stop id, and never beyond the row's own limit. Lengths, not pads, decide."""
        for position, token in enumerate(written[: request.max_length - len(request.prefix_ids)]):
            if token in self.vocabulary.stop_ids:
                return written[: position + 1]
        return written[: request.max_length - len(request.prefix_ids)]


def exact_sampling_config(max_new_tokens: int, vocabulary: Vocabulary) -> GenerationConfig:
    """Greedy decoding with everything that would change scores switched off explicitly: `generate` fills unset fields
    from the checkpoint and then from the library."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        typical_p=1.0,
        epsilon_cutoff=0.0,
        eta_cutoff=0.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_length=0,
        min_new_tokens=0,
        eos_token_id=list(vocabulary.stop_ids),
        pad_token_id=vocabulary.pad_id,
        use_cache=True,
    )


def _longest(request: Request) -> int:
    return len(request.prompt_ids) + request.max_length


# ── one step's rollout ──────────────────────────────────────────────────────────────────────────────────────────────


def draw_prefix_length(seed: int, step: int, slot: int, *, response_length: int, limit: int, rule: str) -> int:
    """l of one prompt at one step: uniform over 0..min(response_length, limit), or that minimum itself ("min")."""
    longest = min(response_length, limit)
    if rule == "min":
        return longest
    return int(uniform(seed, "prefix-length", step, slot).item() * (longest + 1))


def step_prefix_limit(step: int, total_steps: int, max_response_length: int) -> int:
    """floor(L(s)) with s = step, the number of completed updates."""
    return int(prefix_limit(step, total_steps, max_response_length))


def make_rollout(
    step: int,
    prompts: Sequence[tuple[int, Prompt]],
    prefixes: Sequence[list[int]],
    generator: Generator,
    *,
    rollouts_per_prompt: int,
    max_response_length: int,
    vocabulary: Vocabulary,
) -> Rollout:
    """Samples the continuation of every prompt's prefix.

    Args:
        step: completed updates before this one; part of the key.
        prompts: (slot in the global step, prompt) of this process.
        prefixes: teacher-written ids per prompt, shared by its rollouts; [] without guidance.
    """
    rows = [
        (slot, prompt, prefix, sample)
        for (slot, prompt), prefix in zip(prompts, prefixes, strict=True)
        for sample in range(rollouts_per_prompt)
    ]
    responses = generator(
        [Request(p.ids, prefix, max_response_length, (step, slot, sample)) for slot, p, prefix, sample in rows]
    )
    longest = max((len(r) for r in responses), default=0)
    ids = torch.full((len(rows), longest), vocabulary.pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    teacher_wrote = torch.zeros_like(mask)
    for row, (response, (_, _, prefix, _)) in enumerate(zip(responses, rows, strict=True)):
        ids[row, : len(response)] = torch.tensor(response)
        mask[row, : len(response)] = True
        teacher_wrote[row, : len(prefix)] = True
    return Rollout(
        step=step,
        ids=ids,
        mask=mask,
        teacher_wrote=teacher_wrote,
        group=torch.tensor([slot for slot, *_ in rows], dtype=torch.int64),
        sample=torch.tensor([sample for *_, sample in rows], dtype=torch.int64),
        ended=torch.tensor([bool(r) and r[-1] in vocabulary.stop_ids for r in responses], dtype=torch.bool),
        prompt_ids=[p.ids for _, p, _, _ in rows],
        teacher_prompt_ids=[p.teacher_ids for _, p, _, _ in rows],
        prompts=[p for _, p, _, _ in rows],
    )
