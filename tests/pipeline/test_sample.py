"""Sampled answers: kept as they come, never sampled twice, and selected for training."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk

from configs.data import ConversationData, PromptData
from configs.rewards import RewardSpec
from configs.sample import SampleConfig, SampledDomain
from configs.sampling import RolloutConfig, SamplingConfig
from pipeline.data.conversations import Conversations
from pipeline.data.prompts import Prompt, Prompts
from pipeline.models.tokenizer import byte_tokenizer
from pipeline.preferences.answers import Answer, AnsweredPrompt, AnswerSampler, PromptSet, distinct_prompts
from pipeline.preferences.selection import select_answers
from pipeline.stages import sample
from rewards.types import Status, Task, Verdict
from rollout.types import Completion, Group

SOURCE = {"type": "sums", "size": 40, "digits": 1, "seed": 3}
EXACT = RewardSpec(name="exact")


class Killed(Exception):
    pass


class Guesser:
    """Answers with the place and a number drawn from the seed, groups last first; killed after so many groups."""

    def __init__(self, lives: int) -> None:
        self.lives = lives
        self.asked = 0

    def generate(
        self, prompts: list[list[int]], sampling: SamplingConfig, num_completions: int, seed: int
    ) -> Iterator[Group]:
        for index in reversed(range(len(prompts))):
            if self.lives == 0:
                raise Killed
            self.lives -= 1
            self.asked += 1
            texts = [str((seed + index + number) % 19) for number in range(num_completions)]
            completions = [
                Completion([0] * (number + 2), [0.0] * (number + 2), text, "length" if number == 3 else "stop", 0)
                for number, text in enumerate(texts)
            ]
            yield Group(index, prompts[index], completions)

    def close(self) -> None: ...


class ExactJudge:
    """1 for the truth, 0 for anything else, no verdict on 7."""

    def __init__(self) -> None:
        self._judged: dict[int, list[dict[str, Verdict]]] = {}

    def submit(self, index: int, task: Task, completions: list[str]) -> None:
        def verdicts(text: str) -> dict[str, Verdict]:
            of_label = {
                "exact": Verdict(None, Status.TIMEOUT) if text == "7" else Verdict(float(text == task.truth)),
                "short": Verdict(None, Status.TIMEOUT) if text == "8" else Verdict(float(len(text) < 2)),
            }
            return {label: of_label[label] for label in task.kind.split()}

        self._judged[index] = [verdicts(text) for text in completions]

    def gather(self) -> dict[int, list[dict[str, Verdict]]]:
        judged, self._judged = self._judged, {}
        return judged

    def close(self) -> None: ...


def sampler(folder: Path, engines: Guesser, seed: int = 0) -> AnswerSampler:
    rollout = RolloutConfig(max_model_len=64, max_num_seqs=10)  # 4 x 10 places, 4 answers: batches of 10 prompts
    handles: Any = (lambda: engines, lambda _: ExactJudge())
    return AnswerSampler(folder, 4, SamplingConfig(max_tokens=8), rollout, seed, *handles)


def asked(**source: Any) -> dict[str, PromptSet]:
    data = PromptData.model_validate({"source": SOURCE | source})
    return {"sums": PromptSet(distinct_prompts(Prompts.load(data, byte_tokenizer())), EXACT)}


def test_repeated_prompts_are_asked_once() -> None:
    prompts = asked()["sums"].prompts
    texts = [prompt.task.prompt for prompt in prompts]
    assert len(set(texts)) == len(texts) < 40


def test_killed_anywhere_it_samples_only_what_is_missing(tmp_path: Path) -> None:
    sources = asked()
    number = len(sources["sums"].prompts)
    whole = Guesser(-1)
    expected = sampler(tmp_path / "whole", whole).answers(sources)
    assert whole.asked == number and [one.prompt for one in expected["sums"]] == sources["sums"].prompts
    kept = 0
    for lives in (3, 10, 14):
        engines = Guesser(lives)
        with pytest.raises(Killed):
            sampler(tmp_path / "killed", engines).answers(sources)
        kept += lives // 10
        assert len(list((tmp_path / "killed").glob("*.jsonl"))) == kept
    last = Guesser(-1)
    assert sampler(tmp_path / "killed", last).answers(sources) == expected
    assert last.asked == number - 10 * kept
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes()
    assert sampler(tmp_path / "killed", Guesser(0)).answers(sources) == expected  # nothing is asked any more
    assert sampler(tmp_path / "other", Guesser(-1), seed=1).answers(sources) != expected


def test_answers_to_other_prompts_are_refused(tmp_path: Path) -> None:
    sampler(tmp_path, Guesser(-1)).answers(asked())
    with pytest.raises(ValueError, match=r"sums-00001\.jsonl'"):
        sampler(tmp_path, Guesser(-1)).answers(asked(seed=4))


def test_what_could_not_be_judged_has_no_score(tmp_path: Path) -> None:
    answers = [answer for one in sampler(tmp_path, Guesser(-1)).answers(asked())["sums"] for answer in one.answers]
    assert all((answer.score is None) == (answer.text == "7") for answer in answers)
    assert {answer.outcome for answer in answers if answer.text == "7"} == {"timeout"}
    unasked = {"free": PromptSet(asked()["sums"].prompts, None)}
    given = sampler(tmp_path, Guesser(-1)).answers(unasked)["free"]
    assert all(answer.score is None and answer.outcome == "" for one in given for answer in one.answers)


def test_filters_are_judged_with_the_reward_and_name_what_does_not_pass(tmp_path: Path) -> None:
    """The answers are 0 to 18. Those of two digits are not short, and on 8 the filter breaks down."""
    prompts = asked()["sums"].prompts
    sets = {
        "sums": PromptSet(prompts, EXACT, [RewardSpec(name="short", gate=1.0)]),
        "free": PromptSet(prompts, None, [RewardSpec(name="short", gate=1.0)]),
    }
    given = sampler(tmp_path, Guesser(-1)).answers(sets)
    for name, of_set in given.items():
        answers = [answer for one in of_set for answer in one.answers]
        flaws = {answer.text: answer.flaw for answer in answers}
        assert len(flaws) > 15
        assert all(
            flaw == ("not judged" if text == "8" else "filter short" if len(text) > 1 else "")
            for text, flaw in flaws.items()
        )
        assert all((answer.score is None) == (name == "free" or answer.text == "7") for answer in answers)
    kept = [answer.text for _, answer in select_answers(given["free"], domain(reward=None, keep=4), seed=0).kept]
    assert kept and all(len(text) == 1 and text != "8" for text in kept)
    selected = select_answers(given["sums"], domain(keep=4, min_score=0.0), seed=0)
    assert selected.dropped["filter short"] and selected.figures()["dropped/filter_short"]


def test_thoughts_are_left_out_before_answers_are_judged(tmp_path: Path) -> None:
    class Thinker(Guesser):
        def generate(self, *arguments: Any) -> Iterator[Group]:
            for group in super().generate(*arguments):
                thinking = [replace(one, text=f"<think>7</think>\n{one.text}") for one in group.completions]
                yield replace(group, completions=thinking)

    prompts = asked()["sums"].prompts
    dropped = sampler(tmp_path / "dropped", Thinker(-1)).answers({"sums": PromptSet(prompts, EXACT, reasoning="drop")})
    assert dropped == sampler(tmp_path / "plain", Guesser(-1)).answers({"sums": PromptSet(prompts, EXACT)})
    kept = sampler(tmp_path / "kept", Thinker(-1)).answers({"sums": PromptSet(prompts, EXACT)})
    assert all(answer.score == 0.0 for one in kept["sums"] for answer in one.answers)


def domain(**settings: Any) -> SampledDomain:
    return SampledDomain.model_validate({"prompts": {"source": SOURCE}, "reward": {"name": "exact"}} | settings)


def answered(*answers: tuple[str, int, bool, float | None], row: str = "f:1") -> AnsweredPrompt:
    return AnsweredPrompt(
        Prompt([1], Task(f"q {row}", "t", row=row)), [Answer(*answer, outcome="") for answer in answers]
    )


def test_the_best_then_the_shortest_is_kept() -> None:
    one = answered(
        ("no", 1, True, 0.0),
        ("long", 9, True, 1.0),
        ("cut", 2, False, 1.0),
        ("short", 3, True, 1.0),
        ("short ", 4, True, 1.0),
        ("lost", 2, True, None),
        (" ", 1, True, 1.0),
    )
    selected = select_answers([one], domain(), seed=0)
    assert [answer.text for _, answer in selected.kept] == ["short"]
    assert selected.dropped == {
        "below min_score": 1,
        "more than keep": 1,
        "did not end": 1,
        "same text": 1,
        "not judged": 1,
        "empty": 1,
    }
    assert selected.solved == 1.0
    two = select_answers([one], domain(keep=2, min_score=0.0), seed=0)
    assert [answer.text for _, answer in two.kept] == ["short", "long"]
    assert select_answers([one], domain(max_tokens=2), seed=0).kept == []
    assert select_answers([one], domain(max_tokens=2), seed=0).solved == 0.0


def test_prompts_that_are_always_right_are_dropped_as_too_easy() -> None:
    """SPCT's rule: of three answers, all right is too easy; all wrong gives nothing; an unjudged one is no success."""
    right, wrong = ("a", 2, True, 1.0), ("b", 2, True, 0.0)
    easy, hard, mixed = answered(right, right, right), answered(wrong, wrong), answered(wrong, right, right, row="f:2")
    doubtful = answered(right, ("c", 2, True, None), row="f:3")
    selected = select_answers([easy, hard, mixed, doubtful], domain(drop_solved=True), seed=0)
    assert [prompt.task.row for prompt, _ in selected.kept] == ["f:2", "f:3"]
    assert selected.dropped["too easy"] == 3 and selected.solved == 0.75
    assert len(select_answers([easy, hard, mixed, doubtful], domain(), seed=0).kept) == 3
    with pytest.raises(ValueError, match="drop_solved"):
        stage(domains={"sums": {"prompts": {"source": SOURCE}, "drop_solved": True}})


