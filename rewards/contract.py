"""The contract of every reward, tried on the user's own rows by `alignyard reward check`."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from configs.rewards import RewardSpec
from rewards.offline import CompletionRow, guard_factory, judge_row
from rewards.pool.guard import Guard
from rewards.types import CONTRACT_ERROR, Status, Verdict

MAX_ROWS = 20
"""Rows that are tried; each is judged six times."""

HOSTILE_TEXTS: dict[str, str] = {
    "nothing": "",
    "white space": " \n\t\r\n\u00a0\u2003" * 10,
    "a megabyte of words": "word " * 200_000,
    "a megabyte without a space": "x" * 2**20,
    "a hundred thousand digits": "9" * 100_000,
    "a hundred thousand lines": "\n" * 100_000,
    "NUL and escape codes": "a\x00b\x1b[31mc\x07",
    "lone surrogates": "\ud800 \udfff",
    "right to left": "\u202e\u05d0\u05d1\u05d2\u202c 12 \u200f\u200b\ufeff",
    "deep brackets": "(" * 50_000 + "1" + ")" * 50_000,
    "deep LaTeX": "\\boxed{" + "\\frac{1}{" * 20_000 + "1" + "}" * 20_001,
    "deep JSON": "[" * 50_000 + "]" * 50_000,
    "a tower of powers": "\\boxed{9^{9^{9^{9}}}}",
    "marks left open": "<think><answer>\\boxed{```python\n",
}
"""Texts that a policy under training may write, and worse."""

TRUTH_COLUMNS = (
    "reward_model",
    "ground_truth",
    "solution",
    "answer",
    "final_answer",
    "label",
    "labels",
    "target",
    "gold",
)
"""Columns that hold the gold answers in data sets for verl, TRL, OpenRLHF and lm-eval."""


@dataclass(frozen=True, slots=True)
class Clause:
    """A promise with its evidence. kept: None where these rows can't show it."""

    name: str
    kept: bool | None
    evidence: str


_JudgedRow = tuple[CompletionRow, Verdict]


def check_contract(
    spec: RewardSpec, rows: Sequence[CompletionRow], *, timeout_seconds: float
) -> tuple[list[Clause], list[tuple[CompletionRow, Verdict | None]]]:
    """Try the clauses on the first MAX_ROWS rows, and return them with the verdicts, None for a row with a problem.

    A row's column `expected` holds the score that its completion should get.

    Raises ValueError for a wrong spec, for an `expected` that is no number, and where no row can be judged.
    """
    rows = rows[:MAX_ROWS]
    for row in rows:
        expected = row.values.get("expected")
        if expected is not None and (isinstance(expected, bool) or not isinstance(expected, int | float)):
            raise ValueError(f"{row.where}: expected={expected!r} is no number; rename the column")
    new_guard = guard_factory(spec, timeout_seconds)
    with new_guard() as guard, new_guard() as other:
        guard.start()
        results = [judge_row(guard, spec.label, row) for row in rows]
        judged_rows = [(row, verdict) for row, verdict in results if verdict is not None]
        if not judged_rows:
            raise ValueError(
                "no row can be judged" + "".join(f"; {row.where}: {row.problem}" for row, _ in results[:1])
            )
        hostile = {
            name: guard.judge(spec.label, judged_rows[0][0].task, [text])[0] for name, text in HOSTILE_TEXTS.items()
        }
        refused = [f"{row.where}: {row.problem}" for row, _ in results if row.problem]
        failed = [f"{row.where}: {_words(verdict)}" for row, verdict in judged_rows if verdict.failed]
        defeated = [f"{name}: {_words(verdict)}" for name, verdict in hostile.items() if verdict.failed]
        clauses = [
            Clause("built by name in a fresh process", True, f"in pool {guard.placements[spec.label].pool}"),
            _clause("accepts every row", len(results), refused),
            _sees_truth(rows),
            _gives_expected(judged_rows),
            _clause("judges every row", len(judged_rows), failed),
            _in_time([*(verdict for _, verdict in judged_rows), *hostile.values()]),
            _judges_each(other, spec.label, judged_rows[0][0]),
            *_invariances(other, spec.label, judged_rows),
            _clause("survives hostile text", len(hostile), defeated),
        ]
    return clauses, results


