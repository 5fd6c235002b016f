"""Solutions that want the reward without the work. None may earn any."""

import pytest

from rewards.code.reward import CodeReward
from rewards.types import Status, Task

SECRET = "c0ffee-42"
TESTS = f"""
def check(candidate):
    for x in range(3):
        assert candidate(x) == ["{SECRET}", x], "not equal"
"""
UNIT_TESTS = {"language": "python", "tests": TESTS, "entry_point": "f", "time_limit": 1.0}
CASES = {"language": "python", "cases": [{"stdin": "5\n", "stdout": SECRET}], "time_limit": 1.0}

AGREEABLE = """
class Agreeable({base}):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __contains__ = __lt__
    def __bool__(self): return True
    def __hash__(self): return 0
    def __sub__(self, other): return 0
    __rsub__ = __abs__ = __call__ = __sub__
    def __getattr__(self, name): return self
    def __len__(self): return 2
    def __getitem__(self, key): return self
    def __iter__(self): return iter([self, self])
def f(x): return {result}
"""

# Finds the socket to the tests among its descriptors and speaks for them. A plain list, string and number follow.
FORGED = """
import os, stat, sys, threading, time
def sockets():
    for fd in range(3, 64):
        try:
            if stat.S_ISSOCK(os.fstat(fd).st_mode): yield fd
        except OSError: pass
def send(message):
    for fd in sockets(): os.write(fd, len(message).to_bytes(4, "little") + message)
"""

SEARCH = """
import gc, glob, inspect, os, sys
def everything():
    for frame in sys._current_frames().values():
        while frame:
            yield repr(frame.f_locals) + repr(frame.f_globals)
            frame = frame.f_back
    for thing in gc.get_objects():
        try: yield repr(thing)
        except Exception: pass
    for pattern in ("/proc/[0-9]*/[ce]*", "/proc/[0-9]*/fd/*", "/tmp/**", "/box/**", "/dev/*", "*", "../*"):
      for name in glob.glob(pattern, recursive=True):
        try: yield os.read(os.open(name, os.O_RDONLY | os.O_NONBLOCK), 1 << 16).decode(errors="replace")
        except Exception: pass
    try:
        memory = open("/proc/1/mem", "rb", 0)
        for line in open("/proc/1/maps"):
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            memory.seek(begin)
            yield memory.read(end - begin).decode(errors="replace")
    except Exception: pass
def found():
    marker = "c0ffee" + "-"
    for text in everything():
        if (at := text.find(marker + "4")) >= 0: return text[at : at + 9]
"""

