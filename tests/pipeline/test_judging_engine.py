"""A judge on a real engine, from comparisons to a reward: rejection sampling of verdicts, its figures as a judge, and a
group judged by votes that a meta reward model filters."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import load_from_disk

from configs.data import ComparisonData
from configs.evaluation import VerdictSuite
from configs.rewards import RewardPoolConfig
from configs.sample import SampleConfig
from configs.sampling import SamplingConfig
from pipeline.cluster.start import start_rewards
from pipeline.data.chat import ChatFormat
from pipeline.data.comparisons import read_comparisons
from pipeline.data.judging import judging_rows
from pipeline.data.rows import BadRows
from pipeline.evaluation.evaluate import Evaluation
from pipeline.judging.self_judge import SelfJudge
from pipeline.models.tokenizer import byte_tokenizer
from pipeline.preferences import sampling
from pipeline.preferences.split import save_splits
from pipeline.stages import preferences, sample
from pipeline.stages.context import Context
from pipeline.weights.reward_model import new_score_model
from rewards.judging.rubric import Rubric, read_verdict
from rewards.types import Status, Task
from rollout.pool import RolloutPool
from tests.rollout import tiny
from tests.rollout.pools import engine_pool

pytestmark = pytest.mark.engine

JUDGE: dict[str, Any] = {"rubric": "{prompt}{answers}[[?, ?]]", "compare": 2}
DATA: dict[str, Any] = {"form": "ranking", "columns": {"answers": "by_correctness"}}
SUMS: dict[str, Any] = {"type": "sums", "digits": 1}
STEPS, BATCH = 60, 24


def rows_of(size: int, seed: int = 0) -> list[dict[str, Any]]:
    data = ComparisonData.model_validate(DATA | {"source": SUMS | {"size": size, "seed": seed}})
    rubric = Rubric.model_validate(JUDGE)
    return [row for comparison in read_comparisons(data, BadRows()) for row in judging_rows(comparison, rubric, seed)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that has seen verdicts, enough to write one, and too few to be always right."""
    chat = ChatFormat(byte_tokenizer())
    rows = [chat.training_ids(row["messages"]) for row in rows_of(STEPS * BATCH)]
    return tiny.save(tiny.taught(rows, BATCH), tmp_path_factory.mktemp("models") / "judge")


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[RolloutPool]:
    with engine_pool(checkpoint) as pool:
        yield pool


def test_verdicts_that_agree_with_the_truth_are_kept(
    checkpoint: Path, engine: RolloutPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "start_rollout", lambda *_, **__: engine)
    monkeypatch.setattr(engine, "close", lambda: None)  # what a stage does with its own
    save_splits(tmp_path / "prompts", rows_of(40, seed=1), [False] * 40, preferences.JUDGING_FEATURES)
    source = {"type": "dataset", "paths": [str(tmp_path / "prompts")]}
    domain = {"prompts": {"source": source, "max_prompt_length": 96}, "reward": {"name": "verdict"}}
    config = SampleConfig.model_validate(
        {
            "type": "sample",
            "model": {"path": str(checkpoint)},
            "domains": {"sums": domain | {"keep": 3, "drop_solved": True}},
            "samples": 3,
            "sampling": {"max_tokens": 32},
            "rollout": tiny.CONFIG.model_dump(),
        }
    )
    sample.check(config)
    figures = sample.launch(config, tmp_path, Context(Path("evaluations")))
    rows = load_from_disk(tmp_path / "data")["train"]
    assert 0 < figures["sums/kept"] == len(rows) < figures["sums/answers"] and figures["sums/unjudged"] == 0
    assert -1 < figures["sums/score"] < 1 and figures["sums/dropped/below_min_score"] > 0
    for row in rows:
        question, verdict = (message["content"] for message in row["messages"])
        first, second = (int(text) for text in question.partition("=")[0].split("+"))
        totals = [int(part.split("\n")[1].rpartition(";")[2]) for part in question.split("[Answer ")[1:][:1]]
        scores = read_verdict(verdict, 2, Rubric.model_validate(JUDGE))
        assert (scores[0] > scores[1]) == (totals[0] == first + second)


def test_its_figures_as_a_judge(engine: RolloutPool, tmp_path: Path) -> None:
    suite = VerdictSuite.model_validate(
        {"type": "verdicts", "data": DATA | {"source": SUMS | {"size": 16}}, "judge": JUDGE | {"votes": 2}}
    )
    config, settings = RewardPoolConfig(), SamplingConfig(max_tokens=32)
    evaluation = Evaluation.prepare({"sums": suite}, byte_tokenizer(), config, 0, start_rewards)
    [result] = evaluation.run(engine, settings, 0, tmp_path).values()
    assert len(result.records) == 16 * 4 and result.figures["unjudged_rate"] < 0.5
    assert {"agreement", "position_bias", "agreement_sampled", "agreement_voted"} == set(result.items)
    assert 0 < result.figures["agreement_sampled"] < 1 and 0 <= result.figures["calibration_error"] <= 1
    again = evaluation.run(engine, settings, 0, tmp_path)["sums"]
    assert again.figures == result.figures


def test_a_group_is_judged_by_votes_that_a_meta_model_keeps(checkpoint: Path, tmp_path: Path) -> None:
    meta = tiny.save(new_score_model(checkpoint, "float32", seed=0), tmp_path / "meta")
    own: dict[str, Any] = {"max_tokens": 32, "max_length": 160, "kv_cache_gib": 0.125}
    judge = SelfJudge(path=str(checkpoint), votes=4, meta={"path": str(meta)}, keep_votes=2, **JUDGE, **own)  # pyright: ignore
    judge.setup()
    task, answers = Task("3+4=", "7"), ["3+4=7;7", "3+4=8;8", "3+4=6;6<eos>"]
    verdicts = judge.score_list(task, answers)
    assert [verdict.status for verdict in verdicts] == [Status.OK, Status.OK, Status.ABSTAIN]
    assert all(verdict.score in (1.0, 5.5, 10.0) for verdict in verdicts[:2])  # the mean of two scores of 1 or 10
    assert "[[" in verdicts[0].detail
