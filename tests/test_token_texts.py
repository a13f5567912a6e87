"""Texts of single tokens: exact bytes for byte-level and SentencePiece vocabularies, spaces kept for all others."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tropd_cli.demo import TEACHER
from tropd_cli.token_texts import BYTE_OF, TokenTexts

from .tiny import tiny_tokenizer


def test_byte_level_alphabet_is_that_of_tokenizers() -> None:
    assert set(BYTE_OF) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(BYTE_OF.values()) == list(range(256))
    for text in ("é", " ", "\n", "\x7f"):
        (piece, _), *_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
        assert bytes(BYTE_OF[character] for character in piece) == text.encode()


def test_parts_of_a_character_are_bytes() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    ids = tokenizer("So \U0001f600!", add_special_tokens=False)["input_ids"]
    texts = TokenTexts(tokenizer).sequence([*ids, tokenizer.eos_token_id])
    assert texts == ["So ", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "!", "<eos>"]


def sentencepiece_like() -> PreTrainedTokenizerFast:
    words = ["<unk>", "\u2581Paris", "\u2581is", "ing", "<0xF0>", "<0x9F>", "\u2581", "<|end\u2581of|>"]
    tokenizer = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end\u2581of|>")


def test_sentencepiece_words_keep_their_space_even_at_the_start() -> None:
    texts = TokenTexts(sentencepiece_like()).sequence([1, 2, 3, 4, 5, 6, 7])
    assert texts == [" Paris", " is", "ing", "<0xF0>", "<0x9F>", " ", "<|end\u2581of|>"]


def test_other_tokenizers_are_decoded_behind_the_token_before() -> None:
    texts = TokenTexts(tiny_tokenizer())
    assert texts.sequence([5, 6, 1]) == ["w2", " w3", "<eos>"]
    assert texts.one(7) == "w4" and texts.one(7, behind=5) == " w4"
