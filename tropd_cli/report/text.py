"""Model text made visible and harmless: no control, format or private character survives, every space can be seen."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

NEWLINE, TAB, SPACE = "⏎", "⇥", "·"
PART = "⋯"  #: a token without text of its own: some bytes of a character that a neighbour shows
DOTTED_CIRCLE = "◌"
CONTROL_NAMES = (  # of the codes 0 to 31, then of 127
    "NUL SOH STX ETX EOT ENQ ACK BEL BS HT LF VT FF CR SO SI DLE DC1 DC2 DC3 DC4 NAK SYN ETB CAN EM SUB ESC FS GS RS US DEL"
).split()
MOST_MARKS = 3  #: combining marks on one character; more would be drawn over the neighbouring lines
#: A byte outside ASCII that is no whole character by itself, as a token row writes it.
BYTE = re.compile(r"<0x([89A-F][0-9A-F])>")


def token_text(raw: bytes) -> str:
    """A token's bytes as the `token` field of its row: UTF-8 where it decodes, <0xF0> for every byte that does not."""
    return "".join(f"<0x{piece[0]:02X}>" if bad else piece.decode() for piece, bad in _characters(raw))


def visible(text: str) -> str:
    """`text` on one line, with every character that would act instead of show replaced by a sign for it.

    A space stays a space between words; alone in its text or doubled it becomes a middle dot.
    """
    shown = "".join(map(_sign, text))
    if text == " " or "  " in shown:
        shown = re.sub(r"^ $| {2,}", lambda spaces: SPACE * len(spaces[0]), shown)
    return shown if shown.isascii() else _with_few_marks(shown)


def visible_tokens(texts: Sequence[str]) -> list[str]:
    """`visible` of consecutive tokens, with characters whose bytes are spread over tokens put together again.

    Such a character is shown by the token that begins it, the others show `PART`; bytes that never become a
    character show as ⟨F0⟩.
    """
    if not any(BYTE.search(text) for text in texts):
        return [visible(text) or PART for text in texts]
    raw = [_raw_bytes(text) for text in texts]
    owner = [index for index, part in enumerate(raw) for _ in part]
    pieces: list[list[str]] = [[] for _ in texts]
    place = 0
    for piece, bad in _characters(b"".join(raw)):
        pieces[owner[place]].append(f"⟨{piece[0]:02X}⟩" if bad else piece.decode())
        place += len(piece)
    return [visible("".join(piece)) or PART for piece in pieces]


def _raw_bytes(text: str) -> bytes:
    parts = BYTE.split(text)  # text, byte, text, byte, ..., text
    return b"".join(
        bytes([int(part, 16)]) if odd % 2 else part.encode("utf-8", "replace") for odd, part in enumerate(parts)
    )


def _characters(data: bytes) -> Iterator[tuple[bytes, bool]]:
    """(the bytes of one character, False) or (one byte that belongs to none, True), from start to end."""
    place = 0
    while place < len(data):
        lead = data[place]
        length = 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
        piece = data[place : place + length]
        try:
            piece.decode()
            bad = False
        except UnicodeDecodeError:
            piece, bad = piece[:1], True
        yield piece, bad
        place += len(piece)


def _sign(character: str) -> str:
    if " " <= character <= "~":
        return character
    if character == "\n":
        return NEWLINE
    if character == "\t":
        return TAB
    code = ord(character)
    if code < 0x20 or code == 0x7F:
        return f"⟨{CONTROL_NAMES[min(code, 0x20)]}⟩"
    if unicodedata.category(character) in ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"):
        return f"⟨U+{code:04X}⟩"
    return character


def _with_few_marks(text: str) -> str:
    """Gives a leading combining mark something to stand on, and spells out marks piled on one character."""
    shown, marks = [], 0
    for character in text:
        marks = marks + 1 if unicodedata.category(character)[0] == "M" else 0
        if marks and not shown:
            shown.append(DOTTED_CIRCLE)
        shown.append(character if marks <= MOST_MARKS else f"⟨U+{ord(character):04X}⟩")
    return "".join(shown)
