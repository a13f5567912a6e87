"""The sandbox: what honest code gets, and that every attack ends as a failed sample with a reason and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tropd_cli import sandbox
from tropd_cli.sandbox import Limits, Outcome, run_program, run_tests

try:
    ISOLATION = sandbox.available()
except sandbox.SandboxUnavailable as error:
    pytest.skip(str(error), allow_module_level=True)

EARLIER: set[int] = set()
QUICK = Limits(cpu_seconds=2, wall_seconds=2)
TESTS = "assert add(1, 2) == 3\nassert add(-1, 1) == 0"


def usable(mode: str) -> bool:
    try:
        probe = {"role": "program", "source": "import statistics\nprint(42)", "stdin": ""}
        return sandbox.supervise([{"roles": [probe], "expected": "42"}], mode, Limits())[0]["same"]
    except sandbox.SandboxUnavailable:
        return False


def modes() -> list[str]:
    wanted = ["namespaces", "user-namespace", "other-user"] if os.geteuid() == 0 else ["user-namespace"]
    return [mode for mode in wanted if usable(mode)]


@pytest.fixture(params=modes())
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sandbox, "available", lambda: sandbox.Isolation(request.param, network=False))
    return request.param


def attack(source: str, limits: Limits = QUICK) -> Outcome:
    """The outcome of a hostile completion under the tests of `add`."""
    return run_tests(source, TESTS, limits=limits)


# Honest code


def test_function_that_is_right_and_one_that_is_wrong(mode: str) -> None:
    assert run_tests("def add(a, b):\n    return a + b", TESTS) == Outcome(True, "passed, 2 calls")
    wrong = run_tests("def add(a, b):\n    return 3", TESTS)
    assert (wrong.passed, wrong.reason) == (False, "AssertionError in: assert add(-1, 1) == 0")


def test_program_reads_stdin_and_is_compared_line_by_line_and_number_by_value() -> None:
    source = "for _ in range(int(input())):\n    print(float(input()) * 2, 'x')"
    assert run_program(source, [("2\n1\n2\n", "2 x\n4.0 x\n"), ("1\n5", "10 x")]).passed
    wrong = run_program(source, [("1\n5", "10 x"), ("1\n5", "10 y"), ("1\n5", "10 x")])
    assert (wrong.passed, wrong.reason) == (False, "case 2 of 3: printed '10.0 x'")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import sys; sys.exit(3)", "exit status 3"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def (", "SyntaxError: invalid syntax"),
        ("", "printed nothing"),
        ("import os; os.abort()", "was ended by signal 6"),
    ],
)
def test_program_that_fails_says_why(source: str, reason: str) -> None:
    assert run_program(source, [("", "1")]).reason == f"case 1 of 1: {reason}"


def test_right_output_before_a_crash_does_not_count() -> None:
    assert not run_program("print(1)\n1 / 0", [("", "1")]).passed


VALUES = """
None | True | -5 | 10**6000 | 1.5 | float('inf') | '\\ud800x' | b'\\x00' | (1, [2, {3: (4,)}]) | {1, 2}
frozenset('ab') | 1 + 2j | range(3) | {'a': [None, {1: 2}]} | {(1, 2): 'b'} | __import__('decimal').Decimal('1.10')
"""


def test_plain_values_cross_unchanged() -> None:
    values = VALUES.strip().replace("\n", " | ").split(" | ")
    tests = "for value in VALUES:\n    got = same(value)\n    assert got == value and type(got) is type(value), got"
    outcome = run_tests("def same(x):\n    return x", tests.replace("VALUES", f"[{', '.join(values)}]"))
    assert outcome.reason == f"passed, {len(values)} calls"


def test_classes_generators_exceptions_and_changed_arguments() -> None:
    source = """
import math
from dataclasses import dataclass
@dataclass
class Point:
    x: int
    def double(self):
        self.x *= 2
        return self.x
class Solution:
    def squares(self, n):
        yield from (i * i for i in range(n))
def sort(xs):
    xs.sort()
def fail():
    raise ValueError("no")
"""
    tests = """
p = Point(4)
assert p.double() == 8 and p.x == 8
assert list(Solution().squares(4)) == [0, 1, 4, 9]
xs = [3, 1, 2]
sort(xs)
assert xs == [1, 2, 3] and math.isclose(xs[0], 1)
try:
    fail()
