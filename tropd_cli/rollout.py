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
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from strategies.guidance import prefix_limit

from .data import Prompt
from .models import LanguageModel, Vocabulary
from .randomness import inverse_cdf, nucleus, uniform

#: Cache layers whose rows can be taken apart.
ROWWISE = {DynamicLayer, DynamicSlidingWindowLayer}


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


class PartlyDone(StoppingCriteria):
    """Stops the whole batch as soon as a quarter of its rows are done, so that the others can go on without them."""

    def __init__(self, limit: RowLimit, stop_ids: Tensor):
        self.limit, self.stop_ids = limit, stop_ids
        self.done = torch.zeros_like(limit.limit, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        self.done = self.done | torch.isin(input_ids[:, -1], self.stop_ids) | self.limit(input_ids, scores)
        return self.done | (4 * self.done.sum() >= len(self.done))


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
    """

    language_model: LanguageModel
    vocabulary: Vocabulary
    seed: int
    stream: str
    temperature: float
    token_budget: int
    context: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    top_p: float = 1.0

    def __call__(self, requests: Sequence[Request]) -> list[list[int]]:
        results: list[list[int]] = [list(r.prefix_ids) for r in requests]
        open_rows = [i for i, r in enumerate(requests) if not self._is_complete(r.prefix_ids, r)]
        open_rows.sort(key=lambda i: (-_longest(requests[i]), -len(requests[i].prefix_ids), i))

        def write() -> None:
            left = open_rows
            while left:
                count = max(1, self.token_budget // _longest(requests[left[0]]))
                batch, left = left[:count], left[count:]
                for index, response in zip(batch, self._generate([requests[i] for i in batch]), strict=True):
                    results[index] = response

        self.language_model.run(write)
        return results

    def _is_complete(self, response: list[int], request: Request) -> bool:
        """Whether it ends in a stop id or is as long as it may be."""
        return len(response) >= request.max_length or bool(response and response[-1] in self.vocabulary.stop_ids)

    @torch.no_grad()
    def _generate(self, requests: list[Request]) -> list[list[int]]:
        """Responses of one batch. Rows leave it when they are done: `generate` runs until a quarter is, then goes on
        with the cache of the others. Contexts that several rows share are read once."""
        model, device = self.language_model.model, self.language_model.device
        contexts = [r.prompt_ids + r.prefix_ids for r in requests]
        width = max(map(len, contexts))
        responses: list[list[int]] = [[] for _ in requests]
        rows = list(range(len(requests)))
        was_training = model.training
        model.eval()
        try:
            with self.context():
                ids, mask = left_padded(contexts, self.vocabulary.pad_id, device)
                cache = self._prefilled(contexts)
                while rows:
                    open_requests = [requests[row] for row in rows]
                    written, cache = self._continued(ids, mask, cache, open_requests, width)
                    for row, tokens in zip(rows, written[:, width:].tolist(), strict=True):
                        responses[row] = requests[row].prefix_ids + self._cut(tokens, requests[row])
                    still = [n for n, row in enumerate(rows) if not self._is_complete(responses[row], requests[row])]
                    if still:
                        assert cache is not None
                        rows, kept = [rows[n] for n in still], torch.tensor(still, device=device)
                        cache.batch_select_indices(kept)
                        ids, mask = written[kept], mask[kept]
                        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
                    else:
                        rows = []
        finally:
            model.train(was_training)
        return responses

    def _continued(
        self, ids: Tensor, mask: Tensor, cache: DynamicCache | None, requests: list[Request], width: int
    ) -> tuple[Tensor, DynamicCache | None]:
        """`generate` from where the cache ends. Returns (ids with the new tokens, their cache)."""
        device = ids.device
        allowed = self.vocabulary.allowed.to(device)
        limit = RowLimit(requests, width, device)
        stopping = StoppingCriteriaList([limit])
        if cache is not None:
            stopping.append(PartlyDone(limit, torch.tensor(self.vocabulary.stop_ids, device=device)))
        output = self.language_model.model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=exact_sampling_config(int(limit.limit.max()) - ids.shape[1], self.vocabulary),
            logits_processor=LogitsProcessorList(
                [KeyedSampling(requests, width, (self.seed, self.stream), self.temperature, allowed, self.top_p)]
            ),
            stopping_criteria=stopping,
            synced_gpus=False,  # `run` keeps the processes of a sharded model together
        )
        return output, cache

    def _prefilled(self, contexts: list[list[int]]) -> DynamicCache | None:
        """The cache of all contexts but their last tokens, every different one computed once; empty where none is
        shared. None for models whose cache cannot be cut row by row."""
        language_model = self.language_model
        if not language_model.base._supports_default_dynamic_cache():
            return None
        cache = DynamicCache(config=language_model.base.config.get_text_config(decoder=True))
        if not {type(layer) for layer in cache.layers} <= ROWWISE:
            return None
        different = list(dict.fromkeys(map(tuple, contexts)))
        if len(different) < len(contexts) and max(map(len, contexts)) > 1:
            ids, mask = left_padded(different, self.vocabulary.pad_id, language_model.device)
            mask = mask[:, :-1]
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            language_model.backbone(
                input_ids=ids[:, :-1],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            place = {context: number for number, context in enumerate(different)}
            cache.batch_select_indices(torch.tensor([place[tuple(c)] for c in contexts], device=language_model.device))
        return cache

    def _cut(self, written: list[int], request: Request) -> list[int]:
        """Up to and including the first stop id, and never beyond the row's own limit. Lengths, not pads, decide."""
        for position, token in enumerate(written[: request.max_length - len(request.prefix_ids)]):
            if token in self.vocabulary.stop_ids:
                return written[: position + 1]
        return written[: request.max_length - len(request.prefix_ids)]


def left_padded(sequences: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, mask) [rows, longest], int64."""
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    return ids.to(device), mask.to(device)


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
