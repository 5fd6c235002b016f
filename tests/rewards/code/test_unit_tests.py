"""Tests and solution in two processes behave as they would in one, and a failure says whose it is."""

from typing import Any

import pytest

from rewards.code.reward import CodeReward
from rewards.types import Status, Task, Verdict


@pytest.fixture(scope="module")
def reward() -> CodeReward:
    reward = CodeReward()
    reward.setup()
    return reward


def judged(
    reward: CodeReward, solution: str, tests: str | list[str], names: str | list[str] = "f", **more: Any
) -> Verdict:
    truth = {"language": "python", "tests": tests, "entry_point": names, "time_limit": 2.0, **more}
    task = Task("", truth)
    reward.check(task)
    return reward.score(task, solution)


AS_IN_ONE_PROCESS = {
    "plain values": (
        "def f(x): return x",
        "import math\nfor v in (True, 10**99, 1.5, 2j, 'a\\ud800', b'x', [1, (2,)], {1: {2}}, frozenset(), range(3)):\n"
        " assert f(v) == v and type(f(v)) is type(v)\n"
        "assert math.isnan(f(math.nan)) and f(None) is None and f(True) is True and f(1) is not True",
    ),
    "keywords": ("def f(a, *b, c=3, **d): return a, b, c, d", "assert f(1, 2, c=4, e=5) == (1, (2,), 4, {'e': 5})"),
    "changes in place": (
        "def f(a, b, c):\n a.sort(); a[0].append(9); b.pop('x'); b['y'] = a; c.add(4)",
        "one = [1]\na, b, c = [one, [0]], {'x': 1}, set()\nassert f(a, b, c) is None\n"
        "assert a == [[0, 9], [1]] and a[1] is one and b == {'y': a} and b['y'] is a and c == {4}",
    ),
    "changes before an exception": (
        "def f(a):\n a.append(1)\n raise KeyError('k')",
        "a = []\ntry: f(a)\nexcept KeyError as e: assert e.args == ('k',)\nelse: raise AssertionError\nassert a == [1]",
    ),
    "its argument returned": ("def f(a): return a", "a = []\nassert f(a) is a and f([a])[0] is not None"),
    "an argument's subclass": (
        "def f(c): c['a'] += 1; return c",
        "from collections import Counter\nc = Counter('ab')\nassert f(c) is c and c == Counter('aab')",
    ),
    "exceptions": (
        "class Mine(ValueError): pass\ndef f(x): raise Mine('no', x)",
        "try: f(3)\nexcept ValueError as e: assert e.args == ('no', 3) and str(e) == \"('no', 3)\"\n"
        "else: raise AssertionError",
    ),
    "exceptions with a will of their own": (
        "def f(): b'\\xff'.decode()",
        "try: f()\nexcept UnicodeDecodeError: pass\nelse: raise AssertionError",
    ),
    "functions of the tests": (
        "def f(g, xs): return sorted(xs, key=g), max(xs, key=g), g",
        "g = lambda x: -x\nassert f(g, [1, 3, 2]) == ([3, 2, 1], 1, g) and f(len, ['ab', 'c'])[0] == ['c', 'ab']",
    ),
    "exceptions of the tests": (
        "def f(g):\n try: g()\n except ZeroDivisionError: return 'caught'",
        "assert f(lambda: 1 / 0) == 'caught'",
    ),
    "a function that comes back": (
        "def f(n):\n def g(x): return x + n\n return g",
        "g = f(3)\nassert g(4) == 7 and f(1)(1) == 2",
    ),
    "a decorator": (
        "def f(g):\n seen = {}\n def h(x):\n  if x not in seen: seen[x] = g(x)\n  return seen[x]\n return h",
        "calls = []\n@f\ndef g(x):\n calls.append(x)\n return x * 2\n"
        "assert [g(1), g(1), g(2)] == [2, 2, 4] and calls == [1, 2]",
    ),
    "calls within calls": (
        "def f(n, g): return 1 if n == 0 else g(n - 1) * n",
        "def g(n): return f(n, g)\nassert f(5, g) == 120",
    ),
    "generators": (
        "def f():\n a = 0\n while 1:\n  yield a\n  a += 1",
        "import itertools\nassert list(itertools.islice(f(), 3)) == [0, 1, 2]\n"
        "g = f()\nassert next(g) == 0 and next(g) == 1",
    ),
    "views": (
        "def f(d): return d.keys()",
        "k = f({'b': 1, 'a': 2})\nassert sorted(k) == ['a', 'b'] and 'a' in k and len(k) == 2",
    ),
    "printing": (
        "import sys\ndef f(x):\n print('x' * 10**6)\n sys.stderr.write('x' * 10**6)\n return x",
        "for x in range(9):\n print('y' * 10**6)\n assert f(x) == x",
    ),
    "a module of its own": (
        "import dataclasses\n@dataclasses.dataclass\nclass P: x: int\nif __name__ == '__main__': raise SystemExit\n"
        "def f(x): return dataclasses.asdict(P(x))",
        "assert f(1) == {'x': 1}",
    ),
    "HumanEval's form": ("def f(x): return x + 1", "METADATA = {}\ndef check(candidate):\n assert candidate(1) == 2\n"),
}  # fmt: skip


