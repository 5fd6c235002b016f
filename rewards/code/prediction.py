"""Predictions about a function, judged by running it: CRUXEval (Gu et al., arXiv:2401.03065)."""

import ast
import re
from typing import Literal

from pydantic import Field

from configs.base import Settings
from rewards.code.outcome import CodeOutcome
from rewards.code.reward import CodeReward
from rewards.thinking import after_thinking
from rewards.types import Task, Verdict

_ANSWER = re.compile(r"\[ANSWER\](.*?)(?:\[/ANSWER\]|\Z)", re.DOTALL)
_VALUES = (
    *(ast.Constant, ast.List, ast.Tuple, ast.Dict, ast.Set, ast.UnaryOp, ast.unaryop, ast.BinOp, ast.operator),
    *(ast.Starred, ast.keyword, ast.expr_context),
)
_CONSTRUCTORS = {"set", "frozenset", "dict", "list", "tuple", "float", "int", "str", "bytes", "bytearray", "range"}


class FunctionTruth(Settings):
    """`task.truth`: a function f, and the side of `f(input) == output` that is to be predicted."""

    code: str = Field(min_length=1)
    """Python source that defines f."""
    input: str
    """Arguments of f, as source."""
    output: str
    """Value of f for them, as source."""
    predicts: Literal["input", "output"]


class PredictionReward(CodeReward):
    """Score 1.0 for a predicted output that f has, or a predicted input for which f has the output, else 0.0.

    `task.truth` is a `FunctionTruth`. The prediction stands between [ANSWER] and [/ANSWER], as `f(...) == value`, or
    the predicted side alone. It must be made of plain values, since other source could change f. Any input counts for
    which f has the output. f and the prediction run in one box, the comparison in another.

    Example:
        truth = {"code": "def f(x): return x + 1", "input": "2", "output": "3", "predicts": "input"}
        PredictionReward().score(Task("...", truth), "[ANSWER]f(2)[/ANSWER]").score  # 1.0
    """

    def check(self, task: Task) -> None:
        """Raises ValueError if `task.truth` is wrong."""
        truth = FunctionTruth.model_validate(task.truth)
        super().check(_program_task(task, truth))
        if prediction(f"[ANSWER]f({truth.input}) == {truth.output}[/ANSWER]", truth.predicts) is None:
            raise ValueError(f"truth: 'f({truth.input}) == {truth.output}' is not made of plain values")

    def time_limit(self, task: Task) -> float:
        return super().time_limit(_program_task(task, FunctionTruth.model_validate(task.truth)))

    def score(self, task: Task, completion: str) -> Verdict:
        """Judge the prediction in `completion`; see the class. Raises ValueError for a wrong `task.truth`."""
        truth = FunctionTruth.model_validate(task.truth)
        source = prediction(after_thinking(completion), truth.predicts)
        if source is None:
            return Verdict(0.0, outcome=CodeOutcome.NO_CODE, detail="no prediction in plain values")
        body = f"{truth.code}\n\n" if truth.predicts == "input" else ""
        return self.judge_source(_program_task(task, truth), f"{body}def answer():\n    return {source}\n")


def prediction(text: str, predicts: Literal["input", "output"]) -> str | None:
    """Return the predicted side of the last answer in `text` as source, the call of f or its value; None without one.

    Example:
        prediction("[ANSWER]assert f(1, 'a') == 'aa'[/ANSWER]", "input")  # "f(1, 'a')"
    """
    answers = _ANSWER.findall(text)
    try:
        [statement] = ast.parse((answers[-1] if answers else text).strip().strip("`").strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    node = statement.test if isinstance(statement, ast.Assert) else getattr(statement, "value", None)
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], ast.Eq):
        node = node.left if predicts == "input" else node.comparators[0]
    if predicts == "output":
        return ast.unparse(node) if isinstance(node, ast.expr) and _is_plain(node) else None
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "f"):
        return None
    return ast.unparse(node) if all(map(_is_plain, [*node.args, *node.keywords])) else None


def _is_plain(node: ast.AST) -> bool:
    """Return True for source made of constants, containers and their constructors."""
    if isinstance(node, ast.Call):
        named = isinstance(node.func, ast.Name) and node.func.id in _CONSTRUCTORS
        return named and all(map(_is_plain, [*node.args, *node.keywords]))
    return isinstance(node, _VALUES) and all(map(_is_plain, ast.iter_child_nodes(node)))


def _program_task(task: Task, truth: FunctionTruth) -> Task:
    """Return the task of a program whose function `answer` gives the output."""
    tests = f"def check(candidate):\n    assert candidate() == {truth.output}"
    return Task(task.prompt, {"language": "python", "entry_point": "answer", "tests": tests}, row=task.row)
