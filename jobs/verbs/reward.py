"""Rewards on the command line: `alignyard reward list | new | check | score`."""

import argparse
import json
import keyword
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from configs.rewards import RewardSpec
    from rewards.contract import Clause
    from rewards.offline import CompletionRow
    from rewards.types import Verdict

OUT, ERR = Console(), Console(stderr=True)

REWARD = """\
Lists, makes, tries and uses rewards. docs/add_a_reward.md shows all of it in five minutes.

examples:
  alignyard reward list
  alignyard reward new polite
  alignyard reward check polite.py:polite --data rows.jsonl
  alignyard reward score math --data rows.jsonl --out judged.jsonl
"""
LIST = "Lists our own rewards and those of installed packages, with the pool each runs in.\n"
NEW = """\
Writes NAME.py, a reward that works, and test_NAME.py, its test for pytest, here. Overwrites nothing.

example:
  alignyard reward new polite
"""
CHECK = """\
Tries a reward on rows of yours, each {"prompt", "completion", "truth"} and, where it is known, the score "expected",
and on hostile text; shows the verdicts, and which promises of a reward are kept. Ends with 1 if one is broken.

example:
  alignyard reward check polite.py:polite --data rows.jsonl ignore_case=false
  alignyard reward check verl:score.py:compute_score --data rows.jsonl --truth reward_model
"""
SCORE = """\
Judges every row of a file: writes the same rows, in the same order, with score, status, outcome, detail and seconds.
A row that can't be judged stays in its place with the status bad_row, and why in its detail.

example:
  alignyard reward score math --data rows.jsonl --out judged.jsonl --workers 4
"""

FILE = '''\
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
TEST = '''\
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

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
BAD_ROW = "bad_row"
"""The status of a row that no reward has seen."""


def add_reward(verbs: Verbs, epilog: str) -> None:
    """Adds `reward` and its own verbs to the command's; `epilog` ends each one's help."""

    def add(to: Verbs, name: str, summary: str, text: str) -> argparse.ArgumentParser:
        return to.add_parser(
            name,
            help=summary,
            description=text,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def runs(parser: argparse.ArgumentParser, verb: Callable[[argparse.Namespace], int]) -> None:
        parser.set_defaults(verb=verb, resumes=False)

    below = add(verbs, "reward", "list, make, try and use rewards", REWARD).add_subparsers(
        metavar="VERB", required=True
    )
    runs(add(below, "list", "the rewards that have a name", LIST), _list)
    new = add(below, "new", "write a reward and its test", NEW)
    new.add_argument("name", metavar="NAME", help="name of the function and of the file")
    runs(new, _new)
    check = add(below, "check", "try a reward on rows of yours", CHECK)
    score = add(below, "score", "judge a file", SCORE)
    for parser in (check, score):
        parser.add_argument("name", metavar="NAME", help="as in a recipe: a listed name, or path/to/file.py:NAME")
        parser.add_argument("--data", metavar="FILE", type=Path, required=True, help="the rows, as JSONL")
        parser.add_argument(
            "--truth", metavar="COLUMN", help="the column of the gold answers, as prompts.truth (default: truth)"
        )
        parser.add_argument(
            "--timeout", metavar="S", type=float, default=5.0, help="seconds for a verdict (default: %(default)g)"
        )
        parser.add_argument("overrides", metavar="key=value", nargs="*", help="an argument of the reward, in YAML")
    score.add_argument("--out", metavar="FILE", type=Path, required=True, help="the file to write")
    score.add_argument("--workers", metavar="N", type=int, default=1, help="judging processes (default: %(default)s)")
    runs(check, _check)
    runs(score, _score)


def _list(_: argparse.Namespace) -> int:
    from rewards.plugins import list_rewards

    table = _table("reward", "pool", "")
    for listing in list_rewards():
        table.add_row(listing.name, listing.pool, _shown(listing.summary, 400))
    OUT.print(table)
    return 0


def _new(args: argparse.Namespace) -> int:
    name = args.name
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"NAME='{name}' must do as the name of a Python function, as in exact_match")
    texts = {Path(f"{name}.py"): FILE, Path(f"test_{name}.py"): TEST}
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


def _check(args: argparse.Namespace) -> int:
    from rewards.contract import MAX_ROWS, check_contract
    from rewards.offline import count_completions, read_completions

    spec, total = _spec(args), count_completions(args.data)
    rows = list(islice(read_completions(args.data, args.truth), MAX_ROWS))
    with ERR.status(f"trying {spec.label}"):
        clauses, judged = check_contract(spec, rows, timeout_seconds=args.timeout)
    OUT.print(_verdict_table(judged))
    if total > MAX_ROWS:
        OUT.print(f"the first {MAX_ROWS} of {total} rows; `alignyard reward score` judges them all", style="dim")
    OUT.print(_clause_table(clauses))
    return 1 if any(clause.kept is False for clause in clauses) else 0


