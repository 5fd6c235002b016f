"""Pairs of answers, the filters on comparisons, and the split: by hand, and what must hold of any."""

import random
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk

from configs.data import ComparisonData
from configs.preferences import PairFilters
from pipeline.data.comparisons import Comparison, read_comparisons
from pipeline.data.prompts import Prompt
from pipeline.data.rows import BadRows
from pipeline.preferences.answers import Answer, AnsweredPrompt
from pipeline.preferences.filters import FilterResult, filter_comparisons, longer_answer
from pipeline.preferences.pairs import pair_answers, unpaired_reason
from pipeline.preferences.similarity import near_duplicates
from pipeline.preferences.split import is_held_out_prompt, prompt_key, save_splits
from pipeline.preferences.summary import filter_figures, pair_figures
from pipeline.stages.preferences import COMPARISON_FEATURES, comparison_row
from rewards.judging.rubric import Vote
from rewards.judging.votes import draw_ballots, tally
from rewards.types import Task


def answered(*answers: tuple[str, float | None] | Answer) -> AnsweredPrompt:
    given = [one if isinstance(one, Answer) else Answer(one[0], 5, True, one[1], "") for one in answers]
    return AnsweredPrompt(Prompt([1], Task("q", "t", row="f:1")), given)


def cut(text: str, score: float) -> Answer:
    return Answer(text, 5, False, score, "")


def said(answered: AnsweredPrompt) -> list[list[str]]:
    return [pair.answers for pair in pair_answers(answered, "math", "reason")]


def comparison(prompt: str, best: str, worst: str, scores: list[float] | None = None, **names: str) -> Comparison:
    names = {"source": "s", "domain": "d", "row": "f:1"} | names
    return Comparison([{"role": "user", "content": prompt}], [best, worst], scores, **names)


def run(
    comparisons: list[Comparison], seed: int = 0, shares: dict[str, float] | None = None, **filters: Any
) -> FilterResult:
    return filter_comparisons(comparisons, PairFilters(**filters), shares or {}, seed)


def reasons(result: FilterResult) -> Counter[str]:
    return Counter(reason for reason, _ in result.dropped)


def test_the_best_answer_stands_against_the_worst() -> None:
    (pair,) = pair_answers(answered(("wrong", 0.0), ("right", 1.0)), "math", "reason")
    assert pair == Comparison(
        [{"role": "user", "content": "q"}], ["right", "wrong"], [1.0, 0.0], "math", "reason", "f:1"
    )


def test_several_pairs_have_the_widest_margins_first_and_no_text_twice() -> None:
    given = answered(("d", 0.2), ("a", 1.0), ("c", 0.4), ("a", 1.0), ("b", 0.9), ("e", 0.0), ("e ", 0.0))
    made = pair_answers(given, "s", "d")
    assert [(pair.answers, pair.margin) for pair in made] == [
        (["a", "e"], 1.0),
        (["b", "d"], pytest.approx(0.7)),
    ]
    assert said(answered(("a", 1.0), ("b", 1.0), ("c", 1.0), ("d", 0.0))) == [["a", "d"]]


def test_a_failed_checker_makes_no_rejected_answer() -> None:
    assert said(answered(("right", 1.0), ("unjudged", None))) == []
    assert unpaired_reason(answered(("right", 1.0), ("unjudged", None))) == "fewer than two different answers judged"
    assert said(answered(("right", 1.0), ("unjudged", None), ("wrong", 0.0))) == [["right", "wrong"]]
    assert unpaired_reason(answered(("a", 0.0), ("b", 0.0))) == "equal scores"


def test_an_answer_cut_short_may_lose_but_never_win() -> None:
    assert said(answered(cut("long and right", 1.0), ("right", 0.8), cut("long and wrong", 0.0))) == [
        ["right", "long and wrong"]
    ]
    assert unpaired_reason(answered(cut("long", 1.0), ("wrong", 0.0))) == "no better answer ended"
    assert said(answered(cut("long", 1.0), ("wrong", 0.0))) == []


