"""Compares answers with math-verify, one JSON line in and one out. A script of its own; see mathematics.py."""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
from typing import Any

MEMORY_BYTES = 4 << 30


def answer(question: dict[str, Any], math_verify: Any) -> dict[str, Any]:
    """`{correct, extracted}`, or `{bad_reference}` where the reference is no expression."""
    gold = parse(math_verify, boxed(question["reference"]))
    if not gold:
        return {"bad_reference": True}
    stated = question["answer"]
    found = (parse(math_verify, boxed(stated)) or parse(math_verify, stated)) if stated is not None else None
    found = found if stated is not None else parse(math_verify, question["text"])
    if not found:
        return {"correct": False, "extracted": stated}
    correct = math_verify.verify(gold, found, timeout_seconds=None)
    return {"correct": bool(correct), "extracted": stated if stated is not None else str(found[-1])}


def boxed(expression: str) -> str:
    """What math-verify reads as one LaTeX expression."""
    return "\\boxed{" + expression.strip().strip("$").strip() + "}"


def parse(math_verify: Any, text: str) -> list[Any]:
    found: list[Any] = math_verify.parse(text, parsing_timeout=None)
    return found


def main() -> None:
    os.sys.path[:] = [p for p in sys.path if os.path.abspath(p) != os.path.dirname(os.path.abspath(__file__))]
    import math_verify

    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing a library prints is a reply
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line), math_verify)
        except (MemoryError, RecursionError):
            sys.exit(1)
        except Exception:
            reply = {"correct": False, "extracted": json.loads(line)["answer"]}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
