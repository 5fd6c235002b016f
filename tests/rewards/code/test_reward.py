"""The code reward before it runs: refusals and time limits."""

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from rewards.code import reward as code_reward
from rewards.code.reward import CodeReward
from rewards.sandbox import toolchains
from rewards.sandbox.box import Sandbox
from rewards.sandbox.process import Limits
from rewards.types import Task


def task(**truth: Any) -> Task:
    return Task("", truth)


TESTS = {"language": "python", "tests": "assert f(1)", "entry_point": "f"}
CASES = {"language": "python", "cases": [{"stdout": "1"}] * 10}
CHECKER = {"language": "python", "source": ""}


def test_a_missing_toolchain_is_refused_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    rust = toolchains.LANGUAGES["rust"]
    monkeypatch.setitem(toolchains.LANGUAGES, "rust", replace(rust, command="no-such-command"))
    toolchains.find_toolchain.cache_clear()
    for truth in ({"language": "rust", "compile_only": True}, CASES | {"checker": CHECKER | {"language": "rust"}}):
        with pytest.raises(ValueError, match=r"'rust'.*install rustc"):
            CodeReward().check(Task("", truth))
    toolchains.find_toolchain.cache_clear()


def test_unknown_languages_and_wrong_truths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'pyton'.*did you mean 'python'"):
        CodeReward().check(task(language="pyton", compile_only=True))
    with pytest.raises(ValueError, match="call 'g'"):
        CodeReward().check(Task("", TESTS | {"entry_point": "g"}))
    CodeReward().check(Task("", TESTS))


def test_arguments_are_checked() -> None:
    wrongs: list[dict[str, Any]] = [
        {"sandbox": "none"},
        {"credit": "half"},
        {"seconds": 0},
        {"memory_mb": 1},
        {"timeout": 3},
    ]
    for wrong in wrongs:
        with pytest.raises(ValidationError):
            CodeReward(**wrong)


def test_no_sandbox_no_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Sandbox, mode: str = "bubblewrap") -> None:
        if mode == "bubblewrap":
            raise ValueError("sandbox: no box can be made here")

    monkeypatch.setattr(Sandbox, "__init__", refuse)
    monkeypatch.setattr(code_reward, "_sandbox", code_reward._sandbox.__wrapped__)  # not one made before
    with pytest.raises(ValueError, match="no box"):
        CodeReward().setup()
    with pytest.raises(ValueError, match="no box"):
        CodeReward().score(Task("", CASES), "print(1)")


def wall(seconds: float) -> float:
    return Limits(seconds=seconds).wall_seconds + 2  # for the box


def test_a_verdict_takes_at_most_all_its_runs() -> None:
    reward = CodeReward(seconds=3.0)
    assert reward.time_limit(Task("", TESTS)) == wall(6)  # the tests may take twice as long
    assert reward.time_limit(Task("", TESTS | {"time_limit": 1.0})) == wall(2)
    compiling = wall(2 * 3 + 5)
    assert reward.time_limit(Task("", CASES)) == compiling + 10 * wall(3)
    # The checker's compiler is trusted with 30 s, and it may judge each case's answer besides the output.
    checked = compiling + wall(30) + 10 * (wall(3) + 2 * wall(10))
    assert reward.time_limit(Task("", CASES | {"checker": CHECKER})) == checked
    assert reward.time_limit(task(language="c", compile_only=True)) == compiling + wall(3)
    slow = CodeReward(seconds=3.0, compile_seconds=20.0)
    assert slow.time_limit(task(language="c", compile_only=True)) == wall(20) + wall(3)


@pytest.mark.parametrize("truth", [TESTS, CASES])
def test_unsafe_judges_too(truth: dict[str, Any]) -> None:
    reward = CodeReward(sandbox="unsafe")
    reward.setup()
    assert reward.score(Task("", truth), "print(1)\ndef f(x): return x").score == 1.0
    assert reward.score(Task("", truth), "print(0)\ndef f(x): return not x").score == 0.0
    assert reward.score(Task("", truth), "import os\nos._exit(0)").score == 0.0
