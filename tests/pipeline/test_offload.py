"""What is offloaded, in DeepSpeed's own words, and what can't be."""

from pathlib import Path
from typing import Any

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from configs.train import OffloadConfig, OptimizerConfig, TrainerConfig
from pipeline.train.build import deepspeed_config
from pipeline.train.spec import TrainSpec


def zero_of(**offload: Any) -> DeepSpeedZeroConfig:
    trainer = TrainerConfig(zero_stage=3, offload=OffloadConfig(**offload))
    spec = TrainSpec(Path("model"), "bfloat16", trainer, OptimizerConfig(learning_rate=1e-3), 1)
    return DeepSpeedZeroConfig(**deepspeed_config(spec)["zero_optimization"])


def test_deepspeed_reads_what_is_offloaded_and_where_to() -> None:
    plain = zero_of()
    assert plain.offload_optimizer and plain.offload_optimizer.device == "cpu" and plain.offload_param is None
    away = zero_of(parameters=True, nvme="/local/nvme")
    assert away.offload_param and away.offload_optimizer
    for place in (away.offload_param, away.offload_optimizer):
        assert (place.device, place.nvme_path) == ("nvme", Path("/local/nvme"))


@pytest.mark.parametrize(
    ("stage", "offload", "message"),
    [
        (0, {}, "offload .*zero_stage >= 1"),
        (2, {"parameters": True}, r"offload\.parameters=true .*zero_stage 3"),
        (1, {"nvme": "/nvme"}, r"offload\.nvme='/nvme' .*zero_stage 3"),
    ],
)
def test_what_deepspeed_would_leave_where_it_is_is_refused(stage: Any, offload: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainerConfig(zero_stage=stage, offload=OffloadConfig(**offload))


def test_moments_in_bfloat16_are_not_swapped_to_nvme() -> None:
    optimizer = OptimizerConfig(learning_rate=1e-3, moments="bfloat16")
    trainer = TrainerConfig(zero_stage=3, offload=OffloadConfig(nvme="/nvme"))
    with pytest.raises(ValueError, match=r"optimizer\.moments='bfloat16'.* NVMe"):
        TrainSpec(Path("model"), "bfloat16", trainer, optimizer, 1)