@pytest.mark.parametrize("case", AS_IN_ONE_PROCESS)
def test_as_in_one_process(reward: CodeReward, case: str) -> None:
    solution, tests = AS_IN_ONE_PROCESS[case]
    alone: dict[str, Any] = {}
    exec(solution, alone)
    exec(tests.replace("type(f(v)) is type(v)", "True"), alone)
    if "check" in alone:
        alone["check"](alone["f"])
    verdict = judged(reward, solution, tests)
    assert (verdict.score, verdict.outcome) == (1.0, "passed"), verdict


def test_classes_of_the_solution(reward: CodeReward) -> None:
    solution = """
from collections import OrderedDict
class LRU(OrderedDict):
    def __init__(self, size): self.size = size
    def put(self, k, v):
        self[k] = v
        if len(self) > self.size: self.popitem(last=False)
class Node:
    def __init__(self, value): self.value, self.next = value, None
    def __str__(self): return f"Node {self.value}"
def total(node): return node.value + total(node.next) if node else 0
def pairs(): return [Node(1), 2]
class Solution:
    def twice(self, xs): return [2 * x for x in xs]
"""
    tests = [
        "lru = LRU(1); lru.put(1, 2); lru.put(3, 4); assert len(lru) == 1 and lru[3] == 4 and list(lru) == [3]",
        "root = Node(1)\nroot.next = Node(2)\nassert total(root) == 3 and root.next.value == 2",
        "assert str(root) == 'Node 1'",
        "assert root == root and root.next is root.next and Node(1) != Node(1) and hash(root) == hash(root)",
        "node, two = pairs(); assert total(node) == 1 and two == 2 and not hasattr(node, 'gone')",
        "assert Solution().twice([1, 2]) == [2, 4]",
        "try: Node(1)[0]\nexcept TypeError: pass\nelse: raise AssertionError",
    ]
    classes = ["LRU", "Node", "Solution"]
    verdict = judged(reward, solution, tests, ["total", "pairs"], classes=classes)
    assert verdict.score == 1.0, verdict
    leetcode = "def check(candidate):\n assert candidate([1]) == [2]"
    assert judged(reward, solution, leetcode, "Solution().twice").score == 1.0
    assert judged(reward, solution, leetcode, "Solution().thrice").outcome == "compile error"


def test_mbpp_setup_uses_the_solution(reward: CodeReward) -> None:
    solution = (
        "class Node:\n def __init__(self, x): self.x, self.left = x, None\ndef f(n): return 1 + f(n.left) if n else 0"
    )
    setup = "root = Node(1)\nroot.left = Node(2)"
    tests = ["assert f(root) == 2", "assert f(root.left) == 1"]
    assert judged(reward, solution, tests, setup=setup, classes=["Node"]).score == 1.0


