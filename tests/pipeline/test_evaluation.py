"""Figures by hand, and suites on handles that really speak, judge and score."""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from configs.data import PromptData
from configs.evaluation import AnySuite, EvalConfig, RefusalSuite, TaskSuite, TextSuite
from configs.rewards import RewardPoolConfig
from configs.sampling import SamplingConfig
from pipeline.cluster.start import start_rewards
from pipeline.data.prompts import Prompts
from pipeline.evaluation.evaluate import Evaluation, check_suites
from pipeline.evaluation.statistics import bits_per_byte, pass_at_k, wilson_interval
from pipeline.evaluation.suites import Session, SuiteResult, results_table
from pipeline.evaluation.tasks import run_tasks
from pipeline.evaluation.texts import load_text, run_text
from pipeline.models.tokenizer import byte_tokenizer
from rewards.types import Status, Task, Verdict
from rollout.types import Completion, Group, TokenLogprobs


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(4, 1, 1) == pytest.approx(1 / 4)
    assert pass_at_k(4, 1, 2) == pytest.approx(1 - 3 / 6)  # 3 of the 6 pairs have no right one
    assert pass_at_k(5, 2, 3) == pytest.approx(1 - 1 / 10)
    assert pass_at_k(4, 0, 4) == 0.0
    assert pass_at_k(4, 3, 2) == 1.0
    assert pass_at_k(1, 1, 1) == 1.0


