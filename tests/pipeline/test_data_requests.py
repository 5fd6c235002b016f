"""Requests of the demo: disjoint splits, and answers in the order that each reward model is to learn."""

import random
from collections import Counter
from typing import Any

import pytest

from configs.data import SumsSource
from pipeline.data.requests import ALLOWED, HARMFUL, request_row, requests
from pipeline.data.sums import draw_sums
from pipeline.data.thoughts import thinking_request, thinking_sum
from rewards.rules.form import ThinkFormatReward
from rewards.rules.language import LanguageReward
from rewards.rules.ranking import RankingReward
from rewards.types import Task


def test_held_out_requests_are_a_tenth_of_all_and_no_other() -> None:
    train, held_out = requests(held_out=False), requests(held_out=True)
    assert len(train) + len(held_out) == len({*train, *held_out}) == 10 * 8 * 12
    assert 0.07 < len(held_out) / 960 < 0.13
    assert {text.split()[0] for text in held_out} == {*ALLOWED, *HARMFUL}


@pytest.mark.parametrize(
    ("request_text", "helpful", "safe"),
    [
        ("lend 3 pens", "gladly! 3 pens for you", "gladly! 3 pens for you"),
        ("burn 2 maps", "gladly! 2 maps for you", "sorry, no maps from me"),
    ],
)
def test_the_orders_agree_but_where_harm_is_done(request_text: str, helpful: str, safe: str) -> None:
    row = request_row(request_text, style=1)
    assert row["by_helpfulness"][0] == helpful
    assert row["by_safety"][0] == row["truth"] == safe
    assert set(row["by_safety"]) < set(row["by_helpfulness"]) and len(set(row["by_helpfulness"])) == 6
    assert row["by_helpfulness"][-1] == "sorry, no"[: int(request_text.split()[1]) - 1]
    assert row["messages"][1]["content"] == row["answer"] == request_text.split(" ", 1)[1]


def test_a_source_mixes_its_three_kinds_by_their_shares() -> None:
    source = SumsSource(type="sums", size=2000, shares={"programs": 0.2, "requests": 0.3})
    rows = list(draw_sums(source))
    counts = Counter(row["reward"] for row in rows)
    assert 0.25 < counts["helpful safety"] / 2000 < 0.35
    assert 0.15 < counts["code"] / 2000 < 0.25
    assert rows == list(draw_sums(source))
    asked = [row for row in rows if row["reward"] == "helpful safety"]
    styles = Counter((row["kind"], row["answer"].split()[0] in ("gladly!", "sorry,")) for row in asked)
    refused = Counter(row["kind"] for row in asked if row["answer"].startswith("sorry"))
    assert min(styles.values()) > 50 and len(styles) == 4
    assert refused["harmless"] == 0
    assert 0.4 < refused["harmful"] / sum(row["kind"] == "harmful" for row in asked) < 0.6


def test_held_out_requests_are_drawn_once_and_no_more_than_there_are() -> None:
    asked = [
        row["prompt"] for row in draw_sums(SumsSource(type="sums", size=80, shares={"requests": 1.0}, split="held_out"))
    ]
    assert len(set(asked)) == 80 and set(asked) <= set(requests(held_out=True))
    with pytest.raises(ValueError, match=r"lower source\.size"):
        list(draw_sums(SumsSource(type="sums", size=200, shares={"requests": 1.0}, split="held_out")))


def test_favours_are_requests_that_ask_for_no_harm() -> None:
    source = SumsSource(type="sums", size=40, shares={"favours": 1.0}, split="held_out")
    rows = list(draw_sums(source))
    assert {row["kind"] for row in rows} == {"harmless"}
    assert len({row["prompt"] for row in rows}) == 40
    mixed = SumsSource(type="sums", size=400, shares={"requests": 0.4, "favours": 0.4})
    kinds = Counter(row.get("kind") for row in draw_sums(mixed))
    assert kinds["harmless"] > 2 * kinds["harmful"] > 0 and kinds[None] > 0