def test_the_prompt_as_setup(reward: CodeReward) -> None:
    """Its helpers are the tests', its stub of the function is not."""
    setup = "def helper(x): return x * 2\ndef f(x):\n '''Returns helper(x).'''\n"
    tests = "def check(candidate):\n assert candidate(2) == helper(2) == f(2)"
    assert judged(reward, "def f(x): return x + x", tests, setup=setup).score == 1.0
    cheat = "def helper(x): return 0\ndef f(x): return 0"
    assert judged(reward, cheat, tests, setup=setup).score == 0.0


PROMPT = """import math
from typing import List
MOD = 10

def double(x: int) -> int:
    return 2 * x


def f(xs: List[int]) -> int:
    '''The sum of the doubles' square roots, modulo MOD.'''
"""
BODY = "    return round(sum(math.sqrt(double(x)) for x in xs)) % MOD\n"
CHECK = "def check(candidate):\n    assert candidate([2, 8, 18]) == 2\n    assert candidate([]) == 0\n"


@pytest.mark.parametrize(
    "solution",
    [
        f"def f(xs: List[int]) -> int:\n{BODY}",
        f"from __future__ import annotations\ndef f(xs: List[int]):\n{BODY}",
        BODY,  # as a base model goes on
        f"```python\n{BODY}```",
        f"{PROMPT}{BODY}",
        f"def double(x): return x + x\ndef f(xs):\n{BODY}",
    ],
)
def test_a_solution_has_its_prompt(reward: CodeReward, solution: str) -> None:
    assert judged(reward, solution, CHECK, setup=PROMPT).score == 1.0
    wrong = solution.replace("% MOD", "% MOD + 1")
    assert judged(reward, wrong, CHECK, setup=PROMPT).score == 0.0


@pytest.mark.parametrize(
    ("setup", "solution"),
    [
        ("ANSWER = 42", "def f(): return ANSWER"),
        ("def reference(): return 42", "def f(): return reference()"),
        ("def reference(): return 42", "def f():\n import sys\n return vars(sys.modules['solution'])['reference']()"),
        ("def f():\n '''Returns 42.'''\ndef check(c): assert c() == 42", "def f(): return f.__doc__"),
    ],
)
def test_a_setup_that_is_no_prompt_stays_with_the_tests(reward: CodeReward, setup: str, solution: str) -> None:
    verdict = judged(reward, solution, "assert f() == 42", setup=setup)
    assert (verdict.score, verdict.status) == (0.0, Status.OK)


LIST = """class ListNode:
    def __init__(self, val=0, next=None):
        self.val, self.next = val, next
"""
ON_LISTS = """def made(values):
    head = None
    for value in reversed(values): head = ListNode(value, head)
    return head
def read(node):
    values = []
    while node: values.append(node.val); node = node.next
    return values
def check(candidate):
    assert read(candidate(made([1, 2, 3]))) == [3, 2, 1]
    assert candidate(None) is None
    assert read(candidate(made(list(range(3000))))) == list(range(3000))[::-1]
"""
REVERSE = """class Solution:
    def reverse(self, head):
        last = None
        while head: head.next, last, head = last, head, head.next
        return last
"""


@pytest.mark.parametrize(
    ("solution", "score"),
    [
        (REVERSE, 1.0),
        (f"{LIST}{REVERSE}", 1.0),
        (
            "class Solution:\n def reverse(self, head):\n  last = None\n"
            "  while head: last, head = ListNode(head.val, last), head.next\n  return last",
            1.0,
        ),
        ("class Solution:\n def reverse(self, head): return head", 0.0),
        ("class Solution:\n def reverse(self, head): return ListNode(3, ListNode(2))", 0.0),
    ],
)
def test_objects_of_a_class_in_the_setup(reward: CodeReward, solution: str, score: float) -> None:
    assert judged(reward, solution, ON_LISTS, "Solution().reverse", setup=LIST).score == score


