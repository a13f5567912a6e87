"""Teacher responses, of which the first tokens become guidance prefixes. Made once per prompt, kept on disk, reused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .data import Prompt
from .models import Vocabulary
from .rollout import Generator, Request, draw_prefix_length
from .run_directory import cut_torn_line, read_json_lines


class TeacherPrefixes:
    """Draws every prompt's prefix of a step.

    Args:
        folder: cache of a run directory; one file per process, read by all when the run starts.
        generator: writes responses with the teacher.
        rank: number of this process.
        seed, rule: of the prefix length.
    """

    def __init__(
        self, folder: Path, generator: Generator, *, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary, seed: int,
        rule: str, rank: int,
    ) -> None:  # fmt: skip
        self.generator, self.tokenizer, self.vocabulary = generator, tokenizer, vocabulary
        self.seed, self.rule = seed, rule
        self.folder, self.path = folder, folder / f"process-{rank}.jsonl"
        self.keeping = True
        self._known: dict[int, list[int]] | None = None

    @property
    def known(self) -> dict[int, list[int]]:
        """Responses by prompt index, read from all processes' files at first use."""
        if self._known is None:
            self.folder.mkdir(exist_ok=True)
            self._known = {}
            cut_torn_line(self.path)
            for path in sorted(self.folder.glob("process-*.jsonl")):
                for index, ids in _read_cache(path).items():
                    self._known[index] = max(self._known.get(index, []), ids, key=len)
        return self._known

    def _is_long_enough(self, response: list[int] | None, limit: int) -> bool:
        return bool(response) and (len(response) >= limit or response[-1] in self.vocabulary.stop_ids)

    def draw(self, step: int, prompts: Sequence[tuple[int, Prompt]], limit: int) -> list[list[int]]:
        """Prefix ids per (slot, prompt); the limit is the longest prefix of this step.

        A response is only made as long as the limit asks, and made again, with the same tokens and more of them, when
        a later limit asks for more: keyed sampling makes the same tokens whatever the length.
        """
        if limit == 0:
            return [[] for _ in prompts]
        self._complete([prompt for _, prompt in prompts], limit)
        prefixes = []
        for slot, prompt in prompts:
            response = self.known[prompt.index]
            length = draw_prefix_length(
                self.seed, step, slot, response_length=len(response), limit=limit, rule=self.rule
            )
            prefixes.append(response[:length])
        return prefixes

    def responses(self, prompts: Sequence[Prompt], limit: int) -> list[list[int]]:
        """The teacher's response to each prompt, at most `limit` tokens."""
        self._complete(list(prompts), limit)
        return [self.known[prompt.index][:limit] for prompt in prompts]

    def _complete(self, prompts: list[Prompt], limit: int) -> None:
        missing = {p.index: p for p in prompts if not self._is_long_enough(self.known.get(p.index), limit)}
        made: dict[int, list[int]] = {}
        for prompt in [p for p in missing.values() if p.response is not None]:
            made[prompt.index] = encode_response(str(prompt.response), self.tokenizer, self.vocabulary)
        to_write = [p for p in missing.values() if p.response is None]
        responses = self.generator([Request(p.teacher_ids, [], limit, (0, p.index, 0)) for p in to_write])
        made.update(zip((p.index for p in to_write), responses, strict=True))
        self.known.update(made)
        if made and self.keeping:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps({"prompt": i, "ids": ids}) + "\n" for i, ids in made.items())
            except OSError:  # a full disk: a run can do without this file, and nothing may follow a torn line
                self.keeping = False


def encode_response(text: str, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary) -> list[int]:
    """Tokens of a ready response, ended by a stop id."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    stop = next((place for place, token in enumerate(ids) if token in vocabulary.stop_ids), None)
    if stop is not None:
        return ids[: stop + 1]
    end = tokenizer.eos_token_id
    end = end if end in vocabulary.stop_ids else vocabulary.stop_ids[0]
    return [*ids, end]


def _read_cache(path: Path) -> dict[int, list[int]]:
    """Cached responses up to the first torn line: another process may be writing its own file right now."""
    return {int(row["prompt"]): list(row["ids"]) for row in read_json_lines(path)}
