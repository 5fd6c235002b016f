"""`alignyard reward list | new | check | score`: rewards."""

import json
import keyword
from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from jobs.command import ERR, OUT, one_line, plain_table, verb_app

if TYPE_CHECKING:
    from configs.rewards import RewardSpec
    from rewards.contract import Clause
    from rewards.offline import CompletionRow
    from rewards.types import Verdict

app = verb_app()


@app.callback()
def reward() -> None:
    """List, create, check and use rewards. docs/add_a_reward.md shows all of it in five minutes.

    \b
    Examples:
      alignyard reward list
      alignyard reward new polite
      alignyard reward check polite.py:polite --data rows.jsonl
      alignyard reward score math --data rows.jsonl --out judged.jsonl
    """


REWARD_TEMPLATE = '''\
"""The reward `NAME.py:NAME`."""


def NAME(task, completion, ignore_case=True):
    """1.0 where the last line of the completion is the truth, else 0.0.

    task.prompt is the text of the prompt, task.truth what to compare with, task.metadata all columns of the row.
    If it can't be judged, raise: the completion is then left out. A score of 0 would teach that it was wrong.
    """
    answer = completion.strip().rpartition("\\n")[2].strip()
    truth = str(task.truth).strip()
    if ignore_case:
        answer, truth = answer.casefold(), truth.casefold()
    return 1.0 if answer == truth else 0.0
'''
TEST_TEMPLATE = '''\
"""The test of NAME.py: run it with `pytest test_NAME.py`."""

import pytest
from rewards.types import Task

from NAME import NAME

TASK = Task("What is the capital of France?", "Paris")


@pytest.mark.parametrize("completion", ["Paris", "Let me think.\\nparis"])
def test_right_answers_get_full_marks(completion):
    assert NAME(TASK, completion) == 1.0


@pytest.mark.parametrize("completion", ["", "London", "Paris or London", "Paris\\nLondon"])
def test_wrong_answers_get_nothing(completion):
    assert NAME(TASK, completion) == 0.0


def test_case_can_count():
    assert NAME(TASK, "paris", ignore_case=False) == 0.0
'''

UNCOLOURED_STATUSES = ("ok", "abstain")

RewardName = Annotated[
    str, Argument(metavar="NAME", help="As in a recipe: a listed name, or path/to/file.py:NAME.", show_default=False)
]
RewardArguments = Annotated[
    list[str],
    Argument(metavar="key=value", default_factory=list, show_default=False, help="An argument of the reward, in YAML."),
]
DataFile = Annotated[Path, Option("--data", metavar="FILE", help="The rows, as JSONL.")]
TruthColumn = Annotated[
    str | None,
    Option("--truth", metavar="COLUMN", help="The column of the gold answers, as prompts.truth. [default: truth]"),
]
TimeLimit = Annotated[float, Option(metavar="S", help="Seconds for a verdict.")]


@app.command("list")
def list_all() -> int:
    """List the built-in and installed rewards with their pools.

    \b
    Example:
      alignyard reward list
    """
    from rewards.plugins.names import list_rewards

    table = plain_table("reward", "pool", "")
    for listing in list_rewards():
        table.add_row(listing.name, listing.pool, _cell(listing.summary, 400))
    OUT.print(table)
    return 0


@app.command()
def new(name: Annotated[str, Argument(metavar="NAME", help="Name of the function and of the file.")]) -> int:
    """Write a reward that works, and its test.

    The files are NAME.py and test_NAME.py, in this folder. Overwrites nothing.

    \b
    Example:
      alignyard reward new polite
    """
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"NAME='{name}' must do as the name of a Python function, as in exact_match")
    texts = {Path(f"{name}.py"): REWARD_TEMPLATE, Path(f"test_{name}.py"): TEST_TEMPLATE}
    for file in texts:
        if file.exists():
            raise ValueError(f"'{file}' exists and is not overwritten; give another NAME")
    if find_spec(name) is not None:
        raise ValueError(f"NAME='{name}' is a module already, which the test would import instead; give another")
    for file, text in texts.items():
        file.write_text(text.replace("NAME", name), encoding="utf-8")
    OUT.print(f"wrote {name}.py and test_{name}.py. Next:", highlight=False)
    OUT.print(f"  pytest test_{name}.py\n  alignyard reward check {name}.py:{name} --data FILE", highlight=False)
    return 0


@app.command()
def check(
    name: RewardName, arguments: RewardArguments, data: DataFile, truth: TruthColumn = None, timeout: TimeLimit = 5.0
) -> int:
    """Try a reward on your rows and on hostile text.

    Shows the verdicts, and the rules of the contract that the reward keeps or breaks. A row is {"prompt",
    "completion", "truth"} and, if known, the score "expected". Ends with 1 if a rule is broken.

    \b
    Examples:
      alignyard reward check polite.py:polite --data rows.jsonl ignore_case=false
      alignyard reward check verl:score.py:compute_score --data rows.jsonl --truth reward_model
    """
    from rewards.contract import MAX_ROWS, check_contract
    from rewards.offline import count_completions, read_completions

    spec, total = _spec(name, arguments, timeout), count_completions(data)
    rows = list(islice(read_completions(data, truth), MAX_ROWS))
    with ERR.status(f"trying {spec.label}"):
        clauses, results = check_contract(spec, rows, timeout_seconds=timeout)
    OUT.print(_verdict_table(results))
    if total > MAX_ROWS:
        OUT.print(f"the first {MAX_ROWS} of {total} rows; `alignyard reward score` judges them all", style="dim")
    OUT.print(_clause_table(clauses))
    return 1 if any(clause.kept is False for clause in clauses) else 0


