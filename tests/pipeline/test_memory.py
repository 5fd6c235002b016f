"""A step's peak of memory, as it is measured and as the planner predicts it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config

from configs.reward_model import PairwiseLoss
from configs.sft import MtpConfig
from configs.train import OptimizerConfig, TrainerConfig
from pipeline.data.trees import Tree, micro_batch
from pipeline.train import memory
from pipeline.train.memory import PREDICTED, StepMemory
from pipeline.train.spec import PEAK, TrainSpec
from pipeline.weights.fresh import create_model
from tests.pipeline import memory_ranks
from tests.pipeline.rank_processes import run_ranks
from tests.pipeline.small_models import small_causal_lm

CPU = torch.device("cpu")


def unplanned(folder: Path) -> TrainSpec:
    """What the planner makes no prediction of, so that no model has to be there."""
    return TrainSpec(folder, "float32", TrainerConfig(fp8=True), OptimizerConfig(learning_rate=1e-3), 1)


@pytest.mark.ranks
def test_what_is_measured_is_near_what_is_predicted(tmp_path: Path) -> None:
    model = create_model("tiny", 0, tmp_path / "tiny")
    run_ranks(memory_ranks.main, 1, tmp_path, model, tmp_path / "figures.json")
    short, long, again = json.loads((tmp_path / "figures.json").read_text())
    assert long[PREDICTED] > 3 * short[PREDICTED] == 3 * again[PREDICTED]
    for figures in (short, long):
        assert 0.6 < figures[PREDICTED] / figures[PEAK] < 1.4  # this libc may keep what was freed, or give it back


def test_each_step_has_a_peak_of_its_own(tmp_path: Path) -> None:
    steps = StepMemory(unplanned(tmp_path), CPU)
    row = micro_batch([Tree([1, 2, 3], root_mask=[0, 1, 1])])

    def peak_mib(mib: int) -> float:
        steps.begin([row])
        torch.ones(mib, 2**18)  # so large that the C library gives it back
        return steps.figures()[PEAK] * 1024

    large, small = peak_mib(512), peak_mib(1)
    assert large > 500 and small < large - 400


def test_no_prediction_is_made_of_what_the_planner_does_not_plan(tmp_path: Path) -> None:
    spec = TrainSpec(
        small_causal_lm("qwen3", tmp_path / "lm"), "float32", TrainerConfig(), OptimizerConfig(learning_rate=1e-3), 1
    )
    known = StepMemory(spec, CPU).figures()
    assert known.keys() == {PEAK, PREDICTED}
    judge = StepMemory(replace(spec, objective=PairwiseLoss(type="pairwise")), CPU).figures()
    assert 0 < judge[PREDICTED] < known[PREDICTED]  # its head is of one number
    GPT2Config().save_pretrained(tmp_path / "other")
    for other in (
        replace(spec, mtp=MtpConfig()),
        replace(spec, trainer=TrainerConfig(fp8=True)),
        replace(spec, model=tmp_path / "other"),
    ):
        assert StepMemory(other, CPU).figures().keys() == {PEAK}


def test_where_the_kernel_can_not_tell_the_peak_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "RESET", tmp_path / "clear_refs")
    unmeasured = StepMemory(unplanned(tmp_path), CPU)
    unmeasured.begin([])
    assert unmeasured.figures() == {}