except ValueError as error:
    assert str(error) == "no"
else:
    assert False
"""
    assert run_tests(source, tests).reason == "passed, 6 calls"


def test_text_after_the_code_is_cut_off_but_not_below_the_kept_lines() -> None:
    source = "def add(a, b):\n    return a + b\n\nThis function adds two numbers:"
    assert run_tests(source, TESTS).passed
    assert run_tests(source, TESTS, keep_lines=4).reason.startswith("the completion does not load: SyntaxError")


def test_helpers_of_the_setup_are_the_benchmarks_own() -> None:
    setup = "def double(x):\n    return 2 * x\n\ndef half(x):\n    '''The inverse of double.'''\n"
    tests = "def check(candidate):\n    assert candidate(double(3)) == 3"
    cheat = "def double(x):\n    return 0\n\ndef half(x):\n    return 3 if x == 0 else None"
    assert not run_tests(cheat, tests, setup=setup, entry_point="half").passed
    assert run_tests("def half(x):\n    return x // 2", tests, setup=setup, entry_point="half").passed


def test_the_code_sees_nothing_of_the_user(mode: str) -> None:
    source = "import os\nprint(sorted(os.environ), os.getuid() == 0, os.getcwd().startswith('/tmp'), os.listdir())"
    assert run_program(source, [("", "")]).output == "['HOME', 'LANG', 'PATH', 'PYTHONHASHSEED'] False True []\n"


@pytest.mark.skipif(ISOLATION.mode == "other-user", reason="no namespaces here")
def test_no_network_and_no_other_process() -> None:
    source = "import os, socket\nprint(os.getpid(), [name for _, name in socket.if_nameindex()])"
    assert run_program(source, [("", "")]).output in ("2 ['lo']\n", "2 ['lo', 'sit0']\n")


# Attacks


def test_fork_bomb(mode: str) -> None:
    count = "import os, time\nfor n in range(1000):\n    try:\n        if os.fork() == 0: time.sleep(60)\n"
    bounded = run_program(count + "    except OSError:\n        break\nprint(n < 100)", [("", "True")])
    assert bounded.passed, bounded
    started = time.monotonic()
    outcome = attack("import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass")
    assert (outcome.passed, outcome.reason) == (False, "ran longer than 2 s")
    assert time.monotonic() - started < 15
    assert not children_left()


def test_processes_that_leave_their_group_die_too(mode: str, tmp_path: Path) -> None:
    escape = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(987)\n"
    assert attack(escape + "    os._exit(0)\ndef add(a, b):\n    return a + b").passed
    assert not children_left()


def test_endless_loop(mode: str) -> None:
    assert "CPU time" in attack("while True: pass", Limits(cpu_seconds=1, wall_seconds=60)).reason
    assert attack("import time\ntime.sleep(99)", Limits(wall_seconds=1)).reason == "ran longer than 1 s"
    stubborn = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert mode != "namespaces" or "CPU time" in attack(stubborn, Limits(cpu_seconds=1, wall_seconds=60)).reason


def test_ten_gigabytes_of_output(mode: str) -> None:
    flood = "import sys\nfor _ in range(10240):\n    sys.stdout.write('x' * (1 << 20))"
    assert attack(flood, Limits(wall_seconds=20)).reason == "wrote more than 4096 KB"
    file = "with open('f', 'wb') as f:\n    for _ in range(10240):\n        f.write(b'x' * (1 << 20))"
    assert "File too large" in attack(file).reason
    many = "for i in range(200):\n    with open(f'f{i}', 'wb') as f:\n        f.write(b'x' * (1 << 20))"
    if mode != "other-user":
        assert "No space left" in attack(many).reason


def test_memory(mode: str) -> None:
    assert "MemoryError" in attack("x = bytearray(2 << 30)").reason
    family = "import os, time\nfor _ in range(8):\n    if os.fork() == 0: break\nx = bytearray(b'x') * (96 << 20)\n"
    outcome = attack(family + "time.sleep(9)", Limits(wall_seconds=9, memory_mb=256))
    assert outcome.reason == "its processes used more than 256 MB together"


def test_deleted_home_directory(mode: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    treasure = tmp_path / "treasure"
    treasure.write_text("gold")
    home = Path.home()
    before = sorted(os.listdir(home))
    rage = (
        f"import os, shutil\nfor p in ({str(home)!r}, {str(tmp_path)!r}, '/bin', '/tmp'):\n"
        "    shutil.rmtree(p, ignore_errors=True)\nos.rename('/usr', '/gone')"
    )
    assert not attack(rage).passed
    assert treasure.read_text() == "gold" and sorted(os.listdir(home)) == before and Path("/usr/bin").is_dir()


def test_kill_everything(mode: str) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        kill = "import os, signal\nfor target in (-1, 1, 0, os.getppid(), PID):\n    try:\n        os.kill(target, 9)\n"
        outcome = attack(kill.replace("PID", str(bystander.pid)) + "    except OSError: pass")
        assert not outcome.passed and outcome.reason
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


FORGERIES = {
    "exits": "import os\nprint('all tests passed')\nos._exit(0)",
    "exits in the call": "import os\ndef add(a, b):\n    os._exit(0)",
    "sys.exit": "import sys\ndef add(a, b):\n    sys.exit(0)",
    "equal to everything": "class Any:\n    def __eq__(self, other): return True\n    def __bool__(self): return True\n"
    "def add(a, b):\n    return Any()",
    "int that is equal to everything": "class Any(int):\n    def __eq__(self, other): return True\n"
    "def add(a, b):\n    return Any(7)",
    "patches builtins": "import builtins, sys\nbuiltins.AssertionError = None\nsys.settrace(None)\n"
    "def add(a, b):\n    return 7",
    "reads the stack": "import sys, gc\ndef add(a, b):\n    f = sys._getframe()\n    while f:\n"
    "        for v in list(f.f_locals.values()):\n            if isinstance(v, str) and 'assert' in v: return 3\n"
    "        f = f.f_back\n    return 7",
    "writes verdicts everywhere": 'import os, struct\nv = b\'{"passed": true, "reason": "forged"}\'\n'
    "for d in range(64):\n    for m in (struct.pack('!I', len(v)) + v, v + b'\\n'):\n"
    "        try:\n            os.write(d, m)\n"
    "        except OSError: pass\ndef add(a, b):\n    return 7",
    "remote of the judge": "import wire\nwire.encode = lambda v, u: {'type': 'remote', 'value': 0}\n"
    "def add(a, b):\n    return 7",
    "defines check": "def check(candidate): pass\ndef add(a, b):\n    return 7",
    "nothing": "",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_success(name: str) -> None:
    outcome = attack(FORGERIES[name])
    assert not outcome.passed and outcome.reason and "forged" not in outcome.reason


def test_tests_that_call_nothing_do_not_pass() -> None:
    assert run_tests("x = 1", "assert True").reason == "the tests called nothing of the completion"


# The program around it


def test_interrupting_the_supervisor_takes_the_boxes_down() -> None:
    script = (
        "from tropd_cli import sandbox\n"
        "sandbox.run_program('import time; time.sleep(654)', [('', '')], sandbox.Limits(wall_seconds=600))"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 40
    while len(descendants(process.pid)) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    family = descendants(process.pid)
    assert len(family) >= 4
    process.kill()
    process.wait()
    while any(map(alive, family)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, family))


def test_without_isolation_nothing_runs_and_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise sandbox.SandboxUnavailable("unshare: Operation not permitted")

    monkeypatch.setattr(sandbox, "supervise", refuse)
    with pytest.raises(sandbox.SandboxUnavailable, match=r"not run. unshare: Operation not permitted.*user namespaces"):
        sandbox.available.__wrapped__()


def descendants(root: int) -> set[int]:
    rows = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout.split()
    pairs = list(zip(map(int, rows[::2]), map(int, rows[1::2]), strict=True))
    family, size = {root}, 0
    while len(family) != size:
        size = len(family)
        family |= {process for process, parent in pairs if parent in family}
    return family - {root}


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children_left() -> set[int]:
    """Living processes below this one that this file started, without the `ps` that looks for them."""
    return {process for process in descendants(os.getpid()) - EARLIER if alive(process)}


@pytest.fixture(scope="module", autouse=True)
def earlier() -> None:
    """What other tests of the session left running, such as a verifier's worker, is not the sandbox's."""
    EARLIER.update(descendants(os.getpid()))
