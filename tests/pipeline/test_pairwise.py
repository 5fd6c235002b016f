"""Comparisons with baselines: both orders, ties, answers from files, ratings, and gates on their figures."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.gate import HoldRule, ImproveRule, ThresholdRule
from configs.pairwise import PairwiseSuite
from configs.sampling import SamplingConfig
from pipeline.evaluation.pairwise import Contest, load_contest, run_pairwise
from pipeline.evaluation.suites import Session, SuiteResult, results_table
from pipeline.gates.decision import describe_rule
from pipeline.gates.rules import apply_rule
from rewards.types import Status, Task, Verdict
from tests.pipeline.test_evaluation_suites import TOKENIZER, Actor


class NoProblems:
    """Judges every task, and keeps those it was asked about."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []

    def problems(self, tasks: list[Task]) -> list[None]:
        self.tasks = tasks
        return [None] * len(tasks)


class Judge:
    """Judges by a function of the task and the completion, and counts what it was asked."""

    def __init__(self, score: Callable[[Task, str], float | None]) -> None:
        self._score, self.asked = score, 0
        self._groups: dict[int, list[dict[str, Verdict]]] = {}

    def submit(self, index: int, task: Task, completions: list[str]) -> None:
        assert index not in self._groups and task.kind == "judge"
        self.asked += len(completions)
        scores = [self._score(task, text) for text in completions]
        self._groups[index] = [
            {"judge": Verdict(None, Status.INFRA_ERROR, "no mark") if score is None else Verdict(score)}
            for score in scores
        ]

    def gather(self) -> dict[int, list[dict[str, Verdict]]]:
        groups, self._groups = self._groups, {}
        return groups


def write(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"type": "file", "paths": [str(path)]}


def suite_of(tmp_path: Path, baselines: dict[str, list[str]], **more: Any) -> PairwiseSuite:
    rows = [{"instruction": f"Q{n}", "hard": n / 10, "area": "abc"[n % 3]} for n in range(len(baselines["old"]))]
    files = {
        name: {
            "type": "answers",
            "source": write(tmp_path / f"{name}.jsonl", [{"q": f"Q{n}", "a": text} for n, text in enumerate(texts)]),
            "prompt": "q",
            "answer": "a",
        }
        for name, texts in baselines.items()
    }
    settings = {
        "type": "pairwise",
        "prompts": {"source": write(tmp_path / "rows.jsonl", rows), "prompt": "instruction"},
        "baselines": files,
        "judge": {"name": "judge"},
    }
    return PairwiseSuite.model_validate(settings | more)


def run(suite: PairwiseSuite, answers: list[str], judge: Judge, seed: int = 0) -> SuiteResult:
    def script(prompt: str) -> str:
        return next(text for n, text in reversed(list(enumerate(answers))) if f"Q{n}" in prompt)

    contest = load_contest(suite, NoProblems(), TOKENIZER, 0, {})  # type: ignore[arg-type]
    return run_pairwise(suite, contest, Session(Actor(script), judge, SamplingConfig(max_tokens=9), seed))  # type: ignore[arg-type]


def quality(text: str) -> int:
    return int(text.partition(" ")[0])


def reads_both(first_bonus: float) -> Callable[[Task, str], float | None]:
    """A judge that says 5 for the better answer that stands second, 1 for the first; who stands first gets a bonus."""

    def score(task: Task, completion: str) -> float:
        gap = quality(completion) - quality(task.truth) - first_bonus
        return 5.0 if gap > 0 else 1.0 if gap < 0 else 3.0

    return score


def test_both_orders_cancel_the_position_and_ties_are_halves(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, {"old": ["1", "1", "1", "4", "2"]}, reads_both=True, scale=[1, 5])
    # Better by 2; by 1; equal in quality; worse by 3; the same text.
    answers = ["3", "2", "1 b", "1", "2"]
    fair = run(suite, answers, judge := Judge(reads_both(0)))
    assert list(fair.items["win_rate"].values()) == [1.0, 1.0, 0.5, 0.0, 0.5]
    assert fair.figures["win_rate"] == 0.6 and fair.figures["order_flip_rate"] == 0.0
    assert judge.asked == 8  # two orders of four pairs; the same text ties without a judge
    # A judge that adds 1.5 to the first answer: "2" against "1" now goes to whichever stands first, a tie, and so does
    # "1 b" against "1". Two of the four judged pairs flip.
    biased = run(suite, answers, Judge(reads_both(1.5)))
    assert list(biased.items["win_rate"].values()) == [1.0, 0.5, 0.5, 0.0, 0.5]
    assert biased.figures["order_flip_rate"] == 0.5
    assert [record.outcome for record in biased.records] == ["won", "tied", "tied", "lost", "tied"]
    assert biased.records[0].truth == {"old": "1"} and biased.records[0].score == 1.0


