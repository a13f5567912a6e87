"""`math`: equality of mathematical expressions, decided by math-verify in a process of its own.

A process because an answer can hang it in ways that no signal ends (9^{9^{9^9}}) and because math-verify's own time
limit works in the main thread only.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import re
import selectors
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tropd_cli.errors import UserError

from .answers import after_thinking, last_announced, last_box, unwrapped
from .base import VERIFIERS, Verdict, no_answer

WORKER = Path(__file__).with_name("math_worker.py")
THIN_SPACE = re.compile(r"(?<=\d)(?:\\[,!;: ]|[\u00a0\u202f])(?=\d{3}(?!\d))")  # between thousands
BOLD_NUMBER = re.compile(r"^\\(?:text|textbf|mathbf|mathrm)\s*\{\s*\(?(-?[\d.,]+)\)?\s*\}$")
START_SECONDS = 60.0
ANSWER_CHARACTERS = 2000  # nobody's answer is longer; a parser's worst case may be
TEXT_CHARACTERS = 4000  # where no answer is announced, the end of the text is searched


@VERIFIERS.register("math")
@dataclass(frozen=True)
class Math:
    """The answer is the same number, set, interval, tuple or expression as the reference.

    The answer is the last box, else what follows the last "the answer is" or "####", else what math-verify finds in
    the text. A completion that takes longer than `seconds` is wrong.
    """

    seconds: float = 10.0
    fields: ClassVar[tuple[str, ...]] = ("answer",)
    optional: ClassVar[tuple[str, ...]] = ()
    executes_code: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.seconds <= 0:
            raise ValueError(f"seconds is {self.seconds}; it must be positive")
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("the verifier 'math' needs math-verify, which is not installed: pip install 'tropd[eval]'")

    def verify(self, completion: str, reference: Any) -> Verdict:
        text = after_thinking(completion)
        if not text.strip():
            return no_answer(text)
        answer = last_box(text) or last_announced(text)
        plain = None if answer is None else BOLD_NUMBER.sub(r"\1", THIN_SPACE.sub("", unwrapped(answer)))
        question = {"reference": str(reference), "answer": plain, "text": text[-TEXT_CHARACTERS:]}
        if answer is not None and len(answer) > ANSWER_CHARACTERS:
            return Verdict(False, answer[:100], f"the answer has {len(answer)} characters")
        reply = WORKERS.ask(question, self.seconds)
        if reply is None:
            return Verdict(False, answer, f"comparing it took longer than {self.seconds:g} s or too much memory")
        if "bad_reference" in reply:
            raise ValueError(f"math-verify finds no expression in the reference {reference!r}")
        found = answer if answer is not None else reply["extracted"]
        if found is None:
            return no_answer(text)
        return Verdict(reply["correct"], found, "equal" if reply["correct"] else f"{found} is not {reference}")


class Worker:
    """One process that answers one question at a time; started on first use, replaced when it hangs or dies."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """The answer to a question, or None when there was none within `seconds`."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.process = self.start()
            try:
                assert self.process.stdin is not None
                self.process.stdin.write(json.dumps(question).encode() + b"\n")
                self.process.stdin.flush()
                line = self.read_line(seconds)
            except BrokenPipeError:
                line = None
            if line is None:
                self.stop()
                return None
            reply: dict[str, Any] = json.loads(line)
            return reply

    def start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(WORKER)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        if self.read_line(START_SECONDS) is None:
            self.stop()
            raise UserError(f"math-verify did not start within {START_SECONDS:g} s. Try: {' '.join(command)}")
        return self.process

    def read_line(self, seconds: float) -> bytes | None:
        """The next line of the process, None at its end or after `seconds`."""
        assert self.process is not None and self.process.stdout is not None
        descriptor, line, deadline = self.process.stdout.fileno(), b"", time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                part = os.read(descriptor, 1 << 16)
                if not part:
                    return None
                line += part
        return line

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None


WORKERS = Worker()
atexit.register(WORKERS.stop)
