"""Memory of an engine on a device: what it asks for, and that the planner counts the same."""

from pathlib import Path

import pytest

from configs.sampling import RolloutConfig
from pipeline.planner.architecture import architecture_of
from pipeline.planner.devices import DEVICES
from pipeline.planner.memory import RolloutLayout, rollout_state, total
from rollout.memory import GPU_SHARE, RUNTIME_BYTES, USABLE_SHARE, cache_gib, engine_bytes, memory_arguments
from tests.rollout import tiny

GIB = 2**30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.moe(0), tmp_path_factory.mktemp("models") / "moe")


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_owns_what_the_planner_counts(model: Path, size: int, dtype: str) -> None:
    config = RolloutConfig(max_model_len=64, tensor_parallel_size=size, kv_cache_gib=0.5, max_num_seqs=16)
    planned = rollout_state(architecture_of(str(model), dtype), RolloutLayout.of(config))
    own = engine_bytes(model, config, dtype)
    assert own["runtime"] == DEVICES["h100"].runtime
    assert sum(own.values()) - own["runtime"] == pytest.approx(total(planned), rel=1e-3)


def test_a_share_of_the_device_is_what_the_engine_owns(model: Path) -> None:
    """With vLLM's default of 0.92 an engine starts on an empty device alone."""
    config = RolloutConfig(max_model_len=64, kv_cache_gib=8.0)
    arguments = memory_arguments(model, config, "bfloat16", 80 * GIB)
    assert arguments["kv_cache_memory_bytes"] == 8 * GIB
    assert arguments["gpu_memory_utilization"] == pytest.approx(10 / 80, rel=1e-3)  # 8 GiB of cache, 2 of the process


def test_an_automatic_cache_takes_what_a_sleeping_rank_leaves(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RolloutConfig(max_model_len=64, kv_cache_gib="auto")
    alone = memory_arguments(model, config, "bfloat16", 80 * GIB)
    # No size: vLLM measures, and takes the rest of its share for the cache.
    assert alone == {"gpu_memory_utilization": pytest.approx(USABLE_SHARE)}
    monkeypatch.setenv(GPU_SHARE, "0.5")
    shared = memory_arguments(model, config, "bfloat16", 80 * GIB)
    assert shared["gpu_memory_utilization"] == pytest.approx(USABLE_SHARE - RUNTIME_BYTES / (80 * GIB))


def test_what_does_not_fit_is_refused(model: Path) -> None:
    with pytest.raises(ValueError, match=r"needs 82.0 GiB of a device with 73.6 to use \(.*lower rollout.kv_cache_gib"):
        memory_arguments(model, RolloutConfig(max_model_len=64, kv_cache_gib=80.0), "bfloat16", 80 * GIB)
    with pytest.raises(ValueError, match="kv_cache_gib=auto"):
        cache_gib(RolloutConfig(max_model_len=64, kv_cache_gib="auto"))
