"""An evaluation on a real engine and a real judge: the figures are those that `transformers` gives for the weights."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from configs.data import PromptData
from configs.rewards import RewardPoolConfig, RewardSpec
from configs.sampling import SamplingConfig
from configs.stages import TaskSuite, TextSuite
from pipeline.data.prompts import Prompts
from pipeline.evaluation.suites import run_task_suite, run_text_suite
from pipeline.models.tokenizer import load_tokenizer
from rewards.pool import RewardPool
from rollout.pool import RolloutPool
from tests.rollout import tiny

pytestmark = pytest.mark.engine

MODEL = tiny.llama(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(MODEL, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def rollout(folder: Path) -> Iterator[RolloutPool]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    pool = RolloutPool(folder, tiny.CONFIG, "float32", seed=0)
    yield pool
    pool.close()
    ray.shutdown()


def test_bits_per_byte_is_that_of_transformers(rollout: RolloutPool, folder: Path, tmp_path: Path) -> None:
    text = "The quick brown fox, na\u00efve \u4e2d\u6587.\n" * 3
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    suite = TextSuite(type="text", path=str(tmp_path / "text.txt"), window_tokens=40)
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    windows = [ids[start : start + 40] for start in range(0, len(ids) - 1, 39)]
    nll = -sum(float(tiny.logprobs(MODEL, window).sum()) for window in windows)
    figures = run_text_suite(suite, tokenizer, rollout).figures
    assert figures["bits_per_byte"] == pytest.approx(nll / math.log(2) / len(text.encode()), abs=1e-4)


def test_greedy_figures_are_the_same_again(rollout: RolloutPool, folder: Path, tmp_path: Path) -> None:
    source = {"type": "sums", "size": 6, "split": "held_out"}
    settings = {"type": "task", "prompts": {"source": source}, "reward": {"name": "math"}, "samples": 2, "k": [2]}
    suite = TaskSuite.model_validate(settings)
    prompts = Prompts.load(PromptData.model_validate({"source": source}), load_tokenizer(folder))
    rewards = RewardPool([RewardSpec(name="math")], RewardPoolConfig())
    sampling = SamplingConfig(max_tokens=12)
    first, second, other = (
        run_task_suite(suite, prompts, rollout, rewards, sampling, seed, tmp_path / "sums.jsonl") for seed in (0, 0, 1)
    )
    rewards.close()
    assert first.records == second.records
    assert first.records[:6] == other.records[:6] and first.records[6:] != other.records[6:]
    assert [record.mode for record in first.records] == ["greedy"] * 6 + ["sampled"] * 12
    assert first.figures["unjudged_rate"] == 0.0
    assert first.figures["pass@1_greedy_low"] <= first.figures["pass@1_greedy"] <= first.figures["pass@1_greedy_high"]
