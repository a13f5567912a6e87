"""Two models on prompts or given texts, token by token: the engine's own rollout, scoring and credit, without an update.

Responses are made block by block, dealt to the processes, and the memory of a block is that of a few micro-batches; only
what a batch-scope strategy reads is kept to the end. Axes: N tokens of a micro-batch, K teacher top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import groupby
from math import ceil
from typing import TypeVar

import torch
from accelerate import Accelerator

from strategies import Credit, Needs, Signals

from .batching import TokenBatch, plan_micro_batches, row_lengths, token_batch
from .config import Config
from .credit_loss import CreditLoss, CreditRequest, Record, credit_record
from .crediting import batch_credit, region_uniforms, token_credit
from .data import Prompt, encode_rows, read_rows
from .dealing import in_rounds, mine
from .errors import UserError
from .inspected_strategies import Asked
from .memory import with_smaller_batches
from .pair import load_pair
from .recording import token_rows
from .report.rows import TokenRow
from .rollout import Rollout, TransformersGenerator, make_rollout
from .scoring import Scores, ScoringOptions, score_reference, score_teacher
from .session import MICRO_BATCH_TOKENS, ROLLOUT_BATCH_TOKENS

T = TypeVar("T")
#: Rows of one block: enough to fill generation batches, few enough that the first output comes soon.
BLOCK_ROWS = 64


@dataclass(frozen=True)
class Part:
    """What becomes a block: some prompts with their number in the data, and the numbers of their responses."""

    prompts: list[tuple[int, Prompt]]
    given: bool
    responses: range


@dataclass
class Block:
    """Some responses, scored. observed: what the student said per micro-batch; credits: strategy -> its credit records."""

    rollout: Rollout
    part: Part
    batches: list[TokenBatch] = field(default_factory=list)
    scores: list[Scores] = field(default_factory=list)
    observed: list[Record] = field(default_factory=list)
    credits: dict[str, list[Record]] = field(default_factory=dict)


class ModelInspector:
    """Loads a pair and its data, and yields rows.

    Args:
        config: models, data, lengths, seed, `record.top_k`; `rollouts_per_prompt` samples per prompt.
        asked: the strategies.
        most_prompts: only the first so many rows of the data.
        accelerator: knows among how many processes the work is shared.
        warn: where things to know go.

    Raises:
        UserError: models, data or texts that do not fit.
    """

    def __init__(
        self,
        config: Config,
        asked: Sequence[Asked],
        *,
        most_prompts: int | None,
        accelerator: Accelerator,
        warn: Callable[[str], None],
    ):
        self.config, self.asked, self.accelerator, self.warn = config, asked, accelerator, warn
        observed = Needs(
            teacher_logprob=True, student_entropy=True, teacher_entropy=True, teacher_top_k=config.record.top_k
        )
        self.needs = reduce(Needs.__or__, [one.strategy.needs for one in asked], observed)
        self.pair = load_pair(config, self.needs)
        self.pair.student.model.requires_grad_(False)
        self.module = CreditLoss(self.pair.student, temperature=config.temperature, chunk_tokens=config.chunk_tokens)
        self.prompts = self._load_prompts(most_prompts)
        kind = self.pair.device.type
        self.micro_batch_tokens = config.micro_batch_tokens or MICRO_BATCH_TOKENS.get(kind, 4096)
        self.rollout_tokens = config.rollout_batch_tokens or ROLLOUT_BATCH_TOKENS.get(kind, 32768)

    @property
    def given_texts(self) -> int:
        """How many rows bring their own response."""
        return sum(prompt.response is not None for prompt in self.prompts)

    @property
    def sequences(self) -> int:
        """How many responses there will be."""
        return self.given_texts + (len(self.prompts) - self.given_texts) * self.config.rollouts_per_prompt

    def rows(self, told: Callable[[int], None] = lambda _: None) -> Iterator[TokenRow]:
        """All rows, response by response, each once per strategy. Of several processes each has to go through them, and
        the first one gets them.

        Args:
            told: hears how many responses are done.
        """
        parts, count = self._parts(), self.accelerator.num_processes
        make = self._scored
        if any(one.strategy.scope == "batch" for one in self.asked):
            make = self._with_batch_credit(parts, told)
        for number, rows in enumerate(in_rounds(self.accelerator, parts, lambda part: self._rows(make(part)))):
            told(parts[min((number + 1) * count, len(parts)) - 1].responses.stop)
            yield from rows

    # ── texts ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _load_prompts(self, most: int | None) -> list[Prompt]:
        assert self.config.data is not None
        skip = self.config.skip_bad_rows
        rows, problems = read_rows(self.config.data, skip_bad_rows=skip)
        prompts, problems = encode_rows(rows[:most], self.pair.prompt_format, problems, skip_bad_rows=skip)
        if problems:
            self.warn(f"{self.config.data}: {len(problems)} bad rows skipped, first: {problems[0]}")
        return prompts

    def _parts(self) -> list[Part]:
        """At most BLOCK_ROWS responses each, and equally many, so that every process has its share of every round."""
        parts, first = [], 0
        for given, group in groupby(enumerate(self.prompts), key=lambda item: item[1].response is not None):
            prompts, samples = list(group), 1 if given else self.config.rollouts_per_prompt
            most = max(1, BLOCK_ROWS // samples)
            blocks = ceil(len(prompts) / most / self.accelerator.num_processes) * self.accelerator.num_processes
            size = ceil(len(prompts) / blocks)
            for start in range(0, len(prompts), size):
                some = prompts[start : start + size]
                parts.append(Part(some, given, range(first, first + len(some) * samples)))
                first = parts[-1].responses.stop
        return parts

    def _written(self, prompts: list[tuple[int, Prompt]]) -> Rollout:
        """The student's samples, under the keys of a run's first step."""
        c = self.config

        def write(token_budget: int) -> Rollout:
            generator = TransformersGenerator(
                self.pair.student, self.pair.vocabulary, seed=c.seed, stream="student", temperature=c.temperature,
                token_budget=token_budget, context=self.pair.autocast,
            )  # fmt: skip
            return make_rollout(
                0, prompts, [[] for _ in prompts], generator, rollouts_per_prompt=c.rollouts_per_prompt,
                max_response_length=c.max_response_length, vocabulary=self.pair.vocabulary,
            )  # fmt: skip

        longest = max(len(p.ids) for _, p in prompts) + c.max_response_length
        rollout, self.rollout_tokens = self._shrinking(write, self.rollout_tokens, longest, "rollout_batch_tokens")
        return rollout

    def _given(self, prompts: list[tuple[int, Prompt]]) -> Rollout:
        """The texts that the rows bring, as they are: no end token is added."""
        responses = [self._encode(prompt) for _, prompt in prompts]
        mask = torch.zeros(len(responses), max(map(len, responses)), dtype=torch.bool)
        ids = torch.full(mask.shape, self.pair.vocabulary.pad_id, dtype=torch.int64)
        for row, response in enumerate(responses):
            ids[row, : len(response)] = torch.tensor(response)
            mask[row, : len(response)] = True
        return Rollout(
            step=0,
            ids=ids,
            mask=mask,
            teacher_wrote=torch.zeros_like(mask),
            group=torch.tensor([slot for slot, _ in prompts]),
            sample=torch.zeros(len(prompts), dtype=torch.int64),
            ended=torch.zeros(len(prompts), dtype=torch.bool),
            prompt_ids=[p.ids for _, p in prompts],
            teacher_prompt_ids=[p.teacher_ids for _, p in prompts],
            prompts=[p for _, p in prompts],
        )

    def _encode(self, prompt: Prompt) -> list[int]:
        where = f"{self.config.data}, row {prompt.index + 1}"
        ids = list(self.pair.tokenizer(prompt.response, add_special_tokens=False)["input_ids"])
        if not ids:
            raise UserError(f"{where}: `response` is empty. Leave the field out to have the student write one")
        foreign = [i for i in ids if i >= len(self.pair.vocabulary.allowed) or not self.pair.vocabulary.allowed[i]]
        if foreign:
            name = self.pair.tokenizer.convert_ids_to_tokens(foreign[0])
            raise UserError(f"{where}: `response` holds {name!r}, a token that only one of the two models knows")
        for model in (self.pair.student, self.pair.teacher):
            length = max(len(prompt.ids), len(prompt.teacher_ids)) + len(ids)
            if model.context_length is not None and length > model.context_length:
                raise UserError(
                    f"{where}: prompt and response have {length} tokens, '{model.name}' has a context of "
                    f"{model.context_length}. Shorten the text"
                )
        return ids

    # ── scores and credit ───────────────────────────────────────────────────────────────────────────────────────────

    def _scored(self, part: Part) -> Block:
        rollout = self._given(part.prompts) if part.given else self._written(part.prompts)
        lengths = row_lengths(rollout)

        def attempt(token_budget: int) -> Block:
            done = Block(rollout, part)
            for rows in plan_micro_batches(lengths, token_budget, packed=self.pair.packs):
                self._observe(done, rows)
            return done

        result, self.micro_batch_tokens = self._shrinking(
            attempt, self.micro_batch_tokens, max(lengths), "micro_batch_tokens"
        )
        return result

    @torch.no_grad()
    def _observe(self, block: Block, rows: list[int]) -> None:
        """One micro-batch: the teacher's scores, then one student forward in which every strategy sees every chunk."""
        c, pair = self.config, self.pair
        options = ScoringOptions(c.temperature, pair.vocabulary.allowed, rank=True, chunk_tokens=c.chunk_tokens)
        batch = token_batch(block.rollout, rows, pad_id=pair.vocabulary.pad_id, packed=pair.packs).to(pair.device)
        scores = score_teacher(pair.teacher, batch.to(pair.teacher.device), self.needs, options).to(pair.device)
        if pair.reference is not None:
            logprob = score_reference(pair.reference, batch.to(pair.reference.device), options)
            scores = scores.replace(reference_logprob=logprob.to(pair.device))
        pieces: dict[str, list[Record]] = {o.label: [] for o in self.asked if o.strategy.scope == "token"}

        def credit_of(signals: Signals, where: slice) -> Credit:
            for one in self.asked:
                if one.label in pieces:
                    credit = token_credit(one.strategy, c.guidance.weight)(signals, where)
                    pieces[one.label].append(credit_record(credit))
            return Credit(sampled=torch.zeros_like(signals.student_logprob))

        request = CreditRequest(
            needs=self.needs,
            credit_of=credit_of,
            uniforms=region_uniforms(c.seed, batch),
            observe_top_k=self.needs.teacher_top_k,
        )
        with pair.autocast():
            _, record = self.module(batch, scores, request)
        scores.teacher_full = None  # holds the hidden states of the micro-batch
        block.batches.append(batch)
        block.scores.append(scores)
        block.observed.append(record)
        for label, parts in pieces.items():
            joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            block.credits.setdefault(label, []).append(joined)

    def _with_batch_credit(self, parts: Sequence[Part], told: Callable[[int], None]) -> Callable[[Part], Block]:
        """Every block of this process, with the credit of strategies that look at the rows of all processes."""
        blocks = {}
        for part in mine(self.accelerator, parts):
            blocks[part.responses] = self._scored(part)
            told(part.responses.stop)
        for one in self.asked:
            if one.strategy.scope == "batch":
                self._add_batch_credit(list(blocks.values()), one)
        return lambda part: blocks[part.responses]

    def _add_batch_credit(self, blocks: Sequence[Block], one: Asked) -> None:
        made = batch_credit(
            one.strategy,
            [batch for block in blocks for batch in block.batches],
            [scores for block in blocks for scores in block.scores],
            [record for block in blocks for record in block.observed],
            seed=self.config.seed,
            progress=0.0,
            guidance_weight=self.config.guidance.weight,
        )
        credits = iter(made)
        for block in blocks:
            block.credits[one.label] = [credit_record(next(credits)) for _ in block.batches]

    # ── rows ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _rows(self, block: Block) -> Iterator[TokenRow]:
        """Response by response, so that their order does not depend on how they were cut into blocks."""
        for once_per_strategy in zip(*(self._rows_under(block, one) for one in self.asked), strict=True):
            for rows in once_per_strategy:
                yield from rows

    def _rows_under(self, block: Block, one: Asked) -> Iterator[list[TokenRow]]:
        records = [o | credit for o, credit in zip(block.observed, block.credits[one.label], strict=True)]
        rows = token_rows(
            block.rollout,
            block.batches,
            block.scores,
            records,
            tokenizer=self.pair.tokenizer,
            kept=dict(enumerate(block.part.responses)),
            top_k=self.config.record.top_k,
            seed=self.config.seed,
        )
        for _, response in groupby(rows, key=lambda row: row.sequence):
            named = list(response)
            for row in named:
                row.strategy = one.label if len(self.asked) > 1 else None
            if block.part.given:
                named[-1].finish = "given"
            yield named

    def _shrinking(self, action: Callable[[int], T], budget: int, smallest: int, knob: str) -> tuple[T, int]:
        return with_smaller_batches(action, budget, smallest=smallest, knob=knob, warn=self.warn)
