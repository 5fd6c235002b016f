"""A checkpoint with a NaN or an infinity is refused by the tensor's name, before anything starts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from configs.stages import AnyStage
from pipeline.weights.finite import refuse_nonfinite
from tests.pipeline.stage_configs import grpo, make_checkpoint, rm, sft, start

E4M3 = torch.float8_e4m3fn
"""It has no infinity."""
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, E4M3]
BAD = [(dtype, value) for dtype in DTYPES for value in (float("nan"), float("inf"), float("-inf"))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_finite_number_of_a_type_passes(dtype: torch.dtype, tmp_path: Path) -> None:
    limits = torch.finfo(dtype)
    numbers = torch.tensor([0.0, -0.0, 1.0, limits.max, limits.min, limits.tiny], dtype=torch.float64).to(dtype)
    save_file({"a": numbers, "empty": torch.empty(0, dtype=dtype), "ids": torch.arange(3)}, tmp_path / "m.safetensors")
    refuse_nonfinite(tmp_path)


@pytest.mark.parametrize(("dtype", "value"), [(d, v) for d, v in BAD if d != E4M3 or v != v], ids=str)
def test_one_that_is_not_finite_is_named(dtype: torch.dtype, value: float, tmp_path: Path) -> None:
    spoiled = torch.zeros(3, 5)
    spoiled[2, 1] = value
    save_file({"before": torch.ones(7), "layer.up": spoiled.to(dtype)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"not finite.*layer\.up"):
        refuse_nonfinite(tmp_path)


def test_integers_and_the_other_shards_are_not_blamed(tmp_path: Path) -> None:
    save_file({"counts": torch.full((4,), -1, dtype=torch.int32)}, tmp_path / "a.safetensors")
    save_file({"fine": torch.ones(4), "bad": torch.tensor([1.0, float("nan")])}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="in 1 tensors: bad"):
        refuse_nonfinite(tmp_path)


@pytest.mark.parametrize("stage", [sft, rm, grpo])
def test_a_stage_is_refused_before_it_claims_its_folder(stage: Callable[[Path], AnyStage], tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "base")
    save_file({"weight": torch.tensor([1.0, float("nan")])}, model / "model.safetensors")
    with pytest.raises(ValueError, match=r"not finite.*weight"):
        start(tmp_path / "run" / "stage", "stage", stage(model))
    assert not (tmp_path / "run").exists()


def test_so_is_one_whose_judge_is_spoiled(tmp_path: Path) -> None:
    policy, judge = make_checkpoint(tmp_path / "base"), make_checkpoint(tmp_path / "judge")
    save_file({"weight": torch.tensor([float("inf")])}, judge / "model.safetensors")
    stage = grpo(policy, rewards=[{"name": "self_judge", "args": {"path": str(judge), "rubric": "{completion}"}}])
    with pytest.raises(ValueError, match=r"judge.*not finite.*weight"):
        start(tmp_path / "run" / "stage", "stage", stage)