def test_pairs_of_any_answers() -> None:
    draw = random.Random(0)
    for _ in range(300):
        given = answered(
            *(
                Answer(draw.choice("abcdefgh "), 1, draw.random() < 0.8, draw.choice([None, 0.0, 0.5, 1.0]), "")
                for _ in range(draw.randrange(9))
            )
        )
        made = pair_answers(given, "s", "d")
        texts = [text for pair in made for text in pair.answers]
        assert len(set(texts)) == len(texts) and not {"", " "} & set(texts)
        margins = [pair.margin or 0.0 for pair in made]
        assert all(margin > 0 for margin in margins) and margins == sorted(margins, reverse=True)
        best = [one.score for one in given.answers if one.ended and one.score is not None and one.text.strip()]
        assert not made or max(best) >= (made[0].scores or [])[0]


def test_figures_of_what_was_sampled() -> None:
    both = [answered(("a", 1.0), ("b", 0.0), ("b", 0.0)), answered(("a", 1.0), ("b", None), cut("c", 1.0))]
    figures = pair_figures(both, [True, False])
    assert figures == {
        "prompts": 2,
        "answers": 6,
        "score": pytest.approx(3 / 5),
        "unjudged": pytest.approx(1 / 6),
        "cut_short": pytest.approx(1 / 6),
        "left_out": 2,
        "without_pair": 1,
        "without_pair/equal_scores": 1,
    }


def test_each_filter_names_its_reason() -> None:
    given = [
        comparison("wide", "a", "b", [1.0, 0.0]),
        comparison("narrow", "a", "b", [1.0, 0.6]),
        comparison("equal", "a", "b", [1.0, 1.0]),
        comparison("unscored", "a", "b"),
        comparison("uneven", "a" * 31, "b" * 10),
        comparison("even", "a" * 30, "b" * 10),
        comparison("twice", "a", "b"),
        comparison("twice", "a", "b", source="other"),
        comparison("Two  pairs", "a", "b", [1.0, 0.5]),
        comparison("two pairs", "c", "d", [1.0, 0.2]),
    ]
    result = run(given, min_margin=0.5, max_length_ratio=3.0)
    assert reasons(result) == {
        "margin": 1,
        "equal scores": 1,
        "length ratio": 1,
        "exact duplicate": 1,
        "more of one prompt": 1,
    }
    assert {one.messages[0]["content"] for one in result.kept} == {"wide", "unscored", "even", "twice", "two pairs"}
    assert len(run(given, pairs_per_prompt=2).kept) == 8


def test_two_domains_may_hold_the_same_comparison() -> None:
    given = [comparison("q", "a", "b", domain=domain) for domain in ("helpful", "safety", "safety")]
    result = run(given)
    assert reasons(result) == {"exact duplicate": 1}
    assert {one.domain for one in result.kept} == {"helpful", "safety"}


def test_one_answer_with_its_score_passes() -> None:
    alone = Comparison([{"role": "user", "content": "q"}], ["a"], [0.3], "s", "d", "f:1")
    assert run([alone], min_margin=1.0, balance_length=True).kept == [alone]


@cache
def trigrams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    words += [""] * (3 - len(words))
    return set(zip(words, words[1:], words[2:], strict=False))


def similarity(a: str, b: str) -> float:
    return len(trigrams(a) & trigrams(b)) / len(trigrams(a) | trigrams(b))


