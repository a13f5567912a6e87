"""What the frozen models say about a rollout's tokens: nothing more than a strategy declared. No gradient.

Axes: N valid response tokens, K teacher top-k, V vocabulary, c tokens of one chunk, r of one block. Units: nats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from strategies import Needs

from .batching import TokenBatch
from .models import Head, LanguageModel
from .packing import packed_hidden

#: Size of one [c, V] float32 chunk in bytes: what a matrix product makes at once. Small ones waste the processor.
CHUNK_BYTES = {"cpu": 256 * 2**20, "cuda": 512 * 2**20}
#: Size of one [r, V] block of a chunk in bytes, on a CPU per thread: what is worked on between two products. Small enough
#: for a CPU's cache; on a GPU the whole chunk.
BLOCK_BYTES = {"cpu": 4 * 2**20, "cuda": CHUNK_BYTES["cuda"]}


@dataclass
class Scores:
    """Per-token results of the frozen models, [N] or [N, K]; None where not asked for.

    teacher_topk_ids [N, K] int64. teacher_rank [N]: 0 when the sampled token is the teacher's first choice.
    teacher_full: slice -> [c, V of the student] log p, for strategies that read full distributions.
    """

    teacher_logprob: Tensor
    teacher_entropy: Tensor | None = None
    teacher_topk_logprob: Tensor | None = None
    teacher_topk_ids: Tensor | None = None
    teacher_rank: Tensor | None = None
    reference_logprob: Tensor | None = None
    teacher_full: Callable[[slice], Tensor] | None = None

    def to(self, device: torch.device) -> Scores:
        """Moved to the student's device; `teacher_full` moves its chunks itself."""
        return Scores(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()})

    def replace(self, **tensors: Tensor | None) -> Scores:
        return replace(self, **tensors)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ScoringOptions:
    """temperature tempers p; allowed [V of the student] bool: ids that may stand in top-k; rank: compute teacher_rank."""

    temperature: float
    allowed: Tensor
    rank: bool = False
    chunk_tokens: int | None = None


def rows_of_chunk(vocabulary: int, device: torch.device, chunk_tokens: int | None = None) -> int:
    """Tokens whose [c, V] float32 logits stay within the budget of the device, or as many as `chunk_tokens` says."""
    return chunk_tokens or max(16, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * vocabulary))


def rows_of_block(vocabulary: int, device: torch.device) -> int:
    """Tokens that are worked on at once between two products."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    return threads * max(1, BLOCK_BYTES.get(device.type, BLOCK_BYTES["cuda"]) // (4 * vocabulary))


def chunk_slices(count: int, vocabulary: int, device: torch.device, chunk_tokens: int | None = None) -> Iterator[slice]:
    """Cuts N tokens into chunks."""
    size = rows_of_chunk(vocabulary, device, chunk_tokens)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def chunk_buffers(slices: list[slice], hidden: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """A [c, V] tensor of the largest chunk and a [r, V] one of a block, used again for every chunk: fresh ones cost page
    faults on a CPU."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    chunk = max((where.stop - where.start for where in slices), default=0)
    block = min(chunk, rows_of_block(vocabulary, hidden.device))
    return hidden.new_empty((chunk, vocabulary), dtype=dtype), hidden.new_empty((block, vocabulary), dtype=dtype)