def test_pass_at_k_is_the_share_of_all_subsets() -> None:
    for num_correct, k in itertools.product(range(7), range(1, 7)):
        subsets = list(itertools.combinations([1] * num_correct + [0] * (6 - num_correct), k))
        assert pass_at_k(6, num_correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_of_many_samples() -> None:
    # Both binomials have over 1,400 digits. Drawing a tenth misses all ten right ones about 0.9^10 of the time.
    log_missed = math.lgamma(9991) - math.lgamma(8991) - math.lgamma(10001) + math.lgamma(9001)
    assert pass_at_k(10_000, 10, 1000) == pytest.approx(1 - math.exp(log_missed), rel=1e-6)
    assert pass_at_k(10_000, 10, 1000) == pytest.approx(1 - 0.9**10, rel=1e-3)


@pytest.mark.parametrize(("num_samples", "num_correct", "k"), [(0, 0, 1), (4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses(num_samples: int, num_correct: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"num_samples={num_samples}, num_correct={num_correct}, k={k}"):
        pass_at_k(num_samples, num_correct, k)


def test_wilson_interval_by_hand() -> None:
    # p = 0.8, n = 10, z = 1.95996: z^2 = 3.84146; centre (0.8 + 0.192073) / 1.384146 = 0.716740;
    # half 1.95996 sqrt(0.016 + 0.00960365) / 1.384146 = 0.226575.
    assert wilson_interval(8, 10) == pytest.approx((0.490162, 0.943318), abs=2e-6)
    # No passes: the high end is z^2 / (n + z^2).
    assert wilson_interval(0, 10) == (0.0, pytest.approx(3.841459 / 13.841459))
    assert wilson_interval(10, 10) == (pytest.approx(10 / 13.841459), 1.0)
    assert wilson_interval(50, 100, confidence=0.6827) == pytest.approx((0.450249, 0.549751), abs=1e-5)


@pytest.mark.parametrize(("passes", "total", "confidence"), [(0, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0)])
def test_wilson_interval_refuses(passes: int, total: int, confidence: float) -> None:
    with pytest.raises(ValueError, match=f"passes={passes}, total={total}"):
        wilson_interval(passes, total, confidence)


def test_bits_per_byte_by_hand() -> None:
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2.0)
    with pytest.raises(ValueError, match="num_bytes >= 1, got 0"):
        bits_per_byte(0.0, 0)


class Reciter:
    """Answers prompt i with its own list of texts, in turn; groups come back last first. Every byte is as likely."""

    def __init__(self, greedy: list[str], sampled: list[list[str]], finish_reason: str = "stop") -> None:
        self._greedy, self._sampled, self._finish_reason = greedy, sampled, finish_reason
        self.scored: list[list[int]] = []

    def generate(
        self, prompts: list[list[int]], sampling: SamplingConfig, num_completions: int, seed: int
    ) -> Iterator[Group]:
        for index in reversed(range(len(prompts))):
            texts = [self._greedy[index]] if sampling.temperature == 0 else self._sampled[index]
            assert len(texts) == num_completions
            completions = [
                Completion([0] * len(text), [0.0] * len(text), text, self._finish_reason, 0) for text in texts
            ]
            yield Group(index, prompts[index], completions)

    def continuation_logprobs(self, sequences: list[list[int]], starts: list[int]) -> list[TokenLogprobs]:
        assert set(starts) == {1}
        self.scored += sequences
        return [TokenLogprobs([-math.log(256)] * (len(ids) - 1), [1] * (len(ids) - 1)) for ids in sequences]


class ExactJudge:
    """1 for the truth, 0 for anything else, and no verdict on `?`."""

    def __init__(self) -> None:
        self._judged: dict[int, list[dict[str, Verdict]]] = {}

    def submit(self, index: int, task: Task, completions: list[str]) -> None:
        assert task.kind == "exact"
        self._judged[index] = [
            {"exact": Verdict(None, Status.TIMEOUT, "late") if text == "?" else Verdict(float(text == task.truth))}
            for text in completions
        ]

    def gather(self) -> dict[int, list[dict[str, Verdict]]]:
        judged, self._judged = self._judged, {}
        return judged


def load_prompts(size: int) -> tuple[Prompts, list[str]]:
    source = {"type": "sums", "size": size, "digits": 1, "split": "held_out"}
    prompts = Prompts.load(PromptData.model_validate({"source": source}), byte_tokenizer())
    return prompts, [prompts[i].task.truth for i in range(len(prompts))]


def session(rollout: Any, rewards: Any = None) -> Session:
    return Session(rollout, rewards, SamplingConfig(max_tokens=8), seed=0)


def run(rollout: Reciter, prompts: Prompts, **settings: object) -> SuiteResult:
    source = {"type": "sums", "size": 3}
    suite = {"type": "task", "prompts": {"source": source}, "reward": {"name": "exact"}} | settings
    return run_tasks(TaskSuite.model_validate(suite), prompts, session(rollout, ExactJudge()))


def test_figures_of_a_task_suite_by_hand() -> None:
    prompts, (a, b, c) = load_prompts(3)
    rollout = Reciter([a, "no", "?"], [[a, "no", "no", "no"], [b, b, "?", "no"], ["?", "?", "?", "?"]])
    result = run(rollout, prompts, samples=4, k=[2, 4])
    low, high = wilson_interval(1, 2)
    lengths = sum(len(record.completion) for record in result.records)
    assert result.figures == pytest.approx(
        {
            "pass@1_greedy": 1 / 2,  # the third was not judged
            "pass@1_greedy_low": low,
            "pass@1_greedy_high": high,
            "pass@1_sampled": (1 / 4 + 2 / 3) / 2,
            "pass@2": (1 / 2 + 1) / 2,
            "pass@4": 1.0,  # only the first prompt has four judged samples
            "score_mean": (1 / 4 + 2 / 3) / 2,
            "score_mean_greedy": 1 / 2,
            "mean_length": lengths / 15,
            "truncated_rate": 0.0,
            "unjudged_rate": 6 / 15,
        }
    )
    assert c not in [record.completion for record in result.records]


def test_items_are_the_values_behind_a_figure_by_row() -> None:
    prompts, (a, b, _) = load_prompts(3)
    rows = [prompts[i].task.row for i in range(3)]
    result = run(Reciter([a, "?", "no"], [[a, "no"], [b, "?"], ["?", "?"]]), prompts, samples=2, k=[2])
    assert result.items["pass@1_greedy"] == {rows[0]: 1.0, rows[2]: 0.0}
    assert result.items["pass@1_sampled"] == {rows[0]: 0.5, rows[1]: 1.0}
    assert result.items["pass@2"] == {rows[0]: 1.0}
    for figure, items in result.items.items():
        assert result.figures[figure] == pytest.approx(sum(items.values()) / len(items))


def test_records_come_in_the_order_of_the_prompts() -> None:
    prompts, (a, b) = load_prompts(2)
    records = run(Reciter([a, "?"], [["no"], [b]]), prompts).records
    told = [(r.mode, r.index, r.completion, r.score, r.status) for r in records]
    assert told == [
        ("greedy", 0, a, 1.0, "ok"),
        ("greedy", 1, "?", None, "timeout"),
        ("sampled", 0, "no", 0.0, "ok"),
        ("sampled", 1, b, 1.0, "ok"),
    ]
    assert records[1].detail == "late" and records[1].truth == b
    assert records[0].prompt == prompts[0].task.prompt


def test_scores_that_pass_nobody_still_have_a_mean() -> None:
    prompts, (a, b) = load_prompts(2)
    result = run(Reciter([a, b], [[a, "no"], [b, b]]), prompts, samples=2, pass_score=2.0)
    assert result.figures["pass@1_greedy"] == result.figures["pass@1_sampled"] == 0.0
    assert (result.figures["score_mean"], result.figures["score_mean_greedy"]) == (0.75, 1.0)


def test_without_samples_only_greedy_figures() -> None:
    prompts, (a, b) = load_prompts(2)
    figures = run(Reciter([a, b], []), prompts, samples=0).figures
    assert figures["pass@1_greedy"] == figures["score_mean_greedy"] == 1.0
    assert "pass@1_sampled" not in figures and "score_mean" not in figures


def test_nothing_judged_gives_no_rate_rather_than_zero() -> None:
    prompts, _ = load_prompts(2)
    result = run(Reciter(["?", "?"], [["?"], ["?"]], "length"), prompts)
    assert not result.items
    assert result.figures == {"mean_length": 1.0, "truncated_rate": 1.0, "unjudged_rate": 1.0}


def score(tmp_path: Path, text: bytes, tokenizer: PreTrainedTokenizerFast, window: int) -> tuple[SuiteResult, Reciter]:
    (tmp_path / "text.txt").write_bytes(text)
    rollout = Reciter([], [])
    settings = TextSuite(type="text", path=str(tmp_path / "text.txt"), window_tokens=window)
    return run_text(load_text(settings, tokenizer), session(rollout)), rollout


@pytest.mark.parametrize("window", [2, 3, 7, 20, 21, 1000])
def test_every_token_is_scored_once(tmp_path: Path, window: int) -> None:
    text = "na\u00efve \u4e2d\u6587\r\n12345678"
    tokenizer = byte_tokenizer()
    result, rollout = score(tmp_path, text.encode(), tokenizer, window)
    assert result.figures == pytest.approx({"bits_per_byte": 8.0, "nll_mean": math.log(256)})
    items = result.items["bits_per_byte"]
    assert len(items) == len(rollout.scored)  # no two windows have one name
    assert sum(items.values()) / len(items) == pytest.approx(8.0)
    scored = [token for window_ids in rollout.scored for token in window_ids[1:]]
    assert bytes(token - 8 for token in scored) == text.encode()
    assert rollout.scored[0][0] == tokenizer.bos_token_id
    assert all(2 <= len(window_ids) <= window for window_ids in rollout.scored)
    for before, after in itertools.pairwise(rollout.scored):
        assert after[0] == before[-1]


def test_without_a_beginning_token_the_first_is_not_counted(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    result, rollout = score(tmp_path, b"abcde", tokenizer, 3)
    assert [len(window_ids) for window_ids in rollout.scored] == [3, 3]
    assert result.figures["bits_per_byte"] == pytest.approx(8.0)  # 4 tokens over 4 bytes
    with pytest.raises(ValueError, match="a single token"):
        score(tmp_path, b"a", tokenizer, 3)


def test_texts_that_cannot_be_scored_are_refused(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="is empty"):
        score(tmp_path, b"", tokenizer, 8)
    with pytest.raises(ValueError, match="UTF-8"):
        score(tmp_path, b"ab\xff", tokenizer, 8)
    with pytest.raises(ValueError, match="no such file"):
        load_text(TextSuite(type="text", path=str(tmp_path / "none")), tokenizer)


def test_a_tokenizer_that_changes_the_text_is_noticed(tmp_path: Path) -> None:
    backend = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    backend["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="character 2, 'Cd' into 'cd'"):
        score(tmp_path, b"abCd", tokenizer, 8)


def named(settings: dict[str, Any]) -> dict[str, AnySuite]:
    checkpoint = {"model": {"path": "m"}, "sampling": {"max_tokens": 8}, "rollout": {"max_model_len": 64}}
    return dict(EvalConfig.model_validate({"type": "eval", "suites": {"mine": settings}} | checkpoint).suites)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"type": "text", "path": "gone.txt", "window_tokens": 8}, r"suites\.mine\.path: 'gone\.txt'"),
        ({"type": "ifeval", "source": {"type": "file", "paths": ["gone.jsonl"]}}, r"suites\.mine\.source: .* no file"),
        (
            {"type": "lm_eval", "task": "gone.yaml", "window_tokens": 8},
            r"suites\.mine\.task: 'gone\.yaml'",
        ),
        (
            {"type": "lm_eval", "task": "ifeval", "data_files": {"train": "gone.jsonl"}, "window_tokens": 8},
            r"suites\.mine\.data_files\.train: 'gone\.jsonl'",
        ),
        (
            {"type": "task", "prompts": {"source": {"type": "sums", "size": 1}}, "reward": {"name": "maths"}},
            "did you mean 'math'",
        ),
    ],
)
def test_what_is_not_there_is_said_before_anything_starts(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        check_suites(named(settings), RewardPoolConfig())


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"type": "multiple_choice", "source": {}, "form": "mmlu", "max_length": 64}, "max_length=64"),
        (
            {"type": "multiple_choice", "source": {}, "form": "mmlu", "shots": 1},
            "'shots' and 'shots_source'",
        ),
        ({"type": "conversation", "source": {}, "reward": {"name": "r"}, "max_prompt_length": 60}, "= 68 "),
        ({"type": "refusal", "source": {}, "safety": {"name": "r", "weight": 2.0}}, "no effect"),
        ({"type": "lm_eval", "task": "t.yaml", "data_files": {"test": "f"}}, "no effect"),
        ({"type": "human_eval", "source": {}, "samples": 1, "k": [2]}, "samples=1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], problem: str) -> None:
    if "source" in settings:
        settings["source"] = {"type": "sums", "size": 1}
    with pytest.raises(ValueError, match=problem):
        named(settings)


def test_bad_rows_are_told_once_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "a", "kind": "harmful"}, {"prompt": "b", "kind": "?"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"type": "file", "paths": [str(tmp_path / "rows.jsonl")]}
    settings = {"type": "refusal", "source": source}
    few = {"mine": RefusalSuite.model_validate(settings)}
    with pytest.raises(ValueError, match=r"suites\.mine: 1 of 2 rows.*neither harmful"):
        Evaluation.prepare(few, byte_tokenizer(), RewardPoolConfig(), seed=0, start_judges=start_rewards)
    many = {"mine": RefusalSuite.model_validate(settings | {"max_bad_share": 0.5})}
    Evaluation.prepare(many, byte_tokenizer(), RewardPoolConfig(), seed=0, start_judges=start_rewards)
    assert "suites.mine: 1 of 2 rows are bad" in capsys.readouterr().out


def test_results_table_sets_intervals_beside_their_figure() -> None:
    figures = {"pass@1_greedy": 0.5, "pass@1_greedy_low": 0.25, "pass@1_greedy_high": 0.75, "mean_length": 12.0}
    console = Console(width=80)
    with console.capture() as capture:
        console.print(results_table({"sums": SuiteResult(figures)}))
    lines = [line.split() for line in capture.get().splitlines()]
    assert lines[1:] == [["sums", "pass@1_greedy", "0.5", "0.25", "-", "0.75"], ["sums", "mean_length", "12"]]