def test_near_duplicates_by_hand() -> None:
    texts = ["a b c d e", "A, b c d: e!", "a b c d f", "x y", "x y", "x z"]
    # "a b c d e" has abc bcd cde, "a b c d f" abc bcd cdf: 2 of 4.
    assert near_duplicates(texts, "123456", 0.5) == [False, True, False, False, True, False]
    assert near_duplicates(["a b c d e", "a b c d e f g", "a b c d f"], "123", 0.59) == [False, True, False]
    assert near_duplicates(texts, "111222", 0.5) == [False] * 6
    assert near_duplicates(texts, "123456", 1.0) == [False] * 6
    assert near_duplicates([], "", 0.5) == []


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.75, 0.8, 0.95])
def test_no_near_duplicate_is_missed_and_none_invented(threshold: float) -> None:
    draw = random.Random(1)
    texts: list[str] = []
    for _ in range(250):
        words = draw.choice(texts).split() if texts and draw.random() < 0.6 else draw.choices("abcdefgh", k=30)
        words = list(words[: draw.randrange(4, 31)])
        for _ in range(draw.randrange(4)):
            words[draw.randrange(len(words))] = draw.choice("abcdefgh")
        texts.append(" ".join(words))
    found = near_duplicates(texts, [str(number) for number in range(len(texts))], threshold)
    kept: list[str] = []
    for text, duplicate in zip(texts, found, strict=True):
        assert duplicate == any(similarity(text, other) > threshold for other in kept)
        kept += [] if duplicate else [text]
    assert 0.05 < sum(found) / len(found) < 0.95


def many(size: int, seed: int) -> list[Comparison]:
    draw = random.Random(seed)

    def text() -> str:
        return " ".join(draw.choices(["one", "two", "three", "four"], k=draw.randrange(1, 12)))

    return [
        comparison(
            text() if draw.random() < 0.8 else "the same",
            f"a {text()}",
            f"b {text()}",
            draw.choice([None, [1.0, draw.choice([0.0, 0.5, 1.0])]]),
            domain=draw.choice(["x", "x", "x", "y", "z"]),
            source=draw.choice(["left", "right"]),
            row=f"f:{number}",
        )
        for number in range(size)
    ]


ALL = {
    "min_margin": 0.3,
    "max_similarity": 0.6,
    "max_length_ratio": 4.0,
    "balance_length": True,
    "pairs_per_prompt": 2,
    "shares": {"x": 0.5, "y": 0.3, "z": 0.2},
}


@pytest.mark.parametrize("seed", range(4))
def test_counts_add_up_and_every_promise_holds(seed: int) -> None:
    given = many(400, seed)
    result = run(given, seed, **ALL)
    assert Counter(map(id, given)) == Counter(map(id, result.kept)) + Counter(id(one) for _, one in result.dropped)
    figures = filter_figures(result, [False] * len(result.kept))
    assert (
        figures["kept"] + sum(n for name, n in figures.items() if name.startswith("dropped/"))
        == figures["given"]
        == 400
    )
    assert sum(figures[f"source/{name}/kept"] for name in ("left", "right")) == figures["kept"]
    counts = Counter(one.domain for one in result.kept)
    for domain, share in ALL["shares"].items():
        assert counts[domain] == pytest.approx(share * len(result.kept), abs=1.5)
    assert max(Counter((one.domain, prompt_key(one.messages)) for one in result.kept).values()) <= 2
    assert all(one.margin is None or one.margin >= 0.3 for one in result.kept)


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_the_rows_decides_nothing(seed: int) -> None:
    given = many(300, seed)
    shuffled = random.Random(seed).sample(given, len(given))
    assert run(given, seed, **ALL) == run(shuffled, seed, **ALL)
    assert run(given, seed + 1, **ALL).kept != run(given, seed, **ALL).kept


def test_length_balance_within_each_domain() -> None:
    given = [comparison(f"q{i}", "long", "s", domain="x") for i in range(7)]
    given += [comparison(f"r{i}", "s", "long", domain="x") for i in range(3)]
    given += [comparison(f"s{i}", "same", "mesa", domain="x") for i in range(2)]
    given += [comparison(f"t{i}", "s", "long", domain="y") for i in range(4)]
    result = run(given, balance_length=True)
    assert reasons(result) == {"length balance": 4}
    assert Counter((one.domain, longer_answer(one)) for one in result.kept) == {
        ("x", 1): 3,
        ("x", -1): 3,
        ("x", 0): 2,
        ("y", -1): 4,
    }


