"""What a token adds to a text, for any tokenizer: exact bytes where its vocabulary spells them, decoding elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from .report.text import token_text

WORD_START = "\u2581"  #: how SentencePiece vocabularies write a space
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TokenTexts:
    """Texts of token ids as a token row shows them, bytes that are no whole character as <0xF0>.

    Byte-level and SentencePiece vocabularies name the exact text of every token; from any other, a token is decoded behind
    the one before it, so that it keeps its space.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._known: dict[tuple[int | None, int], str] = {}

    def sequence(self, ids: Sequence[int]) -> list[str]:
        """The texts of consecutive tokens."""
        return [self.one(token, behind=ids[place - 1] if place else None) for place, token in enumerate(ids)]

    def one(self, token: int, *, behind: int | None = None) -> str:
        """The text of one token behind another."""
        key = (behind if self._kind == "decoded" else None, token)
        if key not in self._known:
            self._known[key] = self._text(token, behind)
        return self._known[key]

    def _text(self, token: int, behind: int | None) -> str:
        name = self.tokenizer.convert_ids_to_tokens(token) or ""
        if name in self._added or self._kind == "decoded":
            return name if name in self._added else self._decoded(token, behind)
        if self._kind == "bytes" and all(character in BYTE_OF for character in name):
            return token_text(bytes(BYTE_OF[character] for character in name))
        if byte := BYTE_TOKEN.fullmatch(name):
            return token_text(bytes([int(byte[1], 16)]))
        return name.replace(WORD_START, " ")

    def _decoded(self, token: int, behind: int | None) -> str:
        alone = str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))
        if behind is None:
            return alone
        before = str(self.tokenizer.decode([behind], clean_up_tokenization_spaces=False))
        both = str(self.tokenizer.decode([behind, token], clean_up_tokenization_spaces=False))
        return both[len(before) :] if both.startswith(before) else alone

    @cached_property
    def _added(self) -> dict[str, int]:
        """Special and added tokens, which stand for themselves."""
        return self.tokenizer.get_added_vocab()

    @cached_property
    def _kind(self) -> str:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        decoder = "" if backend is None else json.dumps(json.loads(backend.to_str()).get("decoder"), ensure_ascii=False)
        if '"ByteLevel"' in decoder:
            return "bytes"
        return "words" if WORD_START in decoder else "decoded"


def _byte_level_alphabet() -> dict[str, int]:
    """The character by which byte-level vocabularies write each byte -> the byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTE_OF = _byte_level_alphabet()
