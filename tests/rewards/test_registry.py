"""Rewards by name, and what a wrong spec is told."""

import subprocess
import sys

import pytest

from configs.rewards import RewardSpec
from rewards.registry import FACTORIES, build
from rewards.types import Task


def test_every_name_builds() -> None:
    for name in FACTORIES:
        assert callable(build(RewardSpec(name=name)).score)
    assert build(RewardSpec(name="math")).score(Task("", "63"), "63") == 1.0


def test_arguments_arrive() -> None:
    assert build(RewardSpec(name="reasoning_gym", args={"extract": "whole"})) != build(RewardSpec(name="reasoning_gym"))


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("maths", {}, r"'maths'.*did you mean 'math'"),
        ("reasoning_gym", {"extrakt": "whole"}, r"reasoning_gym.*'extrakt'.*did you mean 'extract'"),
        ("reasoning_gym", {"extract": "half"}, r"reasoning_gym.*extract.*'half'"),
        ("reasoning_gym", {"extract": 1}, r"reasoning_gym.*extract.*1"),
        ("math", {"precision": 6}, r"math.*'precision'"),
    ],
)
def test_wrong_specs_name_what_is_wrong(name: str, args: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build(RewardSpec(name=name, args=args))


def test_the_room_is_light() -> None:
    """What a judging process imports: no torch, no ray, and no checker before one is asked for."""
    heavy = ("torch", "ray", "vllm", "transformers", "sympy", "reasoning_gym")
    program = f"import sys, rewards.guard; sys.exit(str([name for name in {heavy} if name in sys.modules]))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert found.stderr.strip() == "[]"
    program = (
        f"import sys, rewards.math, rewards.gym; sys.exit(str([name for name in {heavy[:4]} if name in sys.modules]))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert found.stderr.strip() == "[]"