def test_domains_are_cut_down_to_the_scarcest() -> None:
    given = [comparison(f"q{i}", "a", "b", domain="code") for i in range(90)]
    given += [comparison(f"r{i}", "a", "b", domain="math") for i in range(10)]
    result = run(given, shares={"code": 0.75, "math": 0.25})
    assert Counter(one.domain for one in result.kept) == {"code": 30, "math": 10}
    assert reasons(result) == {"share of the domain": 60}
    with pytest.raises(ValueError, match="domain 'math'"):
        run(given, shares={"code": 1.0})
    with pytest.raises(ValueError, match=r"shares\.safety"):
        run(given, shares={"code": 0.5, "math": 0.25, "safety": 0.25})


def test_a_prompt_is_on_one_side_for_good(tmp_path: Path) -> None:
    given = many(500, 0)
    held_out = [is_held_out_prompt(one.messages, 0.2) for one in given]
    sides: dict[str, set[bool]] = {}
    for one, side in zip(given, held_out, strict=True):
        sides.setdefault(prompt_key(one.messages), set()).add(side)
    assert all(len(side) == 1 for side in sides.values())
    assert is_held_out_prompt([{"role": "user", "content": "The  SAME"}], 0.2) == is_held_out_prompt(
        comparison("the same", "", "").messages, 0.2
    )
    assert not any(is_held_out_prompt(one.messages, 0.0) for one in given)
    share = sum(is_held_out_prompt(comparison(f"q{i}", "a", "b").messages, 0.2) for i in range(2000)) / 2000
    assert share == pytest.approx(0.2, abs=0.03)
    more = [is_held_out_prompt(one.messages, 0.4) for one in given]
    assert all(after for before, after in zip(held_out, more, strict=True) if before)
    save_splits(tmp_path / "data", [comparison_row(one) for one in given], held_out, COMPARISON_FEATURES)
    splits = load_from_disk(tmp_path / "data")
    assert {name: len(rows) for name, rows in splits.items()} == {
        "train": 500 - sum(held_out),
        "held_out": sum(held_out),
    }


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    given = many(40, 5)
    save_splits(tmp_path / "data", [comparison_row(one) for one in given], [False] * len(given), COMPARISON_FEATURES)
    source = {"type": "dataset", "paths": [str(tmp_path / "data")]}
    bad_rows = BadRows()
    assert list(read_comparisons(ComparisonData.model_validate({"source": source}), bad_rows)) == given
    assert not bad_rows.counts


def test_a_dialogue_and_what_goes_on_from_it_are_on_the_same_side() -> None:
    for number in range(50):
        opening = [{"role": "user", "content": f"question {number}"}]
        going_on = [*opening, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "and then?"}]
        assert is_held_out_prompt(opening, 0.5) == is_held_out_prompt(going_on, 0.5)
        assert prompt_key(opening) != prompt_key(going_on)


@pytest.mark.parametrize(("first", "second", "kept"), [(7.25, 6.0, True), (7.0, 6.0, False), (6.0, 6.0, False)])
def test_four_votes_in_both_orders_and_a_gap_above_one(first: float, second: float, kept: bool) -> None:
    """The judge of DeepSeek-R1's pairs, here with 2 points for whatever stands first. Each answer stands first in two
    of four votes, so both means are 1 higher and their gap is the answers' own: 1.25 is kept, 1.0 is not above 1."""
    own = {0: first, 1: second}
    ballots = draw_ballots(2, compare=2, votes=4, key="pair")
    votes: list[Vote | str] = [([own[ballot[0]] + 2, own[ballot[1]]], "a reason") for ballot in ballots]
    verdicts = tally(2, ballots, votes)
    assert [verdict.score for verdict in verdicts] == [first + 1, second + 1]
    answers = [Answer(text, 5, True, verdict.score, "") for text, verdict in zip(("a", "b"), verdicts, strict=True)]
    pairs = pair_answers(AnsweredPrompt(Prompt([1], Task("q", None)), answers), "helpful", "helpful")
    result = filter_comparisons(pairs, PairFilters(min_margin=1.25), {}, seed=0)
    assert [comparison.answers for comparison in result.kept] == ([["a", "b"]] if kept else [])