def _score(args: argparse.Namespace) -> int:
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    from rewards.offline import count_completions, judge_rows, read_completions

    spec, total, tally = _spec(args), count_completions(args.data), Tally()
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}: at least one process must judge")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    partial = args.out.with_name(f".{args.out.name}.partial")
    judged = judge_rows(
        read_completions(args.data, args.truth), spec, workers=args.workers, timeout_seconds=args.timeout
    )
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with partial.open("w", encoding="utf-8") as out, Progress(*columns, console=ERR) as progress:
            for row, verdict in progress.track(judged, total=total, description=spec.label):
                out.write(json.dumps(row.values | _columns(row, verdict)) + "\n")
                tally.add(row, verdict)
        partial.replace(args.out)
    finally:
        partial.unlink(missing_ok=True)
    OUT.print(tally.table())
    for problem in tally.problems:
        OUT.print(_shown(problem, 400), style="yellow")
    return 0


@dataclass(slots=True)
class Tally:
    """What a file's verdicts come to."""

    rows: int = 0
    scores: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    """The first bad rows and failures, in words."""

    def add(self, row: "CompletionRow", verdict: "Verdict | None") -> None:
        """Counts one row."""
        told = _columns(row, verdict)
        self.rows += 1
        self.statuses[told["status"]] += 1
        if verdict is not None and verdict.score is not None:
            self.scores.append(verdict.score)
        if told["outcome"]:
            self.outcomes[told["outcome"]] += 1
        if (verdict is None or verdict.failed) and len(self.problems) < 5:
            self.problems.append(f"{row.where}: {told['status']}: {told['detail']}")

    def table(self) -> Table:
        """Mean and pass rate over what has a score; then every status and outcome that occurred."""
        table = _table("", "")
        if self.scores:
            table.add_row("mean score", f"{sum(self.scores) / len(self.scores):.4f}")
            table.add_row("score 1 or more", _share(sum(score >= 1 for score in self.scores), len(self.scores)))
        for status, count in self.statuses.most_common():
            table.add_row(status, _share(count, self.rows), style="" if status in ("ok", "abstain") else "red")
        for outcome, count in self.outcomes.most_common():
            table.add_row(_shown(f"  {outcome}", 60), _share(count, self.rows))
        return table


def _spec(args: argparse.Namespace) -> "RewardSpec":
    """The reward of the command line. Raises ValueError for an argument that is not key=value."""
    from omegaconf import OmegaConf

    from configs.rewards import RewardSpec
    from rewards.plugins import absolute

    for override in args.overrides:
        if not override.partition("=")[2]:
            raise ValueError(f"'{override}': an argument of the reward is written key=value")
    if args.timeout <= 0:
        raise ValueError(f"--timeout {args.timeout:g}: a verdict takes time")
    values: Any = OmegaConf.to_container(OmegaConf.from_dotlist(args.overrides))
    return absolute(RewardSpec(name=args.name, args=values))


def _columns(row: "CompletionRow", verdict: "Verdict | None") -> dict[str, Any]:
    """What is written beside the row's own columns."""
    if verdict is None:
        return {"score": None, "status": BAD_ROW, "outcome": "", "detail": row.problem, "seconds": 0.0}
    names = ("score", "status", "outcome", "detail", "seconds")
    return {name: getattr(verdict, name) for name in names}


def _verdict_table(judged: Iterable[tuple["CompletionRow", "Verdict | None"]]) -> Table:
    table = _table("row", "completion", "score", "expected", "status", "ms", "detail")
    for row, verdict in judged:
        told = _columns(row, verdict)
        expected = row.values.get("expected")
        table.add_row(
            _shown(row.where, 40),
            _shown(str(row.values.get("completion", "")), 40),
            "" if told["score"] is None else f"{told['score']:g}",
            "" if expected is None else f"{expected:g}",
            told["status"],
            f"{1000 * told['seconds']:.1f}",
            _shown(" ".join(part for part in (told["outcome"], told["detail"]) if part), 200),
            style="" if told["status"] in ("ok", "abstain") else "red",
        )
    return table


def _clause_table(clauses: Iterable["Clause"]) -> Table:
    table = _table("contract", "", "seen")
    words = {True: ("kept", "green"), False: ("BROKEN", "bold red"), None: ("not tried", "yellow")}
    for clause in clauses:
        word, style = words[clause.kept]
        table.add_row(clause.name, Text(word, style=style), _shown(clause.evidence, 400))
    return table


def _table(*columns: str) -> Table:
    return Table(*columns, box=None, header_style="bold", pad_edge=False)


def _share(count: int, total: int) -> str:
    return f"{count} of {total} ({count / total:.1%})"


def _shown(text: str, width: int) -> Text:
    """What a stranger wrote, on one line and harmless to a terminal."""
    line = " ".join(text[: 4 * width].split())
    line = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)
    return Text(line if len(line) <= width else f"{line[: width - 3]}...")
