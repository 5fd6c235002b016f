"""Comparisons as prompts for a judge: the truth is that of the shown order, and what the prompt shows is the row's."""

import json
from pathlib import Path
from typing import Any

import pytest

from configs.data import ConversationData, PromptData
from configs.preferences import PreferencesConfig
from pipeline.data.conversations import Conversations
from pipeline.data.prompts import Prompts
from pipeline.data.sums import mistaken_answer, worked_answer
from pipeline.models.tokenizer import byte_tokenizer
from pipeline.reports.results import data_cards
from pipeline.stages import preferences
from pipeline.stages.context import Context
from rewards.judging.verdict import VerdictReward

PAIRWISE = {"rubric": "{prompt}\n{answers}\n{rubric} {truth}\n[[7, 3]]", "compare": 2}
ROW = {"prompt": "2+2?", "answers": ["4", "5", "22"], "rubric": ["be right"], "truth": "four"}


def built(folder: Path, rows: list[dict[str, Any]], rows_form: str = "ranking", **judge: Any) -> dict[str, float]:
    """Run the stage on `rows`, and return its figures."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"type": "file", "paths": [str(folder / "rows.jsonl")]}
    read = {"rows": {"data": {"source": source, "form": rows_form, "max_bad_share": 0.5}, "domain": "any"}}
    config = PreferencesConfig.model_validate({"type": "preferences", "read": read, "judge": PAIRWISE | judge})
    preferences.check(config)
    return preferences.launch(config, folder, Context(Path("evaluations")))


def prompts_of(folder: Path) -> Prompts:
    source = {"type": "dataset", "paths": [str(folder / "data")]}
    return Prompts.load(PromptData.model_validate({"source": source}), byte_tokenizer())


def test_the_truth_is_the_place_of_the_best(tmp_path: Path) -> None:
    figures = built(tmp_path, [ROW | {"prompt": f"2+2? ({n})"} for n in range(40)])
    prompts = prompts_of(tmp_path)
    assert len(prompts) == figures["judge/prompts"] == 80  # the best against each of two others
    places: list[int] = []
    for prompt in prompts:
        text, truth = prompt.task.prompt, prompt.task.truth
        shown = [part.splitlines()[1] for part in text.split("[Answer ")[1:]]
        assert shown[truth["best"] - 1] == "4" and len(set(shown)) == 2 and truth["answers"] == 2
        assert "\n1. be right four\n" in text
        places.append(truth["best"])
        right = "[[9, 2]]" if truth["best"] == 1 else "[[2, 9]]"
        assert VerdictReward().score(prompt.task, right).score == 1.0
        assert VerdictReward().check(prompt.task) is None
    assert 26 < places.count(1) < 54  # beyond three standard deviations on either side of 40


def test_conversations_begin_from_the_best_answer_and_the_right_verdict(tmp_path: Path) -> None:
    built(tmp_path, [ROW], compare=3)
    data = ConversationData.model_validate({"source": {"type": "dataset", "paths": [str(tmp_path / "data")]}})
    example = Conversations.load(data, byte_tokenizer())[0]
    learned = [i for i, mask in zip(example.token_ids, example.loss_mask, strict=True) if mask]
    text = str(byte_tokenizer().decode(learned, skip_special_tokens=True))
    assert text in {f"4\n[[{scores}]]" for scores in ("10, 1, 1", "1, 10, 1", "1, 1, 10")}
    [card] = data_cards(tmp_path / "data")
    assert [answer.text for answer in card.answers] == [text]  # on the stage's page
    [prompt] = prompts_of(tmp_path)
    assert VerdictReward().score(prompt.task, text).outcome == "right"


def test_single_answers_are_judged_by_their_scores(tmp_path: Path) -> None:
    rows = [{"prompt": "2+2?", "answer": answer, "score": score} for answer, score in (("4", 10), ("5", 1))]
    built(tmp_path, rows, "scored", rubric="{prompt} {completion} \\boxed{7}", compare=1, form="box")
    prompts = prompts_of(tmp_path)
    assert [(p.task.prompt, p.task.truth["label"]) for p in prompts] == [
        ("2+2? 4 \\boxed{7}", 10.0),
        ("2+2? 5 \\boxed{7}", 1.0),
    ]
    assert [VerdictReward().score(p.task, "\\boxed{10}").score for p in prompts] == [1.0, -1.0]


def test_comparisons_that_ask_nothing_are_counted(tmp_path: Path) -> None:
    pair = {"prompt": "2+2?", "chosen": "4", "rejected": "5", "rubric": "be right", "truth": "four"}
    unruled = {key: value for key, value in pair.items() if key != "rubric"} | {"prompt": "3+3?"}
    figures = built(tmp_path, [pair, unruled], "pair")
    assert len(prompts_of(tmp_path)) == 1 and figures["judge/dropped/cannot_be_judged"] == 1
    with pytest.raises(ValueError, match="no scores in the judge's range"):
        built(tmp_path, [pair], "pair", rubric="{completion} [[7]]", compare=1)
    with pytest.raises(ValueError, match=r"judge\.votes=2 has no effect"):
        built(tmp_path, [pair], "pair", votes=2)


def test_a_mistaken_sum_differs_in_one_column_by_hand() -> None:
    """58+13: the digits of the hash choose column and sign; whatever they are, one total is off by one and the rest
    follows from it."""
    right = worked_answer(58, 13)
    assert right == "8+3=11;5+1+1=7;71"
    assert mistaken_answer(58, 13) in {
        "8+3=12;5+1+1=7;72", "8+3=10;5+1+1=7;70", "8+3=11;5+1+1=8;81", "8+3=11;5+1+1=6;61",
    }  # fmt: skip
    for first in range(10, 100, 7):
        for second in range(10, 100, 7):
            *columns, total = mistaken_answer(first, second).split(";")
            assert int(total) != first + second and "-" not in total
            assert sum(a != b for a, b in zip(columns, worked_answer(first, second).split(";"), strict=False)) >= 1
