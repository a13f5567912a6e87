"""The demo task: chains of four sums and differences of two-digit numbers modulo 100, every step written out.

    What is 37+48-15-62+29 mod 100?
    First 37+48=85, then 85-15=70, then 70-62=08, then 08+29=37. The answer is 37.

Pure Python. Whether a problem belongs to training or to evaluation is a hash of its text, so the splits cannot meet.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

OPERATIONS = 4
MODULUS = 100
HELDOUT_SHARE = 8  # one problem in eight is held out
SPLITS = ("train", "heldout")

PAD, EOS = "<pad>", "<eos>"


@dataclass(frozen=True)
class Chain:
    """What the problems look like: how many sums and differences, and the bound of their operands.

    most_tokens: where a response is cut; the longest well-formed one of the demo has 47, its end token included.
    """

    operations: int = OPERATIONS
    below: int = MODULUS
    most_tokens: int = 64


DEMO_CHAIN = Chain()


@dataclass(frozen=True)
class Style:
    """The words of a response: `first` and `then` open a step, `between` parts two, `end` leads to the answer."""

    first: str
    then: str
    between: str
    end: str


TEACHER_STYLE = Style(first="First ", then="then ", between=", ", end=". The answer is ")
STUDENT_STYLE = Style(first="Take ", then="next ", between="; ", end=". So the result is ")

# One token each, with the space that follows the word in running text. Everything else is spelled in bytes.
WORDS = (
    "What is mod First then The answer Take next So the result "
    "a add all an and are as at be but by can check do equals first for from get gives good has hence how I if in it "
    "less let minus more no not now number of on one or plus problem put second so solve start step subtract sum "
    "take that there this thus to two up was we with yes you"
).split()
MARKS = (",", ";", ".", ":", "?")


def problems(split: str, count: int, seed: int, chain: Chain = DEMO_CHAIN) -> list[dict[str, str]]:
    """Draw `count` different problems of a split, always the same ones for the same seed.

    Args:
        split: "train" or "heldout"; the two share no problem, whatever the seeds.
        count: how many.
        seed: which ones.
        chain: what they look like.

    Returns:
        Rows with `prompt`, `response` (the worked solution in the teacher's words) and `answer` (two digits).

    Raises:
        ValueError: the split is neither of the two.
    """
    rows: dict[str, dict[str, str]] = {}
    for numbers in stream(split, seed, chain):
        if len(rows) >= count:
            break
        answer = f"{sum(numbers) % MODULUS:02d}"
        rows[question(numbers)] = {
            "prompt": question(numbers),
            "response": solution(numbers, TEACHER_STYLE),
            "answer": answer,
        }
    return list(rows.values())


def stream(split: str, seed: int, chain: Chain = DEMO_CHAIN) -> Iterator[list[int]]:
    """Yield the signed operands of one problem of the split after another, without end; a repeat is rare."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, allowed: {', '.join(SPLITS)}")
    draw = random.Random(f"{split}/{seed}")
    while True:
        operands = [draw.randrange(10, chain.below) for _ in range(chain.operations + 1)]
        numbers = operands[:1] + [draw.choice((1, -1)) * operand for operand in operands[1:]]
        if split_of(question(numbers)) == split:
            yield numbers


def split_of(prompt: str) -> str:
    """Name the split a prompt belongs to: a keyed hash of its text decides."""
    digest = hashlib.blake2b(prompt.encode(), digest_size=8, key=b"tropd demo").digest()
    return "heldout" if int.from_bytes(digest, "big") % HELDOUT_SHARE == 0 else "train"


def question(numbers: list[int]) -> str:
    """Write the prompt of a problem."""
    return f"What is {numbers[0]}{''.join(f'{number:+d}' for number in numbers[1:])} mod {MODULUS}?\n"


def solution(numbers: list[int], style: Style, slip: Callable[[int], int] = lambda result: result) -> str:
    """Write out every step of a problem, in the words of a style.

    Args:
        numbers: signed operands; the first is positive.
        style: the words between the numbers.
        slip: called with each step's right result, returns the one to write; the next step goes on from there.
    """
    total, steps = numbers[0], []
    for number in numbers[1:]:
        result = slip((total + number) % MODULUS)
        steps.append(f"{total:02d}{number:+d}={result:02d}")
        total = result
    return f"{style.first}{(style.between + style.then).join(steps)}{style.end}{total:02d}."


def extract_answer(text: str) -> str | None:
    """Find the two digits a response ends with, or None where it never states an answer."""
    found = re.findall(r"(?:answer|result) is (\d\d)(?!\d)", text)
    return found[-1] if found else None


def is_correct(text: str, answer: str) -> bool:
    """Say whether a response states the right answer; its steps are not looked at."""
    return extract_answer(text) == answer


def build_tokenizer() -> Tokenizer:
    """Make the tokenizer: one token per digit and known word, bytes for all else, so any text survives a round trip."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    space = "\u0120"  # how the byte-level alphabet writes a space
    words = [f"{word}{space}" for word in (*WORDS, *MARKS)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([PAD, EOS, *alphabet, *words]))}
    # ignore_merges looks a whole piece up before merging; with no merges, every other piece falls apart into bytes.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    pieces = pre_tokenizers.Split(Regex(r"[A-Za-z]+ ?|\d|[^\sA-Za-z\d] ?|\s"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(PAD, special=True), AddedToken(EOS, special=True)])
    return tokenizer
