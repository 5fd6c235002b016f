"""Programs compiled and run: outputs compared, outcomes told apart, checkers asked, in every language there is."""

from typing import Any

import pytest

from rewards.code import cases
from rewards.code.cases import same_output
from rewards.code.reward import CodeReward
from rewards.sandbox.process import Limits
from rewards.types import Status, Task, Verdict
from tests.rewards.sandbox.programs import available_languages

SUM = "a, b = map(int, input().split())\nprint(a + b)"
CASES = [{"stdin": "1 2\n", "stdout": "3\n"}, {"stdin": "5 5", "stdout": "10"}, {"stdin": "-1 1", "stdout": "0"}]


@pytest.fixture(scope="module")
def reward() -> CodeReward:
    reward = CodeReward()
    reward.setup()
    return reward


def judged(reward: CodeReward, source: str, *, language: str = "python", **truth: Any) -> Verdict:
    task = Task("", {"language": language, **({} if "compile_only" in truth else {"cases": CASES}), **truth})
    reward.check(task)
    return reward.score(task, source)


@pytest.mark.parametrize(
    ("expected", "got", "same"),
    [
        ("3", "3\n", True),
        ("3\n4\n", "3 \r\n4\t\n\n \n", True),
        ("", "\n", True),
        ("a\n\nb", "a\n\nb\n", True),
        ("a\n\nb", "a\nb", False),
        ("1 2", "1  2", False),
        (" 1", "1", False),
        ("\n1", "1", False),
        ("3", "3.0", True),
        ("3.0", "3", True),
        ("0.333333333333", "0.333333", True),
        ("0.3", "0.30000000000000004", True),
        ("x=2.50, y=1e5", "x=2.5, y=100000", True),
        ("0.666667", "0.666666", True),
        ("0.0", "-5.5e-17", True),
        ("3", "3.0000001", False),
        ("3", "4", False),
        ("12", "12.5", False),
        ("100000000000000000000", "100000000000000000001.0", False),
        ("9" * 5000, "9" * 4999 + "8", False),
        ("1234567.50", "1234567.75", False),
        ("1000000000000.5", "1000000000000.75", False),
        ("0.33", "0.3333", False),
        ("0.0000001234", "0.0000005", False),
        ("1.234e-07", "0.0", False),
        ("007", "7", False),
        ("1.2.3", "1.2.30", False),
        ("v1.10", "v1.1", False),
        ("2.5", "-2.5", False),
        ("nan", "0.0", False),
        ("3", "", False),
        ("Yes", "YES", False),
        ("\xe9", "\xe9", True),
    ],
)
def test_outputs_agree_line_by_line(expected: str, got: str, same: bool) -> None:
    assert same_output(expected.encode(), got.encode()) is same


@pytest.mark.parametrize(
    ("source", "outcome", "message"),
    [
        (SUM, "passed", ""),
        (f"Here:\n```python\n{SUM}\n```\nDone.", "passed", ""),
        (SUM.replace("+", "*"), "wrong answer", "case 1 of 3: line 1: expected '3', got '2'"),
        (SUM.replace("+", "* 0 + 3 + 0 *"), "wrong answer", "case 2 of 3: line 1: expected '10', got '3'"),
        ("", "no code", ""),
        ("print(", "compile error", "SyntaxError"),
        ("print(" * 10**5, "compile error", "output limit"),
        ("1 / 0", "crash", "exit code 1: ZeroDivisionError"),
        (f"{SUM}\nraise SystemExit(3)", "crash", "exit code 3"),
        (f"{SUM}\nexit()", "passed", ""),
        ("import os\nos.abort()", "crash", "signal 6"),
        ("while True: pass", "time limit", "1 s"),
        ("a = [0] * 10**9", "memory limit", "64 MiB"),
        ("while True: print('x' * 1000)", "output limit", "1024 KiB"),
        ("print(a := input()[:0], end='')", "wrong answer", "expected '3', got ''"),
        (f"{SUM}\nprint(0)", "wrong answer", "line 2: expected the end, got '0'"),
    ],
)
def test_outcomes(reward: CodeReward, source: str, outcome: str, message: str) -> None:
    verdict = judged(reward, source, time_limit=1.0, memory_mb=64)
    assert (verdict.score, verdict.status) == (float(outcome == "passed"), Status.OK), verdict
    assert verdict.outcome == outcome and message in verdict.detail, verdict


def test_a_crash_is_no_empty_output(reward: CodeReward) -> None:
    cases = [{"stdin": "", "stdout": ""}, {"stdin": "1", "stdout": "1"}]
    assert judged(reward, "print(int(input()))", cases=cases).outcome == "crash"
    assert judged(reward, "import sys\nprint(sys.stdin.read())", cases=cases).outcome == "passed"


