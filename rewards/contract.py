"""What every reward must hold to, tried on the user's own rows: `alignyard reward check`."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from configs.rewards import RewardSpec
from rewards.guard import Guard
from rewards.offline import Row, guard_factory, judge_row
from rewards.types import CONTRACT_ERROR, Status, Verdict

ROWS = 20
"""So many of the rows are tried: each is judged six times."""

HOSTILE: dict[str, str] = {
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
"""What a policy under training may write, and worse."""


@dataclass(frozen=True, slots=True)
class Clause:
    """One promise: whether it is kept (None where the rows don't allow to tell), and what was seen."""

    name: str
    kept: bool | None
    seen: str


def check_contract(
    spec: RewardSpec, rows: Sequence[Row], *, timeout_seconds: float
) -> tuple[list[Clause], list[tuple[Row, Verdict | None]]]:
    """The clauses, and the verdicts of the first ROWS rows, None where one can't be judged.

    A row's column `expected` says what score its completion should get.

    Raises ValueError for a wrong spec, for an `expected` that is no number, and where no row can be judged.
    """
    rows = rows[:ROWS]
    for row in rows:
        if not _is_score(row.values.get("expected")):
            raise ValueError(f"{row.where}: expected={row.values['expected']!r} is no number; rename the column")
    new_guard = guard_factory(spec, timeout_seconds)
    with new_guard() as guard, new_guard() as other:
        guard.start()
        judged = [judge_row(guard, spec.label, row) for row in rows]
        good = [(row, verdict) for row, verdict in judged if verdict is not None]
        if not good:
            raise ValueError("no row can be judged" + "".join(f"; {row.where}: {row.problem}" for row, _ in judged[:1]))
        hostile = {name: guard.judge(spec.label, good[0][0].task, [text])[0] for name, text in HOSTILE.items()}
        clauses = [
            Clause("built by name in a fresh process", True, f"in pool {guard.placements[spec.label].pool}"),
            _clause(
                "accepts every row", len(judged), [f"{row.where}: {row.problem}" for row, _ in judged if row.problem]
            ),
            _sees_truth(rows),
            _gold(good),
            _clause(
                "judges every row", len(good), [f"{row.where}: {_words(said)}" for row, said in good if said.failed]
            ),
            _in_time([*(verdict for _, verdict in good), *hostile.values()]),
            _one_each(other, spec.label, good[0][0]),
            *_invariances(other, spec.label, good),
            _clause(
                "survives hostile text",
                len(hostile),
                [f"{name}: {_words(said)}" for name, said in hostile.items() if said.failed],
            ),
        ]
    return clauses, judged


def _one_each(guard: Guard, label: str, row: Row) -> Clause:
    """Whether each completion of a group gets a result; a group of one would not show it."""
    completion = row.values["completion"]
    verdicts = guard.judge(label, row.task, [completion, f"{completion} ", f" {completion}"])
    broken = [_words(verdict) for verdict in verdicts if verdict.outcome == CONTRACT_ERROR]
    return _clause("a result for each of a group", len(verdicts), broken)


def _invariances(guard: Guard, label: str, good: Sequence[tuple[Row, Verdict]]) -> Iterator[Clause]:
    """Whether a verdict stays the same in another process, in the opposite order, and in a group of completions."""

    def ask(row: Row, *before: str) -> Verdict:
        return guard.judge(label, row.task, [*before, row.values["completion"]])[-1]

    rows = [row for row, _ in good]
    first = [verdict for _, verdict in good]
    second = [ask(row) for row in rows]
    backwards = [ask(row) for row in reversed(rows)][::-1]
    others = [[rows[index - 1], rows[(index + 1) % len(rows)]] for index in range(len(rows))]
    grouped = [
        ask(row, *(other.values["completion"] for other in beside)) for row, beside in zip(rows, others, strict=True)
    ]
    comparisons = {
        "deterministic": (first, second),
        "independent of order": (second, backwards),
        "independent of the group": (second, grouped),
    }
    for name, (ones, twos) in comparisons.items():
        different = [
            f"{row.where}: {_words(one)}, then {_words(two)}"
            for row, one, two in zip(rows, ones, twos, strict=True)
            if not _agree(one, two)
        ]
        yield _clause(name, len(rows), different)


def _gold(good: Sequence[tuple[Row, Verdict]]) -> Clause:
    expected = [(row, verdict) for row, verdict in good if row.values.get("expected") is not None]
    if not expected:
        return Clause("gold answers", None, 'no row has "expected": give rows whose score is known their score')
    wrong = [
        f"{row.where}: {_words(verdict)} where {row.values['expected']:g} is expected"
        for row, verdict in expected
        if verdict.score is None or not _equal(verdict.score, row.values["expected"])
    ]
    return _clause("gold answers", len(expected), wrong)


def _sees_truth(rows: Sequence[Row]) -> Clause:
    """Whether any row has a gold answer. A reward may need none, or the answers may lie in another column."""
    answers = sum(row.task.truth is not None for row in rows if not row.problem)
    if answers:
        return Clause("sees the truth", True, f"{answers} of {len(rows)}")
    return Clause("sees the truth", None, "no row has a truth: if the reward needs it, name its column with --truth")


def _in_time(verdicts: Sequence[Verdict]) -> Clause:
    slowest = max(verdict.seconds for verdict in verdicts)
    kept = all(verdict.status is not Status.TIMEOUT for verdict in verdicts)
    return Clause("within its time", kept, f"slowest {slowest:.3f} s")


def _clause(name: str, count: int, broken: Sequence[str]) -> Clause:
    """A promise of `count` cases, of which some are broken."""
    seen = f"{count - len(broken)} of {count}" + "".join(f"; {case}" for case in broken[:1])
    return Clause(name, not broken, seen)


def _is_score(expected: Any) -> bool:
    return expected is None or (isinstance(expected, int | float) and not isinstance(expected, bool))


def _agree(one: Verdict, other: Verdict) -> bool:
    if one.score is None or other.score is None:
        return one.status is other.status
    return _equal(one.score, other.score)


def _equal(one: float, other: float) -> bool:
    """Up to what another order of summation, as in a model's batch, may change."""
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-6)


def _words(verdict: Verdict) -> str:
    return f"{verdict.score:g}" if verdict.score is not None else f"{verdict.status} ({verdict.detail})"
