"""Where a completion states its answer. Pure string functions without a library.

The rules, in this order: text before the end of a thinking block does not count; the last box wins; then the last
announcement ("the answer is", "####"); what neither has is left to the verifier.
"""

from __future__ import annotations

import re

THINKING_END = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{")
ANNOUNCED = re.compile(
    r"####\s*|\b(?:answer|result)(?:\s+(?:to|of|for)\s+(?:the|this)\s+(?:problem|question))?"
    r"\s+(?:is|equals|are|will be|would be|must be)\b\s*:?|(?P<label>\banswer\W{0,3}:)",
    re.IGNORECASE,
)
LABEL_WORDS = 12  # "Answer: ..." that goes on longer, or into a second sentence, is the start of an explanation
SENTENCE_END = re.compile(r"\n|[.!?](?=\s|$)(?<!\d\.(?=\d))")
FORMULA = re.compile(r"\$[^$]+\$|\\\(.+?\\\)")
WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"), ("__", "__"))


def after_thinking(text: str) -> str:
    """The part after the last end of a thinking block, or all of it."""
    return THINKING_END.split(text)[-1]


def last_box(text: str) -> str | None:
    """Content of the last complete `\\boxed{...}`, of the inner one where boxes are nested; None without any."""
    content = None
    for start in BOX.finditer(text):
        end = closing_brace(text, start.end())
        if end is not None and text[start.end() : end].strip():
            content = text[start.end() : end].strip()
    return content


def closing_brace(text: str, start: int) -> int | None:
    """Position of the brace that closes the one before `start`; None if the text ends first. Escaped braces are text."""
    depth, position = 1, start
    while position < len(text):
        if text[position] == "\\":
            position += 1
        elif text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if not depth:
                return position
        position += 1
    return None


def last_announced(text: str) -> str | None:
    """What follows the last "the answer is" or "####", to the end of its sentence; None without any."""
    found = None
    for announcement in ANNOUNCED.finditer(text):
        rest = text[announcement.end() :].lstrip(" *:_\n")
        display = rest.startswith(("$$", "\\["))
        sentence = rest if display else SENTENCE_END.split(rest, maxsplit=1)[0]
        line = rest.partition("\n")[0]
        if announcement["label"] and (len(line.split()) > LABEL_WORDS or len(line) > len(sentence) + 2):
            continue
        formulas = FORMULA.findall(sentence)
        found = unwrapped(formulas[0] if len(formulas) == 1 else sentence) or found
    return found


def unwrapped(text: str) -> str:
    """Without blanks, final punctuation and the marks of mathematics or emphasis around the whole."""
    text = text.strip()
    for _ in range(4):
        before = text
        text = text.rstrip(" .,;:").strip() if not text.endswith(("\\,", "\\!", "\\;", "\\:")) else text
        for left, right in WRAPPERS:
            inner = text[len(left) : len(text) - len(right)]
            if text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right):
                text = inner.strip() if left not in inner else text
        if text == before:
            break
    return text