def test_a_fraction_of_the_cases() -> None:
    share = CodeReward(credit="fraction")
    assert judged(share, SUM).score == 1.0
    once = "a, b = map(int, input().split())\nprint(10 if a == 5 else 1 // (a + 1))"
    verdict = judged(share, once)  # wrong, right, crash
    assert (verdict.score, verdict.outcome) == (pytest.approx(1 / 3), "wrong answer")
    assert judged(share, "print(").score == 0.0


def test_cases_share_nothing(reward: CodeReward) -> None:
    program = f"import os\nassert os.listdir('/tmp') == []\nopen('/tmp/left', 'w')\n{SUM}"
    assert judged(reward, program).score == 1.0
    assert judged(reward, f"open('left', 'w')\n{SUM}").outcome == "crash"  # its folder is read-only


def test_long_outputs_that_are_expected_fit(reward: CodeReward) -> None:
    size = 3 << 20
    assert judged(reward, f"print('x' * {size})", cases=[{"stdout": "x" * size}]).score == 1.0


ADD = {
    "python": SUM,
    "c": '#include <stdio.h>\nint main(void) { int a, b; scanf("%d %d", &a, &b); printf("%d\\n", a + b); }',
    "cpp": "#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << a + b; }",
    "rust": "fn main() {\n let mut s = String::new();\n std::io::stdin().read_line(&mut s).unwrap();\n"
    ' let sum: i32 = s.split_whitespace().map(|x| x.parse::<i32>().unwrap()).sum();\n println!("{}", sum);\n}',
    "go": 'package main\nimport "fmt"\nfunc main() { var a, b int; fmt.Scan(&a, &b); fmt.Println(a + b) }',
    "java": "import java.util.*;\npublic class Solution { public static void main(String[] x) {"
    " Scanner s = new Scanner(System.in); System.out.println(s.nextInt() + s.nextInt()); } }",
    "javascript": "const [a, b] = require('fs').readFileSync(0, 'utf8').split(' ').map(Number);\nconsole.log(a + b);",
    "typescript": "import { readFileSync } from 'fs';\n"
    "const xs: number[] = readFileSync(0, 'utf8').split(' ').map(Number);\nconsole.log(xs[0] + xs[1]);",
    "bash": "read a b\necho $((a + b))",
}


@pytest.mark.parametrize("language", ADD)
def test_every_language(reward: CodeReward, language: str) -> None:
    if language not in available_languages():
        pytest.skip(f"no toolchain for {language}")
    program, fence = ADD[language], "`" * 3
    passed = judged(reward, f"{fence}{language}\n{program}\n{fence}", language=language, memory_mb=512)
    assert (passed.score, passed.outcome) == (1.0, "passed"), passed
    other = [CASES[0], {"stdin": "1 2", "stdout": "4"}]
    wrong = judged(reward, program, language=language, memory_mb=512, cases=other)
    assert (wrong.score, wrong.outcome) == (0.0, "wrong answer"), wrong
    assert judged(reward, program, language=language, compile_only=True).score == 1.0
    broken = judged(reward, program + "\n) {", language=language, compile_only=True)
    assert (broken.score, broken.outcome) == (0.0, "compile error") and broken.detail, broken


# Accepts any order of the lines.
UNORDERED = """
import sys
given, output, answer = (open(name).read() for name in sys.argv[1:])
assert given == "3 1 2\\n"
if not all(line.isdigit() for line in output.split()):
    print("not numbers")
    sys.exit(2)
sys.exit(0 if sorted(output.split()) == answer.split() else 1)
"""
PERMUTED = {"cases": [{"stdin": "3 1 2\n", "stdout": "1 2 3"}], "checker": {"language": "python", "source": UNORDERED}}


@pytest.mark.parametrize(
    ("source", "outcome", "message"),
    [
        ("print(input())", "passed", ""),
        ("print('1 2')", "wrong answer", "the checker says"),
        ("print('x')", "wrong answer", "not numbers"),
        ("1 / 0", "crash", "ZeroDivisionError"),
        ("import os\nprint(*os.listdir())", "wrong answer", "not numbers"),
    ],
)
def test_a_checker_judges(reward: CodeReward, source: str, outcome: str, message: str) -> None:
    verdict = judged(reward, source, **PERMUTED)
    assert (verdict.score, verdict.outcome) == (float(outcome == "passed"), outcome)
    assert message in verdict.detail


def test_a_checker_in_another_language_and_without_an_answer(reward: CodeReward) -> None:
    source = """
    #include <fstream>
    int main(int count, char** names) {
        std::ifstream input(names[1]), output(names[2]);
        int n, a, b;
        input >> n;
        return output >> a >> b && a + b == n && count == 4 ? 0 : 1;
    }"""
    truth: dict[str, Any] = {
        "cases": [{"stdin": "7"}, {"stdin": "9"}],
        "checker": {"language": "cpp", "source": source},
    }
    assert judged(reward, "n = int(input()); print(n - 2, 2)", **truth).score == 1.0
    assert judged(reward, "print(5, 2)", **truth).detail.startswith("case 2 of 2: the checker says")


