"""A reward for the procedural tasks of reasoning_gym: the score of each task's own verifier."""

import ast
import json
import re
from functools import lru_cache
from typing import Any, Literal

import reasoning_gym
from reasoning_gym.dataset import ProceduralDataset

from configs.base import Settings
from rewards.math.answer import last_number, marked_answer
from rewards.thinking import after_thinking
from rewards.types import Status, Task, Verdict

_CONSOLATION = 0.02
"""Several verifiers give 0.01 or 0.02 for any text, which among rewards of 0 and 1 only blurs the failures."""

_RUNS_ANSWER = frozenset(
    {"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"}  # through eval
    | {"countdown", "intermediate_integration", "polynomial_multiplication"}  # through sympy.parse_expr
    | {"puzzle24", "simple_integration"}
)
"""Tasks whose verifier runs the answer as Python (reasoning_gym 0.1.25). A test over all tasks finds missing ones."""

_ACCEPTS_ANYTHING = frozenset({"game_of_life_halting"})
"""Tasks whose verifier gives any text full marks (the same release; the same kind of test)."""

_OPERATORS = (ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop)
_COMPUTES = (*_OPERATORS, ast.Expression, ast.Constant, ast.Name, ast.Load, ast.List, ast.Tuple)
_FUNCTIONS = frozenset(
    {"Abs", "acos", "asin", "atan", "cos", "cosh", "exp", "ln", "log", "sin", "sinh", "sqrt", "tan", "tanh"}
)


class GymReward(Settings):
    """The score of the task's own verifier, usually between 0 and 1; a score of at most 0.02 counts as 0.

    `task.metadata` holds `task`, its name; `entry`, the row that reasoning_gym generated; and `params`, the generator's
    arguments, which some verifiers need.

    A verifier may raise on text that it cannot read. If it gives the row's own answer full marks, the text is wrong
    (0.0). If not, the verifier is broken, and the verdict is `abstain`.
    """

    extract: Literal["final", "whole"] = "final"
    """Text for the verifier. `final`: the answer marked in the completion, or the last number where the row's own
    answer is a number, else the text after `</think>`. `whole`: the completion."""

    def check(self, task: Task) -> None:
        """Raises ValueError where metadata lacks a part, and for a task whose verifier accepts any text."""
        for part in ("task", "entry"):
            if part not in task.metadata:
                raise ValueError(f"metadata has no '{part}'; take the rows from a source of type reasoning_gym")
        if task.metadata["task"] in _ACCEPTS_ANYTHING:
            raise ValueError(f"{task.metadata['task']}'s verifier gives any text full marks; take another task")
        _verifier(task.metadata["task"], json.dumps(task.metadata.get("params", {}), sort_keys=True))

    def score(self, task: Task, completion: str) -> float | Verdict:
        """The verdict; see the class. Raises KeyError where metadata lacks a part."""
        name, entry = task.metadata["task"], task.metadata["entry"]
        if name in _ACCEPTS_ANYTHING:
            return Verdict(None, Status.ABSTAIN, f"{name}'s verifier gives any text full marks")
        gold = entry["answer"]
        answer = completion if self.extract == "whole" else _extract(completion, gold)
        if name in _RUNS_ANSWER and answer != gold and not _is_harmless(answer):
            return Verdict(0.0, detail="an answer that calls functions is not given to a verifier that runs it")
        verifier = _verifier(name, json.dumps(task.metadata.get("params", {}), sort_keys=True))
        verified = _verify(verifier, answer, entry)
        if isinstance(verified, float):
            return verified if verified > _CONSOLATION else 0.0
        detail = f"{name}'s verifier cannot read it: {type(verified).__name__}: {verified}"
        gold_accepted = gold is not None and _verify(verifier, gold, entry) == 1.0
        return Verdict(0.0, detail=detail) if gold_accepted else Verdict(None, Status.ABSTAIN, detail)


def _extract(completion: str, gold: str | None) -> str:
    """The answer in `completion`, searched as a number where the row's own answer `gold` is one."""
    marked = marked_answer(completion)
    if marked is not None:
        return marked
    number = last_number(completion) if gold is not None and re.fullmatch(r"-?[\d.,]+", gold) else None
    return after_thinking(completion).strip() if number is None else number


@lru_cache(maxsize=128)
def _verifier(name: str, params: str) -> ProceduralDataset:
    """The data set that scores its rows; `params` is JSON. Raises ValueError for an unknown task."""
    return reasoning_gym.create_dataset(name, **json.loads(params))


def _verify(verifier: ProceduralDataset, answer: str, entry: dict[str, Any]) -> float | Exception:
    """The verifier's score, or the exception that it raised."""
    try:
        return float(verifier.score_answer(answer, entry))
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001  a hundred verifiers may raise anything
        return error


def _is_harmless(answer: str) -> bool:
    """True where running `answer` as Python only computes: it calls known functions, or none."""
    if "(" not in answer:
        return True
    try:
        tree = ast.parse(answer.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # the last two: nested too deep for the parser
        return False
    return all(isinstance(node, _COMPUTES) or _is_known_call(node) for node in ast.walk(tree))


def _is_known_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