@app.command()
def score(
    name: RewardName,
    arguments: RewardArguments,
    data: DataFile,
    out: Annotated[Path, Option(metavar="FILE", help="The file to write.")],
    truth: TruthColumn = None,
    timeout: TimeLimit = 5.0,
    workers: Annotated[int, Option(metavar="N", help="Number of judging processes.")] = 1,
) -> int:
    """Judge every row of a file.

    Writes the same rows, in the same order, with the columns score, status, outcome, detail and seconds. A row that
    cannot be judged keeps its place, with the status bad_row and the reason in its detail.

    \b
    Example:
      alignyard reward score math --data rows.jsonl --out judged.jsonl --workers 4
    """
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from pipeline.disk.files import write_atomic
    from rewards.offline import count_completions, judge_rows, read_completions, verdict_columns

    spec, total = _spec(name, arguments, timeout), count_completions(data)
    if workers < 1:
        raise ValueError(f"--workers {workers}: at least one process must judge")
    out.parent.mkdir(parents=True, exist_ok=True)
    results = judge_rows(read_completions(data, truth), spec, workers=workers, timeout_seconds=timeout)
    lines: list[str] = []
    verdicts: list[dict[str, Any]] = []
    problems: list[str] = []
    bar = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*bar, console=ERR) as progress:
        for row, verdict in progress.track(results, total=total, description=spec.label):
            columns = verdict_columns(row, verdict)
            lines.append(json.dumps(row.values | columns) + "\n")
            verdicts.append(columns)
            if verdict is None or verdict.failed:
                problems.append(f"{row.where}: {columns['status']}: {columns['detail']}")
    write_atomic(out, "".join(lines))
    OUT.print(_summary_table(verdicts))
    for problem in problems[:5]:
        OUT.print(_cell(problem, 400), style="yellow")
    return 0


def _summary_table(verdicts: list[dict[str, Any]]) -> Table:
    """Mean score and pass rate of the judged rows, then every status and outcome that occurred."""
    table = plain_table("", "")
    scores = [verdict["score"] for verdict in verdicts if verdict["score"] is not None]
    if scores:
        table.add_row("mean score", f"{sum(scores) / len(scores):.4f}")
        table.add_row("score 1 or more", _share(sum(score >= 1 for score in scores), len(scores)))
    for status, count in Counter(verdict["status"] for verdict in verdicts).most_common():
        table.add_row(status, _share(count, len(verdicts)), style="" if status in UNCOLOURED_STATUSES else "red")
    for outcome, count in Counter(verdict["outcome"] for verdict in verdicts if verdict["outcome"]).most_common():
        table.add_row(_cell(f"  {outcome}", 60), _share(count, len(verdicts)))
    return table


def _spec(name: str, arguments: list[str], timeout: float) -> "RewardSpec":
    """The reward of the command line. Raises ValueError for an argument that is not key=value."""
    from omegaconf import OmegaConf

    from configs.rewards import RewardSpec
    from rewards.plugins.names import absolute

    for argument in arguments:
        if not argument.partition("=")[2]:
            raise ValueError(f"'{argument}': an argument of the reward is written key=value")
    if timeout <= 0:
        raise ValueError(f"--timeout {timeout:g}: a verdict takes time")
    values: Any = OmegaConf.to_container(OmegaConf.from_dotlist(arguments))
    return absolute(RewardSpec(name=name, args=values))


def _verdict_table(results: Iterable[tuple["CompletionRow", "Verdict | None"]]) -> Table:
    from rewards.offline import verdict_columns

    table = plain_table("row", "completion", "score", "expected", "status", "ms", "detail")
    for row, verdict in results:
        columns, expected = verdict_columns(row, verdict), row.values.get("expected")
        table.add_row(
            _cell(row.where, 40),
            _cell(str(row.values.get("completion", "")), 40),
            "" if columns["score"] is None else f"{columns['score']:g}",
            "" if expected is None else f"{expected:g}",
            columns["status"],
            f"{1000 * columns['seconds']:.1f}",
            _cell(" ".join(part for part in (columns["outcome"], columns["detail"]) if part), 200),
            style="" if columns["status"] in UNCOLOURED_STATUSES else "red",
        )
    return table


def _clause_table(clauses: Iterable["Clause"]) -> Table:
    table = plain_table("contract", "", "evidence")
    results = {True: ("kept", "green"), False: ("BROKEN", "bold red"), None: ("not tried", "yellow")}
    for clause in clauses:
        word, style = results[clause.kept]
        table.add_row(clause.name, Text(word, style=style), _cell(clause.evidence, 400))
    return table


def _share(count: int, total: int) -> str:
    return f"{count} of {total} ({count / total:.1%})"


def _cell(text: str, width: int) -> Text:
    return Text(one_line(text, width))
