from dataclasses import replace

import pytest

from configs.train import OffloadConfig
from pipeline.planner.architecture import Architecture, architecture_of
from pipeline.planner.memory import (
    RolloutLayout,
    TrainLayout,
    kv_bytes,
    merged,
    rollout_state,
    total,
    train_state,
    train_working,
    update_working,
)

ONE = TrainLayout(1, 1, 1, 1000, False)
TOY = Architecture(
    name="toy", family="deepseek_v3", total=1000, experts=800, embedding=0, mtp=0, num_layers=2, num_moe_layers=2,
    num_experts=8, experts_per_token=2, hidden=4, positions=64, vocab=10, heads=2, layer=90, layer_experts=400, kv=24,
    kv_shards=1, saved=60, saved_lean=40, attention_flops=0, decode_flops=0,
)  # fmt: skip


def held(layout: TrainLayout, *, reference: Architecture | None = None) -> float:
    return total(*train_state(TOY, layout, reference=reference))


def test_a_toy_by_hand() -> None:
    spread = replace(ONE, ranks=4, expert_parallel=4)
    device, host = train_state(TOY, spread, reference=TOY)
    # 200 parameters outside of the experts, 200 of them on each of four ranks; optimizer states of 250 owned.
    assert device == {"weights": 800, "gradients": 1600, "reference": 2000, "moments": 2000, "master weights": 1000}
    assert host == {}
    assert update_working(TOY, spread) == {"float32 gradients": 1000}


def test_what_is_offloaded_by_hand() -> None:
    sharded = replace(ONE, ranks=4, zero_stage=3, moments="bfloat16", offload=OffloadConfig())
    optimizer = {"moments": 1000, "master weights": 1000, "float32 gradients": 1000, "gradients": 1000}
    device, host = train_state(TOY, sharded, reference=TOY)
    assert (device, host) == ({"weights": 500, "reference": 500}, optimizer)
    everything = replace(sharded, offload=OffloadConfig(parameters=True))
    device, host = train_state(TOY, everything, reference=TOY)
    assert (device, host) == ({}, optimizer | {"weights": 500, "reference": 500})
    away = replace(sharded, offload=OffloadConfig(parameters=True, nvme="/nvme"))
    assert train_state(TOY, away, reference=TOY) == ({}, {})
    assert update_working(TOY, sharded) == {}


def test_plain_adamw_keeps_no_master_weights() -> None:
    device, _ = train_state(replace(TOY, dtype="float32"), replace(ONE, zero_stage=0), reference=None)
    assert device == {"weights": 4000, "gradients": 4000, "moments": 8000}


def test_working_memory_by_hand() -> None:
    plain = train_working(TOY, ONE, longest=10, lean=False)
    assert plain == {"activations": 120_000, "backward": 60_000, "logits": 3 * 1000 * 10 * 4}
    again = train_working(TOY, replace(ONE, gradient_checkpointing=True), longest=2000, lean=False)
    assert again["activations"] == 2000 * (4 * 2 + 30) * 2  # the longest sequence is never cut
    whole = train_working(TOY, replace(ONE, ranks=4, zero_stage=3), longest=10, lean=False)
    assert (whole["gathered layers"], whole["buckets"]) == (2000, 4000)  # ZeRO-3 keeps a small model gathered


def test_an_engine_by_hand() -> None:
    engines = RolloutLayout(2, 4, 77.0, 16)
    assert rollout_state(TOY, engines) == {"weights": 500, "KV cache": 77, "logits": 160}
    assert kv_bytes(TOY, engines) == 48  # a latent is whole on every device
    assert kv_bytes(replace(TOY, kv_shards=2), engines) == 24
    in_fp8 = replace(engines, fp8=("weights", "kv_cache"))
    assert rollout_state(TOY, in_fp8)["weights"] == 250
    assert kv_bytes(TOY, in_fp8) == 24


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_more_ranks_hold_less(stage: int) -> None:
    sizes = [held(replace(ONE, ranks=ranks, zero_stage=stage)) for ranks in (1, 2, 4, 8)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]


def test_a_higher_stage_holds_less() -> None:
    sizes = [held(replace(ONE, ranks=8, zero_stage=stage), reference=TOY) for stage in (1, 2, 3)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[1] > sizes[2]


def test_experts_that_are_spread_hold_less() -> None:
    sizes = [held(replace(ONE, ranks=8, expert_parallel=spread)) for spread in (1, 2, 4, 8)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]


@pytest.mark.parametrize(
    ("model", "layout", "measured"),
    [
        ("moe_25m", TrainLayout(1, 1, 1, 1024, False), 764),
        ("moe_25m", TrainLayout(1, 0, 1, 4096, True), 670),
    ],
)
def test_a_measured_peak(model: str, layout: TrainLayout, measured: float) -> None:
    # MiB of a rank above what its imports take, three steps, freed memory given back (docs/planner.md).
    known = architecture_of(model, "float32")
    state, _ = train_state(known, layout, reference=None)
    working = train_working(known, layout, longest=128, lean=True)
    assert total(merged(state, working)) / 2**20 + 80 == pytest.approx(measured, rel=0.15)
