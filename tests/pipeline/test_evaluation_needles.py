"""Needles in haystacks: where they stand, how long the prompts are, and what a reader of limited sight finds."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.evaluation import EvalConfig, NeedleSuite
from configs.sampling import SamplingConfig
from pipeline.evaluation.needles import Needle, load_needles, run_needles
from pipeline.evaluation.suites import Session
from pipeline.models.tokenizer import byte_tokenizer
from rollout.types import Completion, Group, TokenLogprobs
from tests.pipeline.stage_configs import make_checkpoint, read, start

TOKENIZER = byte_tokenizer()
SENTENCES = [f"Here begins sentence {word}." for word in ("one", "two", "three", "four", "five", "six", "seven")]


def needles(seed: int = 0, **settings: Any) -> list[Needle]:
    return load_needles(NeedleSuite.model_validate({"type": "needle"} | settings), TOKENIZER, seed)


def text(needle: Needle) -> str:
    """The haystack, without what the chat template puts before and behind."""
    said = str(TOKENIZER.decode(needle.token_ids, skip_special_tokens=True))
    haystack, blank, asked = said.partition("\n\n")
    assert blank and asked.startswith(f"{needle.question} Answer with the number alone.")
    return haystack.rpartition("user\n")[2]


def test_prompts_are_filled_and_the_needle_stands_where_it_should() -> None:
    made = needles(lengths=[200, 500], depths=[0.0, 0.5, 1.0], samples=2)
    assert [needle.row for needle in made[:3]] == ["200:0:0", "200:0:1", "200:0.5:0"] and len(made) == 12
    for needle in made:
        assert len(needle.token_ids) <= needle.length < len(needle.token_ids) + 60  # no sentence is longer
        sentences = re.split(r"(?<=\.) ", text(needle))
        before = sentences.index(needle.sentence)
        assert before == round(needle.depth * (len(sentences) - 1))
        assert re.findall(r"\d+", text(needle)) == [needle.number]  # of seven digits or six, said once
    assert len({needle.number for needle in made}) == 12
    assert made == needles(lengths=[200, 500], depths=[0.0, 0.5, 1.0], samples=2)
    assert made != needles(lengths=[200, 500], depths=[0.0, 0.5, 1.0], samples=2, seed=1)
    assert made[:6] == needles(lengths=[200], depths=[0.0, 0.5, 1.0], samples=2)  # whatever else is asked


def test_a_text_of_the_users_is_taken_from_anywhere_in_it(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("  " + "\n".join(SENTENCES) + "\n")
    [bare] = needles(lengths=[150], depths=[0.0], samples=1, path=str(file))
    room = 150 - len(bare.token_ids)
    starts = set()
    for needle in needles(lengths=[200], depths=[0.5], samples=12, path=str(file)):
        found = [sentence for sentence in re.split(r"(?<=\.) ", text(needle)) if sentence != needle.sentence]
        first = SENTENCES.index(found[0])
        assert found == [SENTENCES[(first + place) % 7] for place in range(len(found))] and len(found) >= 2
        starts.add(first)
    assert len(starts) > 3 and 0 <= room < 30
    with pytest.raises(ValueError, match=r"path: .* \d+ tokens.*lengths .*900"):
        needles(lengths=[900], depths=[0.5], path=str(file))
    with pytest.raises(ValueError, match="lengths: 60 tokens"):
        needles(lengths=[60], path=str(file))
    file.write_text("He said <eos> and left. " * 40)
    with pytest.raises(ValueError, match="special token"):
        needles(lengths=[200], path=str(file))
    file.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="UTF-8"):
        needles(lengths=[200], path=str(file))


class Reader:
    """Sees the last 250 characters of a prompt, and says the number that is there as `form` says it."""

    def __init__(self, form: str = "It is {}.") -> None:
        self._form = form

    def generate(
        self, prompts: list[list[int]], sampling: SamplingConfig, num_completions: int, seed: int
    ) -> Iterator[Group]:
        assert num_completions == 1 and sampling.temperature == 0
        for index, ids in reversed(list(enumerate(prompts))):
            seen = re.findall(r"\d{6}", str(TOKENIZER.decode(ids))[-250:])
            said = self._form.format(seen[0], f"{int(seen[0]):,}") if seen else "I can't see it."
            yield Group(index, ids, [Completion([0] * len(said), [0.0] * len(said), said, "stop", 0)])

    def continuation_logprobs(self, sequences: list[list[int]], starts: list[int]) -> list[TokenLogprobs]:
        raise AssertionError("nobody asks")


def session(reader: Reader) -> Session:
    return Session(reader, None, SamplingConfig(max_tokens=8), seed=0)


def test_figures_of_a_reader_of_limited_sight_by_hand() -> None:
    asked = needles(lengths=[200, 600], depths=[0.0, 1.0], samples=3)
    found = run_needles(asked, session(Reader()))
    shares = {name: value for name, value in found.figures.items() if not name.endswith(("_low", "_high"))}
    assert shares == {
        "accuracy": 0.75,
        "accuracy_200": 1.0,
        "accuracy_600": 0.5,
        "accuracy_depth_0": 0.5,
        "accuracy_depth_1": 1.0,
        "accuracy_200_depth_0": 1.0,
        "accuracy_200_depth_1": 1.0,
        "accuracy_600_depth_0": 0.0,
        "accuracy_600_depth_1": 1.0,
        "mean_length": pytest.approx((9 * len("It is 123456.") + 3 * len("I can't see it.")) / 12),
        "truncated_rate": 0.0,
        "unjudged_rate": 0.0,
    }
    assert (found.figures["accuracy_low"], found.figures["accuracy_high"]) == pytest.approx(
        (0.46769, 0.91106), abs=1e-5
    )
    assert found.items["accuracy_600_depth_0"] == {"600:0:0": 0.0, "600:0:1": 0.0, "600:0:2": 0.0}
    assert len(found.items["accuracy"]) == 12
    assert {record.outcome for record in found.records[6:9]} == {"no number"}
    assert found.records[0].truth in found.records[0].detail and found.records[0].row == "200:0:0"


@pytest.mark.parametrize(
    ("form", "right"), [("{1}", True), ("**{0}**: {0}", True), ("{0} or 123456", False), ("{0}1", False), ("7", False)]
)
def test_the_number_and_no_other(form: str, right: bool) -> None:
    found = run_needles(needles(lengths=[200], depths=[1.0], samples=1), session(Reader(form)))
    assert found.figures["accuracy"] == float(right)
    assert found.records[0].outcome == ("found" if right else "another number")


def config(**suite: Any) -> EvalConfig:
    return EvalConfig.model_validate(
        {
            "type": "eval",
            "model": {"path": "m"},
            "suites": {"far": {"type": "needle", "lengths": [100]} | suite},
            "sampling": {"max_tokens": 16},
            "rollout": {"max_model_len": 128},
        }
    )


@pytest.mark.parametrize(
    ("suite", "message"),
    [
        ({"lengths": [100, 113]}, r"suites\.far\.lengths .*= 129 .*max_model_len=128"),
        ({"lengths": [100, 100]}, r"lengths=\[100, 100\]"),
        ({"depths": [0.5, 1.5]}, r"depths=\[0\.5, 1\.5\]"),
    ],
)
def test_what_makes_no_sense_is_refused(suite: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**suite)


def test_the_text_is_part_of_the_lineage(tmp_path: Path) -> None:
    model = {"model": {"path": str(make_checkpoint(tmp_path / "base"))}}
    (tmp_path / "text.txt").write_text("Text.")
    for name, suite in (("own", {"path": str(tmp_path / "text.txt")}), ("made", {})):
        start(tmp_path / "run" / name, name, EvalConfig.model_validate(config(**suite).model_dump() | model))
    assert list(read(tmp_path / "run" / "own", "lineage.json")["data"]) == ["suites.far"]
    assert read(tmp_path / "run" / "made", "lineage.json")["data"] == {}