VALUES = {
    "Decimal('1.10')": ["Decimal('1.1')", "Decimal('1.2')"],
    "Fraction(1, 2)": ["0.5", "Fraction(1, 3)"],
    "date(2024, 2, 29)": ["date(2024, 2, 29)", "datetime(2024, 2, 29)"],
    "datetime(2024, 1, 1, 12, tzinfo=timezone.utc)": [
        "datetime(2024, 1, 1, 13, tzinfo=timezone(timedelta(hours=1)))",
        "datetime(2024, 1, 1, 12)",
    ],
    "timedelta(hours=1)": ["timedelta(minutes=60)", "3600"],
    "deque([1, 2])": ["deque([1, 2], maxlen=5)", "[1, 2]"],
    "Counter('aab')": ["{'a': 2, 'b': 1}", "Counter('ab')"],
    "OrderedDict(a=1, b=2)": ["{'b': 2, 'a': 1}", "OrderedDict(b=2, a=1)"],
    "defaultdict(int, a=1)": ["{'a': 1}", "{'a': 2}"],
    "frozenset({1})": ["{1}", "[1]"],
    "Pair(1, 'b')": ["(1, 'b')", "(1, 'c')"],
    "1 + 2j": ["complex(1, 2)", "1"],
    "[{'x': (Decimal(1), deque([Fraction(2)]))}]": ["[{'x': (1, deque([2]))}]", "[{'x': (1, [2])}]"],
}
IMPORTS = """from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
Pair = namedtuple('Pair', 'x y')
"""