def blocks_of(chunk: Tensor, scratch: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, those rows of the chunk, as many rows of scratch) from top to bottom."""
    for start in range(0, len(chunk), max(1, len(scratch))):
        rows = slice(start, min(start + len(scratch), len(chunk)))
        yield rows, chunk[rows], scratch[: rows.stop - rows.start]


def response_hidden(language_model: LanguageModel, batch: TokenBatch, *, as_teacher: bool = False) -> Tensor:
    """[N, H] hidden states that predict the response tokens, after the student's or the teacher's prompt. Right padding
    needs no attention mask: causal rows never see it."""
    inputs = batch.teacher_inputs if as_teacher else batch.inputs
    lengths = batch.teacher_lengths if as_teacher else batch.lengths
    backbone = language_model.backbone
    hidden: Tensor = (
        backbone(input_ids=inputs, use_cache=False).last_hidden_state
        if lengths is None
        else packed_hidden(backbone, inputs, lengths)
    )
    return hidden.reshape(-1, hidden.shape[-1])[batch.teacher_predicts if as_teacher else batch.predicts]


@torch.no_grad()
def score_teacher(teacher: LanguageModel, batch: TokenBatch, needs: Needs, options: ScoringOptions) -> Scores:
    """Teacher log-probability of every sampled token, and whatever else `needs` declares, in one forward.

    Args:
        needs: teacher_entropy, teacher_top_k and full_distribution are looked at; teacher_logprob always comes.
    """
    head = teacher.head
    hidden = response_hidden(teacher, batch, as_teacher=True)
    k = min(needs.teacher_top_k, int(options.allowed.sum()))
    forbidden = _forbidden(options.allowed, teacher.vocabulary, hidden.device)
    parts: dict[str, list[Tensor]] = {}

    def keep(name: str, value: Tensor) -> None:
        parts.setdefault(name, []).append(value)

    slices = list(chunk_slices(len(batch), teacher.vocabulary, hidden.device, options.chunk_tokens))
    buffers = chunk_buffers(slices, hidden, teacher.vocabulary)
    for where in slices:
        chunk = head.logits(hidden[where], buffers[0])
        if options.temperature != 1.0:
            chunk.div_(options.temperature)
        for rows, logits, scratch in blocks_of(chunk, buffers[1]):
            logits.sub_(logits.amax(-1, keepdim=True))
            sampled = logits.gather(1, batch.token_ids[where][rows].unsqueeze(1))
            probability = torch.exp(logits, out=scratch)
            mass = probability.sum(-1, keepdim=True)
            normaliser = mass.log()
            keep("teacher_logprob", (sampled - normaliser).squeeze(1))
            if needs.teacher_entropy:
                keep("teacher_entropy", (normaliser - probability.mul_(logits).sum(-1, keepdim=True) / mass).squeeze(1))
            if options.rank:
                keep("teacher_rank", (logits > sampled).sum(-1, dtype=torch.int32))  # int64 would double the block
            if k:
                if forbidden is not None:
                    logits.masked_fill_(forbidden, -torch.inf)
                values, ids = logits.topk(k, dim=-1)
                keep("teacher_topk_logprob", values - normaliser)
                keep("teacher_topk_ids", ids)
    if not len(batch):
        return _empty_scores(needs, k, hidden)
    scores = Scores(**{name: torch.cat(values) for name, values in parts.items()})
    if needs.full_distribution:
        width = options.allowed.shape[0]
        scores.teacher_full = lambda where: _full_logprobs(head, hidden[where], options.temperature, width)
    return scores


@torch.no_grad()
def score_reference(reference: LanguageModel, batch: TokenBatch, options: ScoringOptions) -> Tensor:
    """[N] log-probability of every sampled token under the reference model, which sees the student's prompt."""
    head = reference.head
    hidden = response_hidden(reference, batch)
    parts = [hidden.new_zeros(0, dtype=torch.float32)]
    for where in chunk_slices(len(batch), reference.vocabulary, hidden.device, options.chunk_tokens):
        logits = head(hidden[where]) / options.temperature
        sampled = logits.gather(1, batch.token_ids[where].unsqueeze(1))
        parts.append((sampled - logits.logsumexp(-1, keepdim=True)).squeeze(1))
    return torch.cat(parts)


def _forbidden(allowed: Tensor, vocabulary: int, device: torch.device) -> Tensor | None:
    """[V of the teacher] bool: ids that must not stand in top-k, or None when there are none."""
    width = min(allowed.shape[0], vocabulary)
    forbidden = torch.ones(vocabulary, dtype=torch.bool)
    forbidden[:width] = ~allowed[:width].cpu()
    return forbidden.to(device) if bool(forbidden.any()) else None


def _full_logprobs(head: Head, hidden: Tensor, temperature: float, width: int) -> Tensor:
    """[c, width] log p, cut or padded with log 0 to the student's vocabulary after its own softmax."""
    with torch.no_grad():
        logprobs = (head(hidden) / temperature).log_softmax(-1)[:, :width]
        return torch.nn.functional.pad(logprobs, (0, width - logprobs.shape[1]), value=-torch.inf)


def _empty_scores(needs: Needs, k: int, hidden: Tensor) -> Scores:
    nothing = hidden.new_zeros(0, dtype=torch.float32)
    lists = hidden.new_zeros((0, k), dtype=torch.float32)
    return Scores(
        teacher_logprob=nothing,
        teacher_entropy=nothing if needs.teacher_entropy else None,
        teacher_topk_logprob=lists if k else None,
        teacher_topk_ids=lists.long() if k else None,
        teacher_full=(lambda where: nothing) if needs.full_distribution else None,
    )
