"""A step's peak of memory, as a rank measures it and as the planner predicts it."""

import json
from pathlib import Path

import pytest
import torch

from configs.grpo import GRPOConfig
from configs.load import load_config
from configs.sft import SFTConfig
from configs.stages import Recipe
from pipeline.data.trees import Tree, micro_batch
from pipeline.planner.devices import DEVICES
from pipeline.planner.layout import predicted_peak
from pipeline.planner.stage import planned_stage
from pipeline.train import memory
from pipeline.train.memory import StepMemory
from pipeline.train.spec import LONGEST, PEAK
from pipeline.weights.fresh import create_model
from tests.pipeline import memory_ranks
from tests.pipeline.rank_processes import run_ranks

CPU = torch.device("cpu")
ROW = micro_batch([Tree([1, 2, 3], root_mask=[0, 1, 1])])


def predicted_gib(tokens: int, **settings: object) -> float | None:
    """The prediction for a stage that trains the model of `memory_ranks`."""
    recipe = load_config("demo", [], Recipe).config
    [config] = [stage for stage in recipe.stages.values() if isinstance(stage, SFTConfig)]
    trainer = config.trainer.model_copy(update={"num_ranks": 1, "zero_stage": 1})
    config = config.model_copy(update={"trainer": trainer} | settings)
    stage = planned_stage(config, recipe, mean_share=0.5, model_config="tiny")
    peak = predicted_peak(stage, DEVICES["cpu"], tokens)
    return None if peak is None else peak / 2**30


@pytest.mark.ranks
def test_what_is_measured_is_near_what_is_predicted(tmp_path: Path) -> None:
    model = create_model("tiny", 0, tmp_path / "tiny")
    run_ranks(memory_ranks.main, 1, tmp_path, model, tmp_path / "figures.json")
    short, long, again = json.loads((tmp_path / "figures.json").read_text())
    assert (short[LONGEST], long[LONGEST], again[LONGEST]) == (128, 4096, 128)
    peaks = [predicted_gib(int(figures[LONGEST])) for figures in (short, long)]
    assert peaks[0] is not None and peaks[1] is not None and peaks[1] > 3 * peaks[0]
    for figures, peak in zip((short, long), peaks, strict=True):
        assert 0.6 < (peak or 0) / figures[PEAK] < 1.4  # this libc may keep what was freed, or give it back


def test_each_step_has_a_peak_of_its_own() -> None:
    steps = StepMemory(CPU)

    def peak_mib(mib: int) -> float:
        steps.begin([ROW])
        torch.ones(mib, 2**18)  # so large that the C library gives it back
        return steps.figures()[PEAK] * 1024

    large, small = peak_mib(512), peak_mib(1)
    assert large > 500 and small < large - 400


def test_the_longest_micro_batch_of_all_parts_of_a_step_counts() -> None:
    steps = StepMemory(CPU)
    longer = micro_batch([Tree([1] * 9, root_mask=[1] * 9)])
    for batch in ([ROW, longer], [ROW]):
        steps.begin(batch)
    assert steps.figures()[LONGEST] == 9
    steps.begin([ROW])
    assert steps.figures()[LONGEST] == 3


def test_no_prediction_is_made_of_fp8_and_multi_token_prediction() -> None:
    recipe = load_config("demo", [], Recipe).config
    for stage in recipe.stages.values():
        if isinstance(stage, SFTConfig | GRPOConfig):
            mtp = {"mtp": {"weight": 0.1}} if isinstance(stage, SFTConfig) else {"mtp_weight": 0.1}
            for other in (mtp, {"trainer": stage.trainer.model_copy(update={"fp8": True})}):
                unknown = planned_stage(stage.model_copy(update=other), recipe, mean_share=0.5)
                assert predicted_peak(unknown, DEVICES["cpu"], 100) is None
            assert predicted_peak(planned_stage(stage, recipe, mean_share=0.5), DEVICES["cpu"], 100)


def test_where_the_kernel_can_not_tell_the_peak_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CLEAR_REFS", tmp_path / "clear_refs")
    unmeasured = StepMemory(CPU)
    unmeasured.begin([])
    assert unmeasured.figures() == {}