def test_without_a_reward_what_ended_is_kept_and_nothing_else() -> None:
    one = answered(("b", 3, True, None), ("a", 2, True, None), ("cut", 1, False, None))
    selected = select_answers([one], domain(reward=None, keep=2), seed=0)
    assert [answer.text for _, answer in selected.kept] == ["a", "b"]


def test_rows_past_the_budget_are_drawn_by_the_seed() -> None:
    many = [answered((f"a{number}", 2, True, 1.0), row=f"f:{number}") for number in range(30)]
    first, again, other = (select_answers(many, domain(max_rows=10), seed=seed) for seed in (0, 0, 1))
    assert first.kept == again.kept != other.kept and len(first.kept) == len(other.kept) == 10
    assert first.dropped == {"more than max_rows": 20} and first.solved == 1.0
    assert {answer.text for _, answer in select_answers(many[::-1], domain(max_rows=10), seed=0).kept} == {
        answer.text for _, answer in first.kept
    }


def stage(**settings: Any) -> SampleConfig:
    return SampleConfig.model_validate(
        {
            "type": "sample",
            "model": {"path": "x"},
            "domains": {
                "sums": {"prompts": {"source": SOURCE, "max_prompt_length": 16}, "reward": {"name": "exact"}, "keep": 4}
            },
            "samples": 4,
            "sampling": {"max_tokens": 8},
            "rollout": {"max_model_len": 64},
        }
        | settings
    )


