"""What runs inside a box: a program, or the two parties of a test, which never share a process.

`worker` holds the untrusted code and answers calls. `judge` holds the tests and sees of the worker only plain values,
so code that exits, prints, patches built-ins or looks up the stack finds neither the expected values nor the verdict.
"""

from __future__ import annotations

import builtins
import importlib
import os
import sys
import traceback
from types import CodeType, FrameType, ModuleType
from typing import Any

import wire

REASON_CHARACTERS = 300


def run_program(job: dict[str, Any]) -> None:
    """Runs `source` as a script would be; an uncaught exception prints its traceback and exits with 1."""
    module = ModuleType("__main__")
    sys.modules["__main__"] = module
    exec(compile(job["source"], "solution.py", "exec"), module.__dict__)


def run_worker(job: dict[str, Any]) -> None:
    """Defines `source` and answers the judge: get a name, call, attribute, iterate. Ends with the judge."""
    channel: int = job["channel"]
    module = ModuleType("solution")
    sys.modules["solution"] = module
    try:
        exec(compile_longest(job["source"], job["keep_lines"]), module.__dict__)
    except BaseException as error:
        wire.send(channel, {"error": type(error).__name__, "message": one_line(error)})
        return
    wire.send(channel, {"names": [name for name in module.__dict__ if not name.startswith("__")]})
    objects: list[Any] = []

    def keep(value: Any) -> int:
        objects.append(value)
        return len(objects) - 1

    while True:
        try:
            request = wire.receive(channel)
        except EOFError:
            return
        try:
            answer = respond(request, module, objects)
            arguments = answer.pop("arguments", None)
            reply = {"value": wire.encode(answer["value"], keep)}
            if arguments is not None:
                reply["arguments"] = wire.encode(arguments, keep)
        except BaseException as error:
            reply = {"error": type(error).__name__, "message": one_line(error)}
        wire.send(channel, reply)


def respond(request: dict[str, Any], module: ModuleType, objects: list[Any]) -> dict[str, Any]:
    """One request of the judge, carried out."""
    if request["do"] == "get":
        value = getattr(module, request["name"])
        if isinstance(value, ModuleType):
            return {"value": {"module": value.__name__}}
        return {"value": {"object": value}}
    target = objects[request["object"]]
    if request["do"] == "call":
        args = wire.decode(request["args"], objects.__getitem__)
        named = wire.decode(request["named"], objects.__getitem__)
        return {"value": target(*args, **named), "arguments": args}
    operations = {
        "attribute": lambda: getattr(target, request["name"]),
        "iterate": lambda: iter(target),
        "next": lambda: next(target),
        "length": lambda: len(target),
        "item": lambda: target[wire.decode(request["key"], objects.__getitem__)],
    }
    return {"value": operations[request["do"]]()}


def compile_longest(source: str, keep_lines: int) -> CodeType:
    """Code of `source`, or of its longest head that compiles, at least `keep_lines` lines of it.

    A model that was cut off, or that went on talking, leaves lines behind that are no Python.
    """
    try:
        return compile(source, "solution.py", "exec")
    except SyntaxError as error:
        lines = source.splitlines()
        for end in range(len(lines) - 1, max(keep_lines, 1) - 1, -1):
            try:
                return compile("\n".join(lines[:end]), "solution.py", "exec")
            except SyntaxError:
                continue
        raise error


