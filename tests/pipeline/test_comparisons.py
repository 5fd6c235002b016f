"""Comparisons in every form that they come in: read, checked, tokenised, and written as the stage writes them."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from configs.data import ComparisonData
from pipeline.data.comparisons import Comparison, Comparisons, read_comparisons
from pipeline.data.rows import BadRows
from pipeline.data.scored import scored_ids
from pipeline.models.tokenizer import byte_tokenizer

HH = Path(__file__).parents[3] / "shared" / "data" / "hh_harmless_first_half.jsonl.gz"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def config(file: Path, rows: list[Any], form: str, **settings: Any) -> ComparisonData:
    if file.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"type": "file", "paths": [str(file)]}
    return ComparisonData.model_validate({"source": source, "form": form, **settings})


def read(file: Path, rows: list[Any], form: str, **settings: Any) -> tuple[list[Comparison], BadRows]:
    bad_rows = BadRows()
    return list(read_comparisons(config(file, rows, form, **settings), bad_rows)), bad_rows


@pytest.mark.parametrize("name", ["c.jsonl", "c.parquet"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]},
        {"chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]},
        {"prompt": "q", "chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]},
    ],
)
def test_every_writing_of_a_pair_is_the_same_comparison(tmp_path: Path, name: str, row: dict[str, Any]) -> None:
    (comparison,), bad_rows = read(tmp_path / name, [row], "pair")
    assert comparison == Comparison(
        [user("q")], ["good", "bad"], None, f"{tmp_path}/{name}", "", f"{tmp_path}/{name}:1"
    )
    assert comparison.margin is None and bad_rows.seen == 1 and not bad_rows.counts


def test_a_pair_of_long_conversations_keeps_all_turns(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "S"}, user("a"), assistant("b"), user("c")]
    row = {"chosen": [*turns, assistant("good")], "rejected": [*turns, assistant("bad")]}
    (comparison,), _ = read(tmp_path / "c.jsonl", [row], "pair")
    assert comparison.messages == turns and comparison.answers == ["good", "bad"]


def test_columns_and_scores_of_a_pair(tmp_path: Path) -> None:
    row = {"prompt": "q", "better": "x", "rejected": "y", "chosen_score": 8, "rejected_score": 2.5, "subset": "chat"}
    settings = {"columns": {"chosen": "better", "domain": "subset"}}
    (comparison,), _ = read(tmp_path / "c.jsonl", [row], "pair", **settings)
    assert (comparison.scores, comparison.margin, comparison.domain) == ([8.0, 2.5], 5.5, "chat")
    with pytest.raises(ValueError, match=r"columns\.answers .*'pair'"):
        config(tmp_path / "c.jsonl", [row], "pair", columns={"answers": "a"})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "chosen": "a"}, "missing field"),
        ({"chosen": "a", "rejected": "b"}, "missing field"),
        ({"prompt": "q", "chosen": "a", "rejected": "a "}, "equal answers"),
        ({"prompt": "q", "chosen": " ", "rejected": "b"}, "empty answer"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "empty user message"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, "an answer that is no text"),
        ({"prompt": "q", "chosen": "a\ud83d", "rejected": "b"}, "half a surrogate pair"),
        ({"prompt": [user("q"), assistant("r")], "chosen": "a", "rejected": "b"}, "does not end with the user"),
        ({"prompt": "q", "chosen": [assistant("a"), user("b")], "rejected": "b"}, "an answer that is not one message"),
        ({"chosen": [user("q"), assistant("a")], "rejected": [user("r"), assistant("b")]}, "conversations that differ"),
        (
            {"prompt": "p", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
            "a prompt that the conversations don't hold",
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "chosen_score": 1, "rejected_score": 2}, "contradict"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "chosen_score": 1}, "a score that is no number"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "domain": 3}, "a domain that is no text"),
    ],
)
def test_a_bad_pair_is_counted_by_its_reason(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    comparisons, bad_rows = read(tmp_path / "c.jsonl", [row], "pair")
    (found,) = bad_rows.counts
    assert not comparisons and reason in found and bad_rows.examples[0].where == f"{tmp_path}/c.jsonl:1"


def test_a_dialogue_is_cut_into_its_turns(tmp_path: Path) -> None:
    said = "\n\nHuman: hi\n\nAssistant: hello\n\nwhat now?\n\nHuman: Assistant: is no name\n\nAssistant:"
    rows = [
        {"chosen": f"{said} yes", "rejected": f"{said} no"},
        {"chosen": f"{said} yes", "rejected": said},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
        {"chosen": "hello", "rejected": "\n\nHuman: c\n\nAssistant: d"},
        {"chosen": f"{said} a\n\nAssistant: b", "rejected": f"{said} a\n\nAssistant: c"},
    ]
    (comparison,), bad_rows = read(tmp_path / "c.jsonl", rows, "dialogue")
    assert comparison.messages == [user("hi"), assistant("hello\n\nwhat now?"), user("Assistant: is no name")]
    assert comparison.answers == ["yes", "no"]
    assert bad_rows.counts == {
        "empty assistant message": 1,
        "conversations that differ before the last answer": 1,
        "a dialogue that does not begin with 'Human:'": 1,
        "roles don't alternate": 1,
    }


@pytest.mark.skipif(not HH.is_file(), reason="the HH-RLHF excerpt for development is not here")
def test_hh_rlhf_is_read_but_for_its_own_faults() -> None:
    source = {"type": "file", "paths": [str(HH)]}
    settings = ComparisonData.model_validate({"source": source, "form": "dialogue", "max_length": 100_000})
    loaded = Comparisons.load(settings, byte_tokenizer())
    assert len(loaded) == 1150 and loaded.bad_rows.seen == 1156  # four end with no answer, in two nobody asks twice
    assert loaded.bad_rows.counts == {"empty assistant message": 4, "roles don't alternate": 2}
    assert max(len(loaded[index].comparison.messages) for index in range(len(loaded))) >= 7


def test_scored_answers_of_one_prompt_are_compared(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "answer": "fair", "score": 2},
        {"prompt": "alone", "answer": "x", "score": -1.5},
        {"prompt": [user("q")], "answer": "good", "score": 3},
        {"prompt": "q", "answer": "poor", "score": 0.5},
        {"prompt": "q", "answer": "good", "score": 1},
        {"prompt": "q", "answer": "nan", "score": float("nan")},
        {"prompt": "q", "answer": "none", "score": None},
        {"prompt": "q", "answer": "yes", "score": True},
    ]
    comparisons, bad_rows = read(tmp_path / "c.jsonl", rows, "scored")
    assert [(one.answers, one.scores) for one in comparisons] == [
        (["good", "fair", "poor"], [3.0, 2.0, 0.5]),
        (["x"], [-1.5]),
    ]
    assert [one.margin for one in comparisons] == [2.5, None]
    assert bad_rows.counts == {
        "an answer scored before": 1,
        "a score that is no number": 1,
        "not a finite number": 1,
        "missing field": 1,
    }


def test_a_ranking_of_several_answers(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "by_safety": ["a", "b", "c"]}, {"prompt": "q", "by_safety": ["a"]}]
    (comparison,), bad_rows = read(tmp_path / "c.jsonl", rows, "ranking", columns={"answers": "by_safety"})
    assert comparison.answers == ["a", "b", "c"] and comparison.scores is None
    assert bad_rows.counts == {"not a list of two answers or more": 1}


def test_our_own_form_is_checked_too(tmp_path: Path) -> None:
    good = {
        "messages": [user("q")],
        "answers": ["a", "b"],
        "scores": [1, 0],
        "source": "s",
        "domain": "d",
        "row": "r:1",
    }
    rows = [
        good,
        good | {"scores": None},
        good | {"answers": ["a"], "scores": [0.5]},
        good | {"answers": ["a"], "scores": None},
        good | {"scores": [0, 1]},
        good | {"scores": [1]},
        good | {"row": None},
    ]
    comparisons, bad_rows = read(tmp_path / "c.jsonl", rows, "comparison")
    assert [(one.answers, one.scores) for one in comparisons] == [
        (["a", "b"], [1.0, 0.0]),
        (["a", "b"], None),
        (["a"], [0.5]),
    ]
    assert comparisons[0].row == "r:1"
    assert bad_rows.counts == {
        "one answer without a score": 1,
        "scores that contradict the order": 1,
        "not a score for every answer": 1,
        "not as the stage `preferences` writes it": 1,
    }


def test_tokens_are_those_that_are_scored(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "chosen": "good", "rejected": "x"},
        {"prompt": "q" * 40, "chosen": "good", "rejected": "x"},
        {"prompt": "q<|end|>", "chosen": "good", "rejected": "x"},
        {"prompt": "q", "chosen": "g" * 40, "rejected": "x"},
    ]
    tokenizer = byte_tokenizer()
    rows[2]["prompt"] = f"q{tokenizer.eos_token}"  # spells the end of a turn
    settings = config(tmp_path / "c.jsonl", rows, "pair", max_length=20, max_bad_share=0.75)
    loaded = Comparisons.load(settings, tokenizer)
    assert len(loaded) == 1
    expected = [scored_ids([user("q")], answer, tokenizer) for answer in ("good", "x")]
    assert [(loaded[0].prompt_ids, ids) for ids in loaded[0].answer_ids] == expected
    assert loaded.bad_rows.counts == {"longer than max_length": 2, "special token in the text": 1}
    with pytest.raises(ValueError, match="3 of 4 rows are bad"):
        Comparisons.load(settings.model_copy(update={"max_bad_share": 0.5}), tokenizer)


def test_a_resumed_run_takes_the_same_comparisons(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{number}", "chosen": "a", "rejected": "b"} for number in range(7)]
    settings = config(tmp_path / "c.jsonl", rows, "pair")
    first, again = (Comparisons.load(settings, byte_tokenizer(), seed=3) for _ in range(2))
    assert [first.take(step, 3) for step in range(1, 6)][2:] == [again.take(step, 3) for step in range(3, 6)]
    epoch = [one.comparison.row for step in range(1, 8) for one in first.take(step, 1)]
    assert sorted(epoch) == [f"{tmp_path}/c.jsonl:{number}" for number in range(1, 8)]


def test_only_the_domains_asked_for_are_read(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"q{i}", "chosen": "good", "rejected": "bad", "domain": domain}
        for i, domain in enumerate(("safety", "helpful", "safety", "math"))
    ]
    comparisons, bad_rows = read(tmp_path / "c.jsonl", rows, "pair", domains=["safety", "math"])
    assert [one.domain for one in comparisons] == ["safety", "safety", "math"]
    assert bad_rows.seen == 4 and not bad_rows.counts


def test_a_domain_that_no_row_has_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "chosen": "good", "rejected": "bad", "domain": "safety"}]
    with pytest.raises(ValueError, match=r"'saftey'; did you mean 'safety'"):
        read(tmp_path / "c.jsonl", rows, "pair", domains=["saftey"])


def test_answers_are_compared_without_their_thoughts_where_asked(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "chosen": "<think>a</think>\n\ngood", "rejected": "bad"},
        {"prompt": "q", "chosen": "<think>a</think>same", "rejected": "<think>b</think>same"},
        {"prompt": "q", "chosen": "good", "rejected": "<think>without an end"},
    ]
    (comparison,), bad_rows = read(tmp_path / "c.jsonl", rows, "pair", reasoning="drop")
    assert comparison.answers == ["good", "bad"]
    assert bad_rows.counts == {"equal answers": 1, "empty answer": 1}
    kept, _ = read(tmp_path / "c.jsonl", rows, "pair")
    assert kept[0].answers == ["<think>a</think>\n\ngood", "bad"] and len(kept) == 3
