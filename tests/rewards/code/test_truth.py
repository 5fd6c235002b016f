"""Truths that are refused, each with the key and the remedy."""

import json
from typing import Any

import pytest

from rewards.code.truth import read_truth

PYTHON = {"language": "python", "entry_point": "f"}


@pytest.mark.parametrize(
    "truth",
    [
        {"language": "cpp", "cases": [{"stdin": "1", "stdout": "2"}], "time_limit": 2, "memory_mb": 256},
        {"language": "rust", "compile_only": True, "cases": None, "tests": None},
        {**PYTHON, "tests": "assert f(1) == 2"},
        {**PYTHON, "tests": ["assert f(1) == 2", "x = f(2)\nassert x > 2"]},
        {**PYTHON, "tests": "def check(g):\n import math\n assert math.isclose(g(1), sum([2]))"},
        {**PYTHON, "tests": "assert helper(f(1))", "setup": "def helper(x):\n global y\n y = x\n return y"},
        {**PYTHON, "tests": "assert f(root) == [n for n in (1,)]", "setup": "root = Node()", "classes": ["Node"]},
        {**PYTHON, "tests": "assert f(g(1)) == 1", "entry_point": ["f", "g"]},
        {**PYTHON, "tests": "def check(c):\n assert c(1) == 2", "entry_point": "Solution().f"},
        {"language": "python", "tests": "assert Stack().pop() is None", "classes": ["Stack"]},
        {**PYTHON, "tests": "assert isclose(f(1), 2)", "setup": "from math import *"},
        {"language": "c", "cases": [{"stdin": "1"}], "checker": {"language": "python", "source": "pass"}},
    ],
)
def test_every_form_is_read_also_as_json(truth: dict[str, Any]) -> None:
    assert read_truth(json.dumps(truth)) == read_truth(truth)


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        (None, "with language"),
        ("assert f(1)", "not JSON"),
        ("[1]", "expected an object"),
        ({}, r"truth\.language"),
        ({"language": "cpp"}, "cases, tests and compile_only.*none"),
        ({"language": "cpp", "cases": []}, "got none"),
        ({"language": "cpp", "cases": [{"stdout": "1"}], "compile_only": True}, "got cases and compile_only"),
        ({"language": "cpp", "case": []}, "did you mean 'cases'"),
        ({"language": "cpp", "cases": [{"stdin": "1"}]}, r"cases\.0\.stdout: missing"),
        ({"language": "cpp", "cases": [{"stdin": 1, "stdout": "1"}]}, r"truth\.cases\.0\.stdin: "),
        ({"language": "cpp", "compile_only": True, "time_limit": 0}, r"truth\.time_limit: .*than 0"),
        ({"language": "cpp", "compile_only": True, "setup": "x"}, "belong to tests"),
        ({"language": "cpp", "compile_only": True, "checker": {"language": "c", "source": ""}}, "judges the output"),
        ({"language": "java", "tests": "x", "entry_point": "f"}, "not for java.*write cases"),
        ({"language": "python", "tests": "assert f(1)"}, "entry_point: missing"),
        ({**PYTHON, "tests": "assert f(1"}, "'\\(' was never closed"),
        ({**PYTHON, "tests": "assert f(1)", "entry_point": "f(1)"}, r"'f\(1\)'"),
        ({**PYTHON, "tests": "assert g(1)"}, "call 'f'"),
        ({**PYTHON, "tests": "assert math.isclose(f(1), 2)"}, "math .*define or import it"),
        ({**PYTHON, "tests": "def check(c):\n assert helper(c(1))"}, "helper .*define"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(truth: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_truth(truth)