def _judges_each(guard: Guard, label: str, row: CompletionRow) -> Clause:
    """One result for each completion of a group, tried with three since a group of one would not show it."""
    completion = row.values["completion"]
    verdicts = guard.judge(label, row.task, [completion, f"{completion} ", f" {completion}"])
    violations = [_words(verdict) for verdict in verdicts if verdict.outcome == CONTRACT_ERROR]
    return _clause("a result for each of a group", len(verdicts), violations)


def _invariances(guard: Guard, label: str, judged_rows: Sequence[_JudgedRow]) -> Iterator[Clause]:
    """The same verdicts in another process, in the opposite order, and in a group of completions."""

    def judge(row: CompletionRow, *group: str) -> Verdict:
        return guard.judge(label, row.task, [*group, row.values["completion"]])[-1]

    rows = [row for row, _ in judged_rows]
    first = [verdict for _, verdict in judged_rows]
    second = [judge(row) for row in rows]
    backwards = [judge(row) for row in reversed(rows)][::-1]
    completions = [row.values["completion"] for row in rows]
    neighbours = zip(completions[-1:] + completions[:-1], completions[1:] + completions[:1], strict=True)
    grouped = [judge(row, *group) for row, group in zip(rows, neighbours, strict=True)]
    comparisons = {
        "deterministic": (first, second),
        "independent of order": (second, backwards),
        "independent of the group": (second, grouped),
    }
    for name, (verdicts, repeated) in comparisons.items():
        different = [
            f"{row.where}: {_words(verdict)}, then {_words(other)}"
            for row, verdict, other in zip(rows, verdicts, repeated, strict=True)
            if not _agree(verdict, other)
        ]
        yield _clause(name, len(rows), different)


def _gives_expected(judged_rows: Sequence[_JudgedRow]) -> Clause:
    with_expected = [(row, verdict, row.values["expected"]) for row, verdict in judged_rows if "expected" in row.values]
    expected = [case for case in with_expected if case[2] is not None]
    if not expected:
        return Clause("gold answers", None, 'no row has "expected": give rows whose score is known their score')
    wrong = [
        f"{row.where}: {_words(verdict)} where {score:g} is expected"
        for row, verdict, score in expected
        if verdict.score is None or not _equal(verdict.score, score)
    ]
    return _clause("gold answers", len(expected), wrong)


def _sees_truth(rows: Sequence[CompletionRow]) -> Clause:
    """Any gold answer at all: a reward may need none, or the answers may lie in another column."""
    answers = sum(row.task.truth is not None for row in rows if not row.problem)
    if answers:
        return Clause("sees the truth", True, f"{answers} of {len(rows)}")
    columns = [name for name in TRUTH_COLUMNS if any(row.values.get(name) is not None for row in rows)]
    remedy = f"--truth {columns[0]}" if columns else "--truth COLUMN"
    return Clause(
        "sees the truth", None, f"no row has a truth: if the reward compares with it, name its column by {remedy}"
    )


def _in_time(verdicts: Sequence[Verdict]) -> Clause:
    slowest = max(verdict.seconds for verdict in verdicts)
    in_time = all(verdict.status is not Status.TIMEOUT for verdict in verdicts)
    return Clause("within its time", in_time, f"slowest {slowest:.3f} s")


def _clause(name: str, count: int, violations: Sequence[str]) -> Clause:
    """The clause over `count` cases, with the first violation as evidence."""
    return Clause(
        name, not violations, f"{count - len(violations)} of {count}" + "".join(f"; {case}" for case in violations[:1])
    )


def _agree(verdict: Verdict, other: Verdict) -> bool:
    if verdict.score is None or other.score is None:
        return verdict.status is other.status
    return _equal(verdict.score, other.score)


def _equal(score: float, other: float) -> bool:
    """Equality up to another order of summation, as in another batch of a model."""
    return math.isclose(score, other, rel_tol=1e-6, abs_tol=1e-6)


def _words(verdict: Verdict) -> str:
    return f"{verdict.score:g}" if verdict.score is not None else f"{verdict.status} ({verdict.detail})"