def test_a_judge_of_single_answers_ties_within_its_margin(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, {"old": ["1", "1", "5"]}, tie=1.0)
    result = run(suite, ["3", "2", "1"], judge := Judge(lambda _, text: quality(text)))
    assert list(result.items["win_rate"].values()) == [1.0, 0.5, 0.0] and judge.asked == 6
    assert "order_flip_rate" not in result.figures and result.figures["unjudged_rate"] == 0.0


def test_what_was_not_judged_leaves_every_figure(tmp_path: Path) -> None:
    def fails_on_nine(task: Task, text: str) -> float | None:
        return None if "9" in (text, task.truth) else reads_both(0)(task, text)

    suite = suite_of(tmp_path, {"old": ["1", "9", "1"]}, reads_both=True, scale=[1, 5])
    result = run(suite, ["2", "3", "0"], Judge(fails_on_nine))
    assert list(result.items["win_rate"].values()) == [1.0, 0.0] and result.figures["unjudged_rate"] == 1 / 3
    assert result.records[1].score is None and result.records[1].detail == "no mark"
    none = run(suite, ["2", "3", "0"], Judge(lambda *_: None))
    assert none.figures["unjudged_rate"] == 1.0 and "win_rate" not in none.figures


def test_several_baselines_are_rated_together(tmp_path: Path) -> None:
    # There are 30 prompts. The checkpoint beats `old` on 20 and `new` on 10; `new` beats `old` on 24. Log-odds of ln 2,
    # -ln 2 and 2 ln 2: they agree, so `new` is 2 x 120.41 points above `old`, the checkpoint half of that.
    old = ["5"] * 30
    new = ["7"] * 10 + ["9"] * 10 + ["8"] * 4 + ["4"] * 6
    own = ["8"] * 10 + ["6"] * 10 + ["3"] * 10
    suite = suite_of(tmp_path, {"old": old, "new": new}, category="area")
    result = run(suite, own, judge := Judge(lambda _, text: quality(text)))
    figures = result.figures
    assert judge.asked == 90 and figures["win_rate"] == 0.5
    assert figures["win_rate_against_old"] == pytest.approx(2 / 3)
    assert figures["win_rate_against_new"] == pytest.approx(1 / 3)
    assert figures["rating_old"] == 1000.0 and figures["rating"] == pytest.approx(1120.41, abs=0.1)
    assert figures["rating_new"] == pytest.approx(1240.82, abs=0.1)
    assert figures["rating_low"] < figures["rating"] < figures["rating_high"]
    assert {name for name in figures if name[-1] in "abc" and name.startswith("win_rate_")} == {
        "win_rate_a", "win_rate_b", "win_rate_c"
    }  # fmt: skip
    assert result.records[0].parts == {"old": 1.0, "new": 1.0}
    again = run(suite, own, Judge(lambda _, text: quality(text)))
    assert again.figures == figures and run(suite, own, Judge(lambda _, text: quality(text)), seed=1).figures != figures
    shown = results_table({"arena": result}).columns
    assert "rating_new" in shown[1]._cells and any(" - " in str(cell) for cell in shown[3]._cells)


def test_length_control_takes_away_what_length_won(tmp_path: Path) -> None:
    # Quality is equal; the judge prefers the longer answer 4 times in 5. Ours is longer on 24 of 30 prompts.
    old = [f"1 {'x' * (9 if n % 5 else 29)}" for n in range(30)]
    own = [f"1 {'y' * 19}"] * 30
    flip = {0, 7, 13, 21, 26, 29}

    def judge(task: Task, text: str) -> float:
        odd = int(task.prompt[1:]) in flip
        longer = len(text) > len(task.truth)
        return 5.0 if longer != odd else 1.0

    suite = suite_of(tmp_path, {"old": old}, reads_both=True, scale=[1, 5], difficulty="hard")
    figures = run(suite, own, Judge(judge)).figures
    assert figures["win_rate"] == pytest.approx((19 + 1) / 30)
    plain = run(suite.model_copy(update={"difficulty": None}), own, Judge(judge)).figures
    # Longer answers win 19 of 24, shorter ones 1 of 6: theta is half the sum of ln(19/5) and ln(1/5).
    theta = (math.log(19 / 5) + math.log(1 / 5)) / 2
    assert plain["length_controlled_win_rate"] == pytest.approx(1 / (1 + math.exp(-theta)), abs=5e-3)
    assert plain["length_controlled_win_rate"] < 0.5 < plain["win_rate"]


