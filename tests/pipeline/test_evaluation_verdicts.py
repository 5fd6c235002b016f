"""Figures of a judge by hand, and the suite with a judge that favours the first place."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.evaluation import VerdictSuite
from configs.sampling import SamplingConfig
from pipeline.evaluation.suites import Session
from pipeline.evaluation.verdicts import (
    Opinion,
    count_votes,
    load_verdicts,
    run_verdicts,
    verdict_figures,
    vote_calibration,
)
from pipeline.models.tokenizer import byte_tokenizer
from rewards.types import Task, Verdict
from rollout.types import Completion, Group

TOKENIZER = byte_tokenizer()


def test_votes_are_counted_by_hand() -> None:
    """Answer 0 is right. Votes: 9 to 2 for it, 6 to 5 against it, 8 to 7 for it, one unreadable. Means 22/3 and 15/3,
    so it wins, with two of three votes. The two best by the meta model are the second and third: 13/2 to 13/2, a tie;
    the best alone is the second."""
    votes = [
        Opinion([0, 1], [9.0, 2.0], 0.1),
        Opinion([1, 0], [6.0, 5.0], 0.9),
        Opinion([1, 0], [7.0, 8.0], 0.5),
        Opinion([0, 1], None, 2.0),
    ]
    assert count_votes(votes) == (0, pytest.approx(2 / 3))
    assert count_votes(votes, keep=2) == (None, 0.0)
    assert count_votes(votes, keep=1) == (1, 1.0)
    assert count_votes(votes[3:]) == (None, 0.0)


def test_figures_by_hand() -> None:
    """Row a: both greedy verdicts prefer the right answer 0. Row b: each prefers the first place. Row c: one can't be
    read, the other is a tie. Preferred places: first, second; first, first; so 3 of 4."""
    opinions = {
        "a": [Opinion([0, 1], [9, 1]), Opinion([1, 0], [1, 9]), Opinion([0, 1], [9, 1])],
        "b": [Opinion([0, 1], [9, 1]), Opinion([1, 0], [9, 1]), Opinion([1, 0], [9, 1])],
        "c": [Opinion([0, 1], None), Opinion([1, 0], [5, 5]), Opinion([0, 1], None)],
    }
    items, figures = verdict_figures(opinions, None)
    assert items == {
        "agreement": {"a": 1.0, "b": 0.5, "c": 0.0},
        "position_bias": {"a": 0.0, "b": 1.0},
        "agreement_sampled": {"a": 1.0, "b": 0.0, "c": 0.0},
        "agreement_voted": {"a": 1.0, "b": 0.0, "c": 0.0},
    }
    assert figures == {"first_preferred": 0.75, "calibration_error": 0.5}  # share 1 twice, right once


def test_calibration_by_hand() -> None:
    """Shares 1.0 right, 0.95 wrong: one bin, mean share 0.975, agreement 0.5, gap 0.475, weight 2/4. Shares 0.6 right
    and 0.6 right: gap 0.4, weight 2/4. Together 0.4375."""
    assert vote_calibration([(1.0, True), (0.95, False), (0.6, True), (0.6, True)]) == pytest.approx(0.4375)


class Biased:
    """Scores 9 for the answer `4`, and as much for the answer in the first place; in samples it is right."""

    def generate(
        self, prompts: list[list[int]], sampling: SamplingConfig, num_completions: int, seed: int
    ) -> Iterator[Group]:
        for index, ids in reversed(list(enumerate(prompts))):
            answers = [part.splitlines()[1] for part in str(TOKENIZER.decode(ids)).split("[Answer ")[1:]]
            scores = [9 if text == "4" or (place == 0 and not sampling.temperature) else 2
                      for place, text in enumerate(answers)]  # fmt: skip
            text = "unsure" if "vague" in str(TOKENIZER.decode(ids)) else f"[[{scores[0]}, {scores[1]}]]"
            yield Group(index, ids, [Completion([1, 2], [0.0, 0.0], text, "stop", 0)])


class Meta:
    """Scores every vote by its length; not the unsure ones."""

    def __init__(self) -> None:
        self.submitted: dict[int, tuple[Task, str]] = {}

    def submit(self, index: int, task: Task, completions: list[str]) -> None:
        assert task.kind == "reward_model" and "[Answer 1]" in task.conversation[0]["content"]
        self.submitted[index] = (task, completions[0])

    def gather(self) -> dict[int, list[dict[str, Verdict]]]:
        return {index: [{"reward_model": Verdict(float(len(text)))}] for index, (_, text) in self.submitted.items()}


def suite_of(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> VerdictSuite:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"type": "file", "paths": [str(folder / "rows.jsonl")]}
    judge = {"rubric": "{prompt}\n{answers}\n[[7, 3]]", "compare": 2, "votes": 4}
    data = {"source": source, "form": "pair"}
    return VerdictSuite.model_validate({"type": "verdicts", "data": data, "judge": judge} | settings)


def test_a_judge_that_favours_the_first_place(tmp_path: Path) -> None:
    rows = [{"prompt": f"2+2? {word}", "chosen": "4", "rejected": "5"} for word in ("quick", "vague", "now")]
    meta = {"meta": {"name": "reward_model", "args": {"path": "stage:meta"}}, "keep_votes": 2}
    suite = suite_of(tmp_path, rows, **meta)
    comparisons, bad_rows = load_verdicts(suite, TOKENIZER, seed=0)
    assert len(comparisons) == 3 and not bad_rows.counts
    session: Any = Session(Biased(), Meta(), SamplingConfig(max_tokens=8), 0)  # pyright: ignore[reportArgumentType]
    result = run_verdicts(suite, comparisons, session)
    # First in the one order it scores 9 to 2 for the right answer, in the other 9 to 9, a tie.
    assert result.figures["agreement"] == pytest.approx(1 / 3) and result.figures["position_bias"] == 1.0
    assert result.figures["first_preferred"] == 1.0
    for name in ("agreement_sampled", "agreement_voted", "agreement_meta"):
        assert result.figures[name] == pytest.approx(2 / 3), name
    assert result.figures["calibration_error"] == 0.0 and result.figures["unjudged_rate"] == pytest.approx(1 / 3)
    assert len(result.records) == 3 * (2 + 4)
    assert [record.score for record in result.records[:6]] == [1.0, 0.0, 1.0, 1.0, 1.0, 1.0] or [
        record.score for record in result.records[:6]
    ] == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_votes": 2}, "go together"),
        ({"meta": {"name": "reward_model"}, "keep_votes": 4}, "drops none"),
        ({"judge": {"rubric": "{completion} [[7]]"}}, "compare=1"),
    ],
)
def test_suites_that_measure_nothing_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        suite_of(tmp_path, [], **settings)