def test_the_stage_writes_conversations_that_sft_reads(tmp_path: Path) -> None:
    figures = sample.run(stage(held_out=0.3), asked(), sampler(tmp_path / "answers", Guesser(-1)), tmp_path)
    splits = load_from_disk(tmp_path / "data")
    assert figures["kept"] == sum(map(len, splits.values())) > 0 and figures["held_out"] == len(splits["held_out"]) > 0
    dropped = sum(value for name, value in figures.items() if name.startswith("sums/dropped/"))
    assert figures["sums/kept"] + dropped == figures["sums/answers"]
    truths = {prompt.task.prompt: prompt.task.truth for prompt in asked()["sums"].prompts}
    for row in [*splits["train"], *splits["held_out"]]:
        prompt, answer = row["messages"]
        assert answer == {"role": "assistant", "content": truths[prompt["content"]]}
        assert row["domain"] == "sums" and row["score"] == 1.0 and row["source"].startswith("sums/train:")
    source = {"type": "dataset", "paths": [str(tmp_path / "data")]}
    loaded = Conversations.load(ConversationData.model_validate({"source": source}), byte_tokenizer())
    assert len(loaded) == len(splits["train"]) and not loaded.bad_rows.counts


def test_nothing_to_train_on_is_said(tmp_path: Path) -> None:
    prompts = {"source": SOURCE, "max_prompt_length": 16}
    config = stage(domains={"sums": {"prompts": prompts, "reward": {"name": "exact"}, "min_score": 2.0}})
    with pytest.raises(ValueError, match="below_min_score"):
        sample.run(config, asked(), sampler(tmp_path / "answers", Guesser(-1)), tmp_path)