def test_rows_without_an_answer_or_difficulty_are_bad_rows(tmp_path: Path) -> None:
    suite = suite_of(tmp_path, {"old": ["1", "2"]}, difficulty="hard")
    prompts = suite.prompts.model_copy(update={"max_bad_share": 0.7})
    suite = suite.model_copy(update={"prompts": prompts})
    rows = [{"instruction": "Q0", "hard": 0.1}, {"instruction": "Q7", "hard": 0.1}, {"instruction": "Q1"}]
    write(tmp_path / "rows.jsonl", rows)
    judges = NoProblems()
    contest = load_contest(suite, judges, TOKENIZER, 0, {})  # type: ignore[arg-type]
    assert isinstance(contest, Contest) and contest.answers == {"old": ["1"]} and len(judges.tasks) == 3
    summary = contest.prompts.bad_rows.summary()
    assert "no answer of baseline 'old'" in summary and "hard=None is no number" in summary


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"tie": 0.5, "reads_both": True}, "tie has no effect"),
        ({"scale": [0, 1]}, "scale has no effect"),
        ({"reads_both": True, "scale": [2, 2]}, "must differ"),
        ({"difficulty": "hard", "length_control": False}, "difficulty has no effect"),
    ],
)
def test_settings_without_effect_are_refused(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        suite_of(tmp_path, {"old": ["1"]}, **more)


def evaluated(tmp_path: Path, wins: int, ties: int, losses: int) -> dict[str, SuiteResult]:
    own = ["2"] * wins + ["1 t"] * ties + ["0"] * losses
    suite = suite_of(tmp_path, {"old": ["1"] * len(own)})
    return {"arena": run(suite, own, Judge(lambda _, text: quality(text)))}


@pytest.mark.parametrize("figure", ["arena/win_rate", "arena/length_controlled_win_rate"])
def test_a_gate_holds_the_lower_bound_of_a_win_rate(tmp_path: Path, figure: str) -> None:
    rule = ThresholdRule(type="threshold", figure=figure, at_least=0.5)
    for (wins, ties, losses), outcome in {
        (60, 20, 20): "holds",  # 0.7, about +- 0.08
        (45, 20, 35): "undecided",  # 0.55
        (20, 20, 60): "fails",  # 0.3
        (0, 40, 0): "undecided",  # ties prove nothing
        (4, 0, 0): "undecided",  # too few prompts, however they end
    }.items():
        candidate = evaluated(tmp_path, wins, ties, losses)
        ruling = apply_rule(rule, candidate, candidate, confidence=0.95, seed=0)
        assert ruling.outcome == outcome, (wins, ties, losses, ruling)
        assert ruling.samples == wins + ties + losses and ruling.low <= ruling.candidate <= ruling.high
    assert describe_rule(rule) == f"{figure} at least 0.5"


def test_a_higher_confidence_has_a_wider_interval(tmp_path: Path) -> None:
    candidate = evaluated(tmp_path, 60, 20, 20)
    for figure in ("arena/win_rate", "arena/length_controlled_win_rate"):
        rule = ThresholdRule(type="threshold", figure=figure, at_least=0.6)
        sure, surer = (apply_rule(rule, candidate, {}, confidence=c, seed=0) for c in (0.9, 0.999))
        assert surer.low < sure.low < sure.high < surer.high and (sure.outcome, surer.outcome) == ("holds", "undecided")
        assert surer.samples_needed is not None and surer.samples_needed > 100


def test_win_rates_of_candidate_and_parent_are_paired(tmp_path: Path) -> None:
    better, parent = evaluated(tmp_path, 60, 20, 20), evaluated(tmp_path, 30, 20, 50)
    improve = ImproveRule(type="improve", figure="arena/win_rate", margin=0.1)
    assert apply_rule(improve, better, parent, confidence=0.95, seed=0).outcome == "holds"
    # Equal answers everywhere are no proof that nothing was lost.
    hold = HoldRule(type="hold", figure="arena/win_rate", tolerance=0.01)
    ties = evaluated(tmp_path, 0, 10, 0)
    assert apply_rule(hold, ties, ties, confidence=0.95, seed=0).outcome == "undecided"
    with pytest.raises(ValueError, match="has items of: arena/win_rate"):
        apply_rule(hold.model_copy(update={"figure": "arena/length_controlled_win_rate"}), ties, ties,
                   confidence=0.95, seed=0)  # fmt: skip