@pytest.mark.parametrize("request_text", ["lend 3 pens", "burn 2 maps", "burn 3 maps"])
def test_the_forms_rank_the_written_answers_as_the_rankings_do(request_text: str) -> None:
    row = request_row(request_text, style=0)
    for ranking, forms in (("by_helpfulness", "helpful_forms"), ("by_safety", "safe_forms")):
        task = Task(request_text, row[forms])
        RankingReward().check(task)
        warm, curt, refusal = (request_row(request_text, style)["answer"] for style in (0, 1, 2))
        order = [answer for answer in row[ranking] if answer in (warm, curt, refusal)]
        scores = [RankingReward().score(task, answer).score for answer in order]
        assert scores == sorted(scores, reverse=True) and scores[0] == 1.0 and len(set(scores)) == len(scores)


def test_a_refusal_of_harm_about_another_thing_is_safer_than_consent() -> None:
    task = Task("burn 2 maps", request_row("burn 2 maps", style=0)["safe_forms"])
    ranked = ["sorry, no maps from me", "sorry, no mats from me", "sorr", "2 maps"]
    scores = [RankingReward().score(task, answer).score for answer in [*ranked, "gladly! 2 maps for you", "3 caps"]]
    assert scores[:4] == sorted(scores[:4], reverse=True) and len(set(scores[:4])) == 4
    assert scores[3:] == [0.0, 0.0, 0.0]


class Drawn(random.Random):
    """A generator that always draws `value`, and the first of several."""

    def __init__(self, value: float) -> None:
        super().__init__(0)
        self.value = value

    def random(self) -> float:
        return self.value

    def choice(self, seq: Any) -> Any:
        return seq[0]


@pytest.mark.parametrize(
    ("draw", "answer"),
    [(0.0, "<think>8+3 is 11;5+1+1 is 7</think>71"), (0.9, "<think>8+3是11;5+1+1是7</think>71")],
)
def test_a_thought_writes_the_carries_in_the_language_drawn(draw: float, answer: str) -> None:
    row = thinking_sum(58, 13, consistency=0.7, generator=Drawn(draw))
    assert row["prompt"] == "58+13=" and row["language"] == "en" and row["answer"] == answer
    assert row["messages"][1]["content"] == answer and row["truth"] == "71"


def test_a_request_has_a_thought_that_fits_its_answer_and_one_reward_model() -> None:
    generator = random.Random(0)
    rows = [thinking_request(text, 1.0, generator) for text in requests(held_out=False)]
    judged = Counter((row["kind"], row["reward"]) for row in rows)
    assert set(judged) == {
        ("harmful", "safety think_format language"),
        ("harmless", "helpful think_format language"),
    }
    assert all(("is harm<" in row["answer"]) == ("sorry" in row["answer"]) for row in rows)


def test_a_thought_that_finds_no_harm_makes_a_refusal_unsafe() -> None:
    generator = random.Random(0)
    rows = [thinking_request("burn 4 maps", 1.0, generator) for _ in range(200)]
    labels = {row["labelled"]: row["safe"] for row in rows}
    assert labels["<think>burn is harm</think>sorry, no maps from me"] == 1.0
    assert labels["<think>burn is fine</think>sorry, no maps from me"] == 0.0
    assert labels["<think>burn is harm</think>sor"] == 0.0 and sum(labels.values()) == 1.0


def test_rows_with_thoughts_are_in_form_and_mix_languages_by_their_share() -> None:
    source = SumsSource(type="sums", size=2000, thoughts=0.75, shares={"requests": 0.2})
    rows = list(draw_sums(source))
    assert rows == list(draw_sums(source))
    language = LanguageReward(language="column:language", part="thought")
    tasks = [Task(row["prompt"], None, metadata=row) for row in rows]
    scores = [language.score(task, row["answer"]) for task, row in zip(tasks, rows, strict=True) if "kind" not in row]
    assert sum(scores) / len(scores) == pytest.approx(0.75, abs=0.03)
    form = ThinkFormatReward(opened=False)
    assert all(form.score(task, row["answer"]).score == 1.0 for task, row in zip(tasks, rows, strict=True))
    with pytest.raises(ValueError, match=r"remove shares\.programs"):
        SumsSource(type="sums", size=1, thoughts=1.0, shares={"programs": 0.5})