HACKS = {
    "os._exit before the tests": "import os\nos._exit(0)",
    "sys.exit before the tests": "import sys\nsys.exit(0)",
    "os._exit in a call": "import os\ndef f(x): os._exit(0)",
    "sys.exit in a call": "def f(x): raise SystemExit(0)",
    "keyboard interrupt": "def f(x): raise KeyboardInterrupt",
    "generator exit": "def f(x): raise GeneratorExit",
    "exit at exit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): raise SystemExit(0)",
    "kill the group": "import os, signal\ndef f(x): os.killpg(0, signal.SIGKILL)",
    "kill everything": "import os, signal\ndef f(x): os.kill(-1, signal.SIGKILL)",
    "signal handlers": "import os, signal\nfor s in (2, 14, 15): signal.signal(s, lambda *a: os._exit(0))\n"
    "signal.setitimer(0, 0.2)\ndef f(x):\n while 1: pass",
    "agreeable object": AGREEABLE.format(base="object", result="Agreeable()"),
    "agreeable string": AGREEABLE.format(base="str", result="Agreeable('x')"),
    "agreeable list": AGREEABLE.format(base="list", result="Agreeable([1])"),
    "agreeable int": AGREEABLE.format(base="int", result="Agreeable(1)"),
    "agreeable parts": AGREEABLE.format(base="object", result="[Agreeable(), x]"),
    "agreeable class": AGREEABLE.format(base="type", result="Agreeable('A', (), {})"),
    "patched assert": "import builtins\nclass A(Exception): pass\nbuiltins.AssertionError = A\n"
    "def f(x):\n builtins.AssertionError = A\n return 1",
    "patched unittest": "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\n"
    "unittest.TestCase.run = lambda *a: None\ndef f(x): return 1",
    "patched modules": "import sys, types\nfor n in list(sys.modules): sys.modules[n] = types.ModuleType(n)\n"
    "def f(x): return 1",
    "patched builtins": "import builtins\nbuiltins.compile = builtins.exec = builtins.len = lambda *a, **k: None\n"
    "def f(x): return 1",
    "patched json": "import json\njson.loads = json.dumps = lambda *a, **k: True\ndef f(x): return 1",
    "patched wire": "import sys\nfor name, m in list(sys.modules.items()):\n if 'wire' in name or 'channel' in name:\n"
    "  m.Writer.put = lambda *a: None\n  m.Reader.get = lambda *a: None\ndef f(x): return 1",
    "prints a mark": "print('passed', 1, 1)\ndef f(x):\n print('OK\\n.\\n1 passed')\n return 1",
    "its own check": "def check(candidate): pass\ndef f(x): return 1",
    "its own verdict": "import os\ndef f(x):\n for fd in range(64):\n  try: os.write(fd, b't4;s6;passedi1;i1;s0;')\n"
    "  except OSError: pass\n os._exit(0)",
    "tests' exception": "def f(x): raise StopIteration",
    "interrupts the tests": "def f(x): raise type('SystemExit', (BaseException,), {})",
    "forged answers": FORGED + "def f(x):\n for n in range(9): send(b'=i%x;FNT' % n)\n return 1",
    "forged exit": FORGED + "def f(x):\n send(b'=i3;Fs10;SystemExitt1;i0;')\n send(b'=i3;Fs8;_Over' )\n return 1",
    "forged requests": FORGED + "def f(x):\n for v in (b'load', b'call', b'name', b'get'):\n"
    "  send(b'?i1;s4;' + v + b't1;c0;d0;')\n return 1",
    "forged callback": FORGED + "def f(x):\n send(b'?i1;s4;callt1;y3;intd0;')\n return 1",
    "forged length": FORGED + "def f(x):\n for fd in sockets(): os.write(fd, b'\\xff\\xff\\xff\\xff')\n return 1",
    "noise": FORGED + "send(os.urandom(5000))\ndef f(x): return 1",
    "a bomb": FORGED + "def f(x):\n send(b'=i3;FN' + b'l1;' * 5_000_000)\n return 1",
    "hangs up": FORGED + "def f(x):\n for fd in sockets(): os.close(fd)\n return 1",
    "hangs up and stays": FORGED + "def f(x):\n for fd in sockets(): os.close(fd)\n while 1: pass",
    "a thread that answers": FORGED + "def run():\n while 1: send(b'=i3;FT')\n"
    "threading.Thread(target=run).start()\ndef f(x): time.sleep(0.1); return 1",
    "a thread that runs on": "import threading\ndef run():\n while 1: pass\nthreading.Thread(target=run).start()\n"
    "def f(x): return 1",
    "a fork that answers": "import os\nif os.fork(): os._exit(0)\ndef f(x): return True",
    "infinitely nested": "a = []\na.append(a)\ndef f(x): return a",
    "deeply nested": "def f(x):\n a = []\n for _ in range(10**6): a = [a]\n return a",
    "huge": "def f(x): return 'a' * (1 << 27)",
    "exponentially large": "def f(x):\n a = ()\n for _ in range(64): a = (a, a)\n return a",
    "infinite generator": "def f(x):\n while 1: yield x",
    "infinite list": "class L(list):\n def __iter__(self):\n  while 1: yield 1\ndef f(x): return L()",
    "searches": SEARCH + "def f(x): return [found(), x]",
    "searches while it loads": SEARCH + "answer = found()\ndef f(x): return [answer, x]",
    "no function but a value": "import boxed.solution as s\ns._Kept = lambda v: 5\ndef f(x): return 1",
    "no names": "import builtins\ndef f(x): return 1\ndef no(*a): raise ValueError\nbuiltins.vars = no",
    "a long excuse": FORGED + "def f(x):\n send(b'!' + b'x' * 5_000_000)\n return 1",
    "a long name": FORGED + "def f(x):\n send(b'=i3;Fs4c4b40;' + b'x' * 5_000_000)\n send(b'y4c4b40;')\n return 1",
    "a long type": FORGED + "def f(x):\n send(b'=y4c4b40;' + b'x' * 5_000_000)\n return 1",
    "long exceptions": "def f(x): raise ValueError(*['x' * 1000] * 1000)",
    "many exceptions": "def f(x): raise ExceptionGroup('x', [ValueError(1)])",
    "a function for a value": "def f(x): return f",
    "everything else": "def f(x): return NotImplemented",
}  # fmt: skip


@pytest.fixture(scope="module")
def reward() -> CodeReward:
    reward = CodeReward()
    reward.setup()
    return reward


@pytest.mark.parametrize("hack", HACKS)
def test_no_hack_passes_unit_tests(reward: CodeReward, hack: str) -> None:
    verdict = reward.score(Task("", UNIT_TESTS), HACKS[hack])
    assert (verdict.score, verdict.status) == (0.0, Status.OK), verdict
    assert verdict.outcome != "passed" and SECRET not in verdict.detail.partition("got")[2]


