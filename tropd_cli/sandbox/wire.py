"""Plain values between two processes that do not trust each other: length-prefixed JSON with tags, never pickle.

Decoding builds instances of built-in types only, so that nothing the other side sends can bring its own `__eq__`.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

MESSAGE_BYTES = 64 << 20  # the longest message either side accepts
JSON_INT = 2**63  # longer integers travel as hexadecimal, which has no digit limit

TAG, VALUE = "type", "value"


def encode(value: Any, unknown: Callable[[Any], Any]) -> Any:
    """`value` as JSON; subclasses travel as their base type; `unknown(value)` gives the value of a `remote` tag."""
    if value is None or isinstance(value, (bool, str)):
        return value if not isinstance(value, str) else str.__str__(value)
    if isinstance(value, int):
        number = int.__int__(value)
        return number if abs(number) < JSON_INT else {TAG: "int", VALUE: hex(number)}
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, list):
        return [encode(item, unknown) for item in value]
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {TAG: kind.__name__, VALUE: [encode(item, unknown) for item in value]}
    if isinstance(value, dict):
        pairs = [[encode(k, unknown), encode(v, unknown)] for k, v in value.items()]
        return {TAG: "dict", VALUE: pairs}
    for kind in (bytes, bytearray):
        if isinstance(value, kind):
            return {TAG: kind.__name__, VALUE: value.hex()}
    if isinstance(value, complex):
        return {TAG: "complex", VALUE: [value.real, value.imag]}
    if isinstance(value, range):
        return {TAG: "range", VALUE: [value.start, value.stop, value.step]}
    for kind in (Decimal, Fraction):
        if isinstance(value, kind):
            return {TAG: kind.__name__, VALUE: str(value)}
    return {TAG: "remote", VALUE: unknown(value)}


def decode(data: Any, remote: Callable[[Any], Any]) -> Any:
    """The reverse of `encode`; `remote` turns the value of a `remote` tag into an object."""
    if isinstance(data, list):
        return [decode(item, remote) for item in data]
    if not isinstance(data, dict):
        return data
    value = data[VALUE]
    readers: dict[str, Callable[[], Any]] = {
        "int": lambda: int(value, 16),
        "tuple": lambda: tuple(decode(value, remote)),
        "set": lambda: set(decode(value, remote)),
        "frozenset": lambda: frozenset(decode(value, remote)),
        "dict": lambda: {decode(k, remote): decode(v, remote) for k, v in value},
        "bytes": lambda: bytes.fromhex(value),
        "bytearray": lambda: bytearray.fromhex(value),
        "complex": lambda: complex(*value),
        "range": lambda: range(*value),
        "Decimal": lambda: Decimal(value),
        "Fraction": lambda: Fraction(value),
        "remote": lambda: remote(value),
    }
    return readers[data[TAG]]()


def send(channel: int, message: Any) -> None:
    """Writes one message. Raises BrokenPipeError when the other side is gone."""
    body = json.dumps(message).encode()
    data = memoryview(struct.pack("!I", len(body)) + body)
    while data:
        data = data[os.write(channel, data) :]


def receive(channel: int) -> Any:
    """Reads one message. Raises EOFError when the other side is gone, ValueError when it sent no message."""
    (length,) = struct.unpack("!I", _read(channel, 4))
    if length > MESSAGE_BYTES:
        raise ValueError(f"message of {length} bytes")
    return json.loads(_read(channel, length))


def _read(channel: int, count: int) -> bytes:
    parts = []
    while count:
        part = os.read(channel, min(count, 1 << 20))
        if not part:
            raise EOFError("the other process ended")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)