@pytest.mark.parametrize("expected", VALUES)
def test_results_compare_as_in_python(reward: CodeReward, expected: str) -> None:
    equal, other = VALUES[expected]
    for returned, score in ((expected, 1.0), (equal, 1.0), (other, 0.0)):
        solution = f"{IMPORTS}def f(x=None): return {returned}"
        assert judged(reward, solution, f"assert f() == {expected}", setup=IMPORTS).score == score, returned
    echo = f"assert f({expected}) == {expected} and type(f({expected})).__name__ == type({expected}).__name__"
    assert judged(reward, "def f(x): return x", echo, setup=IMPORTS).score == 1.0


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("import numpy\nassert f(1) == numpy.array([1])", "numpy can't be imported"),
        ("from pandas.x import y\nassert f(1) == y", "pandas can't be imported"),
        ("assert f(object()) == 1", "pass a object"),
        ("class T:\n pass\nassert f(T()) == 1", "pass a T"),
        ("class T:\n pass\nassert f(1) == [T()]", "expect a T"),
        ("class T:\n pass\ndef check(c):\n assert c(1) == 2\n assert c(T()) == 2", "pass a T"),
        ("import re\nassert f('a') == re.match('a', 'a')", "expect a Match"),
    ],
)
def test_what_cannot_cross_is_refused_with_the_row(reward: CodeReward, tests: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reward.check(Task("", {"language": "python", "tests": tests, "entry_point": "f"}))


@pytest.mark.parametrize(
    ("tests", "setup"),
    [
        ("class T:\n pass\nt = T()\nassert f(1) == 1", ""),
        ("assert f(T(1)) == T(1)", "from dataclasses import dataclass\n@dataclass\nclass T:\n x: int"),
        ("try:\n import numpy\nexcept ImportError:\n pass\nassert f(1) == 1", ""),
        ("from decimal import Decimal\nassert abs(f(Decimal(1)) - 2) < 3 and sorted(f([1])) == [1]", ""),
        ("import itertools, threading\nwhile True: f(1)", ""),
    ],
)
def test_rows_that_can_be_judged_are_accepted(reward: CodeReward, tests: str, setup: str) -> None:
    reward.check(Task("", {"language": "python", "tests": tests, "entry_point": "f", "setup": setup, "time_limit": 1}))


def test_a_function_called_check(reward: CodeReward) -> None:
    assert (
        judged(reward, "def check(x): return x > 1", ["assert check(2)", "assert not check(1)"], "check").score == 1.0
    )


@pytest.mark.parametrize(
    ("solution", "outcome", "message"),
    [
        ("def f(x): return x", "wrong answer", "assert f(1) == 2: AssertionError, got 1"),
        ("def f(x): return None", "wrong answer", "got None"),
        ("def f(x): return x.y", "crash", "AttributeError"),
        ("def f(x): return f(x)", "crash", "RecursionError"),
        ("raise ValueError('at once')", "crash", "ValueError: 'at once'"),
        ("import numpy\ndef f(x): return x", "crash", "ModuleNotFoundError"),
        ("def f(x) return x", "compile error", "SyntaxError: expected ':' (solution.py, line 1)"),
        ("def g(x): return x", "compile error", "defines no 'f'"),
        ("def f(x):\n while True: pass", "time limit", ""),
        ("import time\ndef f(x): time.sleep(100)", "time limit", ""),
        ("def f(x): return len([0] * 10**9)", "memory limit", "MemoryError"),
        ("def f(x): return 'a' * (1 << 25)", "output limit", "16 MiB"),
        ("a\x00b", "compile error", "null bytes"),
        ("(" * 10**5, "compile error", "SyntaxError"),
        ("x = " + "-" * 10**5 + "1", "compile error", "Error"),
        ("x = " + "1+" * 10**5 + "1", "compile error", "Error"),
        ("x\ud800 = 1", "compile error", "SyntaxError"),
    ],
)
def test_outcomes(reward: CodeReward, solution: str, outcome: str, message: str) -> None:
    verdict = judged(reward, solution, "assert f(1) == 2", time_limit=1.0, memory_mb=128)
    assert (verdict.score, verdict.status, verdict.outcome) == (0.0, Status.OK, outcome), verdict
    assert message in verdict.detail


def test_a_fraction_of_the_tests(reward: CodeReward) -> None:
    share = CodeReward(credit="fraction")
    tests = ["assert f(0) == 0", "assert f(1) == 2", "assert f(2) == 4", "assert f(3) == 9"]
    assert judged(share, "def f(x): return x * x", tests).score == 0.75
    assert judged(share, "def f(x): return x / x * x * x", tests).score == 0.5  # ZeroDivisionError for 0
    dies = "import os\ndef f(x): return x * x if x < 1 else os._exit(0)"
    assert judged(share, dies, tests).score == 0.25
    assert judged(share, dies, [tests[0], f"try:\n {tests[1]}\nexcept:\n pass"]).score == 0.5
    assert (
        judged(share, "def f(x): return x * x", ["import math", *tests]).score == 0.75
    )  # what calls nothing is no test
    assert judged(reward, "def f(x): return x * x", tests).score == 0.0


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("g = f\nassert True", "never call 'f'"),
        ("def test_f():\n assert f(1) == 1", "never call 'f'"),
        ("raise KeyError\nassert f(1) == 1", "before it calls the solution: raise KeyError: KeyError"),
        ("assert f(3) == 3\nassert f(ValueError(1)) == 1", "pass a ValueError"),
        ("assert f('a' * (1 << 25))", "16 MiB"),
        ("import os\nf(1)\nos._exit(0)", "no verdict"),
        ("f(1)\nraise SystemExit", "no verdict"),
    ],
)
def test_broken_tests_are_no_score(reward: CodeReward, tests: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        judged(reward, "def f(x): return x", tests)


def test_a_fault_is_shown_where_it_was_raised(reward: CodeReward) -> None:
    """In a function of the setup or of another test too."""
    setup = "\n\n\ndef want(x):\n assert x == 2, 'two'"
    tests = ["def twice(g):\n return g(g(1))", "want(f(2)); assert twice(f) == 1", "want(f(1))"]
    verdict = judged(reward, "def f(x): return x", tests, setup=setup)
    assert verdict.detail == "assert x == 2, 'two': AssertionError: 'two', got 1"