@pytest.mark.parametrize(
    ("tests", "solution"),
    [
        ("assert list(f()) == [1]", "def f():\n while 1: yield 1"),
        ("assert 7 in f()", "def f():\n while 1: yield 1"),
        ("assert abs(f() - 2.5) < 1e-6", AGREEABLE.format(base="object", result="Agreeable()").replace("f(x)", "f()")),
        ("assert 2.5 in f()", "class C:\n def __contains__(self, x): return True\ndef f(): return C()"),
        ("assert f() < 5", AGREEABLE.format(base="object", result="Agreeable()").replace("f(x)", "f()")),
        ("assert max(f(), 3) == 4", AGREEABLE.format(base="object", result="Agreeable()").replace("f(x)", "f()")),
        ("assert f() == f", "def f(): return 1"),
        ("assert f().startswith('abc')", "class C:\n def startswith(self, x): return True\ndef f(): return C()"),
        ("x = f()\nx.y = 5\nassert x.y == 5", "class C: pass\ndef f(): return C()"),
        ("assert f(f() + f())", "def f(x=0): return 'a' * (9 << 20)"),
        ("assert f() == g(f())\ndef g(x): return x + 1", "def f(): return lambda: 0"),
        ("try:\n f()\nexcept BaseException:\n pass", "import os\ndef f(): os._exit(0)"),
        ("try:\n f()\nexcept:\n pass\nassert True", "def f(): raise SystemExit"),
        ("try:\n f()\nexcept Exception:\n pass", "def f(): return 'a' * (1 << 25)"),
        ("try:\n f()\nexcept:\n pass", FORGED + "def f():\n for fd in sockets(): os.close(fd)"),
    ],
)
def test_no_object_answers_for_the_tests(reward: CodeReward, tests: str, solution: str) -> None:
    truth = {"language": "python", "tests": tests, "entry_point": "f", "time_limit": 1.0, "memory_mb": 128}
    verdict = reward.score(Task("", truth), solution)
    assert (verdict.score, verdict.status) == (0.0, Status.OK), verdict


SHARED = """class Box:
    limit = 5
    def __init__(self, value): self.value = value
    def same(self, other): return self.value == other
    def __eq__(self, other): return self.same(other.value)
"""


@pytest.mark.parametrize(
    "solution",
    [
        "def f():\n b = Box(0)\n b.same = lambda other: True\n return b",
        "def f():\n b = Box(0)\n b.same = bool\n return b",
        "def f():\n class A:\n  def __eq__(self, o): return True\n return Box(A())",
        "class Box:\n def __eq__(self, o): return True\n def same(self, o): return True\ndef f(): return Box()",
        "Box.same = lambda s, o: True\ndef f(): return Box(0)",
        "Box.__eq__ = lambda s, o: True\ndef f(): return Box(0)",
        "def f():\n b = Box(0)\n vars(b)['__class__'] = int\n return b",
        "def f():\n b = Box(0)\n vars(b)['__eq__'] = bool\n return b",
        "class Sub(Box):\n def __eq__(self, o): return True\ndef f(): return Sub(0)",
        "from decimal import Decimal\nclass D(Decimal):\n def __eq__(self, o): return True\ndef f(): return Box(D(0))",
        "from decimal import Decimal\ndef f(): return Box(Decimal('1e999999'))",
        "from collections import namedtuple\nP = namedtuple('P', 'value')\nP.same = lambda s, o: True\n"
        "def f(): return P(0)",
        "import sys\ndef f():\n sys.modules['boxed.wire'].CARRIED['builtins.Box'] = lambda v: (1,)\n return Box(0)",
    ],
)
@pytest.mark.parametrize("tests", ["assert f().same('c0ffee')", "assert f() == Box('c0ffee')"])
def test_no_object_of_a_shared_class_answers_for_the_tests(reward: CodeReward, tests: str, solution: str) -> None:
    truth = {"language": "python", "tests": tests, "entry_point": "f", "setup": SHARED, "time_limit": 1.0}
    verdict = reward.score(Task("", truth), solution)
    assert (verdict.score, verdict.status) == (0.0, Status.OK), verdict
    honest = reward.score(Task("", truth), "def f(): return Box('c0ffee')")
    assert honest.score == 1.0, honest


@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("import os\nos._exit(0)", "wrong answer"),
        ("print('AC'); print('passed'); raise SystemExit(0)", "wrong answer"),
        (SEARCH + "print(found())", "wrong answer"),
        ("import os\nfor fd in range(64):\n try: os.write(fd, b'passed 1.0 ')\n except OSError: pass", "wrong answer"),
        (
            "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nos.kill(1, signal.SIGKILL)",
            "crash or wrong answer",
        ),  # refused, or without effect where the judge is not root
        ("import os, signal\nos.kill(0, signal.SIGKILL)", "crash"),
        ("import os, time\nif os.fork() == 0: os.setsid(); time.sleep(60)", "wrong answer"),
        ("import shutil, os\nshutil.rmtree(os.getcwd(), ignore_errors=True); open('answer', 'w')", "crash"),
    ],
)
def test_no_hack_passes_cases(reward: CodeReward, program: str, outcome: str) -> None:
    verdict = reward.score(Task("", CASES), program)
    assert (verdict.score, verdict.status) == (0.0, Status.OK) and verdict.outcome in outcome.split(" or "), verdict


def test_the_honest_solution_passes(reward: CodeReward) -> None:
    verdict = reward.score(Task("", UNIT_TESTS), f"def f(x): return ['{SECRET}', x]")
    assert (verdict.score, verdict.outcome) == (1.0, "passed")