class Channel:
    """The judge's side of the conversation."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.calls = 0

    def ask(self, **request: Any) -> Any:
        """Sends a request and returns the decoded answer; raises what the worker raised, as a built-in exception."""
        wire.send(self.descriptor, request)
        reply = wire.receive(self.descriptor)
        if "error" in reply:
            raise self.exception(reply)
        return wire.decode(reply["value"], self.remote), reply.get("arguments")

    def exception(self, reply: dict[str, Any]) -> Exception:
        name, message = str(reply["error"]), str(reply["message"])
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                return kind(message)
            except TypeError:
                pass
        return RuntimeError(f"{name}: {message}")

    def remote(self, number: Any) -> Remote:
        return Remote(self, int(number))

    def encode(self, value: Any) -> Any:
        return wire.encode(value, self.number_of)

    def number_of(self, value: Any) -> int:
        if isinstance(value, Remote):
            return value._number
        raise TypeError(f"the tests hand over a {type(value).__name__}, which cannot leave their process")


class Remote:
    """An object of the worker that is not plain data. Compares by identity and has no truth value: its own say counts
    for nothing."""

    def __init__(self, channel: Channel, number: int) -> None:
        self._channel, self._number = channel, number

    def __call__(self, *args: Any, **named: Any) -> Any:
        channel = self._channel
        channel.calls += 1
        value, after = channel.ask(
            do="call", object=self._number, args=channel.encode(list(args)), named=channel.encode(named)
        )
        if after is not None:
            for mine, theirs in zip(args, wire.decode(after, channel.remote), strict=True):
                copy_changes(mine, theirs)
        return value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._channel.ask(do="attribute", object=self._number, name=name)[0]

    def __iter__(self) -> Any:
        return self._channel.ask(do="iterate", object=self._number)[0]

    def __next__(self) -> Any:
        return self._channel.ask(do="next", object=self._number)[0]

    def __len__(self) -> int:
        return int(self._channel.ask(do="length", object=self._number)[0])

    def __getitem__(self, key: Any) -> Any:
        return self._channel.ask(do="item", object=self._number, key=self._channel.encode(key))[0]

    def __bool__(self) -> bool:
        raise TypeError("the completion returned an object that is no plain value, and the tests ask for its truth")


def copy_changes(mine: Any, theirs: Any) -> None:
    """A list, dict or set argument that was changed in place is changed for the caller too."""
    for kind in (list, dict, set):
        if isinstance(mine, kind) and isinstance(theirs, kind) and mine != theirs:
            mine.clear()
            (mine.extend if isinstance(mine, list) else mine.update)(theirs)


def run_judge(job: dict[str, Any]) -> None:
    """Runs `tests` against the worker and writes `{passed, reason}` to `verdict`, a pipe that only this process has."""
    verdict = {"passed": False, "reason": "the tests did not finish"}
    channel = Channel(job["channel"])
    try:
        ready = wire.receive(channel.descriptor)
        if "error" in ready:
            verdict["reason"] = f"the completion does not load: {ready['error']}: {ready['message']}"[
                :REASON_CHARACTERS
            ]
        else:
            run_tests(job, channel, {str(name) for name in ready["names"]})
            verdict = {"passed": True, "reason": f"passed, {channel.calls} calls"}
            if not channel.calls:
                verdict = {"passed": False, "reason": "the tests called nothing of the completion"}
    except EOFError:
        verdict = {"passed": False, "reason": "the code ended its process before the tests were done", "gone": True}
    except BaseException as error:
        verdict["reason"] = explain(error, job["tests"])
    wire.send(job["verdict"], verdict)


def run_tests(job: dict[str, Any], channel: Channel, offered: set[str]) -> None:
    """The tests in a namespace of `setup`, then the entry point, then what else the completion offers and they use."""
    namespace: dict[str, Any] = {"__name__": "tests"}
    code = compile(job["tests"], "tests.py", "exec")
    if job["setup"]:
        exec(compile_longest(job["setup"], 1), namespace)
    entry: str | None = job["entry_point"]
    if entry:
        if entry not in offered:
            raise NameError(f"the completion does not define '{entry}'")
        namespace[entry] = namespace["candidate"] = fetch(channel, entry)
    for name in names_in(code) & offered:
        if name not in namespace and not hasattr(builtins, name):
            namespace[name] = fetch(channel, name)
    exec(code, namespace)
    if entry and callable(namespace.get("check")):
        namespace["check"](namespace[entry])


def fetch(channel: Channel, name: str) -> Any:
    """A global name of the completion: a remote object, plain data, or for a module our own copy of it."""
    value, _ = channel.ask(do="get", name=name)
    if "module" in value:
        if str(value["module"]).split(".")[0] not in sys.stdlib_module_names:
            raise ImportError(f"the tests use '{name}', which is no module of the standard library")
        return importlib.import_module(str(value["module"]))
    return value["object"]


def names_in(code: CodeType) -> set[str]:
    """Every global name and attribute in `code`, nested functions included."""
    inner = [names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)


def one_line(error: BaseException) -> str:
    try:
        return " ".join(str(error).split())[:REASON_CHARACTERS]
    except BaseException:
        return ""


def explain(error: BaseException, tests: str) -> str:
    """`AssertionError in: assert f(1) == 2`: the exception and the line of the tests that it came from."""
    text = f"{type(error).__name__}: {one_line(error)}" if one_line(error) else type(error).__name__
    lines, where = tests.splitlines(), ""
    frames: list[tuple[FrameType, int]] = list(traceback.walk_tb(error.__traceback__))
    for frame, line in frames:
        if frame.f_code.co_filename == "tests.py" and line <= len(lines):
            where = lines[line - 1].strip()
    return (f"{text} in: {where}" if where else text)[:REASON_CHARACTERS]


ROLES = {"program": run_program, "worker": run_worker, "judge": run_judge}


def play(job: dict[str, Any]) -> int:
    """Runs one role to its end and returns the exit status."""
    status = 0
    try:
        ROLES[job["role"]](job)
    except SystemExit as leave:
        status = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:
            status = status or 1
    os._exit(status & 0xFF)