@pytest.mark.parametrize(
    ("checker", "message"),
    [
        ("raise SystemExit(3)", "checker failed: .*exit code 3"),
        ("raise ValueError", "checker failed, on the answer .*ValueError"),
        ("import os\nos.abort()", "checker failed, on the answer .*crash"),
        ("while True: pass", "checker failed, on the answer .*time limit"),
        ("print(", "checker failed, on the answer .*SyntaxError"),
    ],
)
def test_a_failing_checker_is_no_score(
    reward: CodeReward, checker: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cases, "CHECKING", Limits(seconds=1))
    with pytest.raises(RuntimeError, match=message):
        judged(reward, SUM, checker={"language": "python", "source": checker})


# The usual way to write one: it asserts, and reads numbers as if there could be nothing else.
ASSERTING = """
import sys
given, output, answer = (open(name).read() for name in sys.argv[1:])
values = [int(line) for line in output.split()]
assert sum(values) == int(given), "a wrong sum"
values[1]
"""


@pytest.mark.parametrize("answer", ["3 4", None], ids=["with an answer", "without"])
@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("3 4", ""),
        ("3 5", "AssertionError: a wrong sum"),
        ("nonsense", "ValueError: invalid literal"),
        ("7", "IndexError"),
    ],
)
def test_an_output_that_a_checker_fails_on_is_wrong(
    reward: CodeReward, output: str, message: str, answer: str | None
) -> None:
    """Else a policy would escape a bad score by printing nonsense."""
    truth = {"cases": [{"stdin": "7", "stdout": answer}], "checker": {"language": "python", "source": ASSERTING}}
    verdict = judged(reward, f"print({output!r})", **truth)
    assert (verdict.score, verdict.outcome) == ((0.0, "wrong answer") if message else (1.0, "passed"))
    assert message in verdict.detail


@pytest.mark.parametrize("answer", ["3 4", None], ids=["with an answer", "without"])
@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("assert False, 'at import'" + ASSERTING, "at import"),
        ("int('at import')" + ASSERTING, "at import"),
        (ASSERTING + "\nundefined", "NameError"),
        (ASSERTING + "\nsys.exit(3)", "exit code 3"),  # as testlib's checkers say that they failed
    ],
)
def test_a_checker_that_fails_by_itself_is_no_score(
    reward: CodeReward, broken: str, message: str, answer: str | None
) -> None:
    truth = {"cases": [{"stdin": "7", "stdout": answer}], "checker": {"language": "python", "source": broken}}
    with pytest.raises(RuntimeError, match=message):
        judged(reward, "print(3, 4)", **truth)


def test_an_output_on_which_a_compiled_checker_crashes_is_wrong(reward: CodeReward) -> None:
    source = """
    #include <cstdlib>
    #include <fstream>
    int main(int, char** names) {
        int n;
        if (!(std::ifstream(names[2]) >> n)) std::abort();
        return n != 7;
    }"""
    checker = {"language": "cpp", "source": source}
    with_answer, without = {"stdin": "", "stdout": "7"}, {"stdin": ""}
    assert judged(reward, "print('x')", cases=[with_answer], checker=checker).outcome == "wrong answer"
    assert judged(reward, "print(7)", cases=[with_answer], checker=checker).score == 1.0
    with pytest.raises(RuntimeError, match="crash"):
        judged(reward, "print('x')", cases=[without], checker=checker)


def test_a_program_that_takes_long_to_compile_does_not_compile() -> None:
    """Its limit follows from the task's, and can be set."""
    endless = "constexpr long f(long n) { return n < 2 ? n : f(n - 1) + f(n - 2); } static_assert(f(60) > 0);"
    flags = '#pragma GCC optimize("O0")\n'
    reward = CodeReward(compile_seconds=1)
    reward.setup()
    verdict = judged(reward, flags + endless + "int main() {}", language="cpp", time_limit=1.0)
    assert (verdict.score, verdict.outcome) == (0.0, "compile error")
    task = Task("", {"language": "cpp", "cases": CASES, "time_limit": 1.0})
    fast, slow = CodeReward().time_limit(task), CodeReward(compile_seconds=30).time_limit(task)
    assert slow - fast == 3 * (30 - 7)


def test_a_task_that_a_silent_program_solves_is_refused(reward: CodeReward) -> None:
    blank: list[dict[str, str]] = [{"stdin": "1", "stdout": "\n\n"}, {"stdin": "2", "stdout": ""}]
    with pytest.raises(ValueError, match="every stdout is blank"):
        judged(reward, "pass", cases=blank)
    assert judged(reward, "print(input() if 0 else '')", cases=[*blank, *CASES]).score == 0.0
