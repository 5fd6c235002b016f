"""A whole GRPO stage with real ranks and engines on two logical GPUs, in the devices that the dry run names.

The devices are logical, so the processes compute on the CPU; Ray options, placement groups and the order of start are
those of a machine with GPUs.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import ray

from configs.load import load_config
from configs.stages import Recipe
from pipeline.cluster import start
from pipeline.cluster.actors import Node
from pipeline.cluster.demand import stage_demand
from pipeline.cluster.room import quoted_interpreter
from pipeline.grpo.fleet import Fleet
from pipeline.run.stage import run_stage
from pipeline.weights.fresh import create_model

pytestmark = [pytest.mark.engine, pytest.mark.ranks]

SMALL = Path(__file__).parents[1] / "small.yaml"


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    ray.init(num_gpus=2, num_cpus=8, include_dashboard=False, log_to_driver=False, runtime_env=quoted_interpreter())
    monkeypatch.setattr(start, "cluster", nullcontext)
    yield
    ray.shutdown()


def _gpu_and_threads(actor: Any) -> tuple[list[int], int]:
    """GPUs and OpenMP threads of an actor's process, asked by Ray within it."""
    import torch

    return [int(gpu) for gpu in ray.get_gpu_ids()], torch.get_num_threads()


def test_a_grpo_stage_runs_where_the_dry_run_places_it(
    two_gpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = create_model("tiny", 0, tmp_path / "tiny")
    overrides = [
        f"stages.grpo.model.path={model}",
        "stages.grpo.steps=1",
        "stages.grpo.trainer={num_ranks: 2, threads: 1, zero_stage: 3}",
        "stages.grpo.rollout.num_engines=2",
        "stages.grpo.rollout.kv_cache_gib=0.2",
    ]
    config = load_config(str(SMALL), overrides, Recipe).config.stages["grpo"]
    seen: dict[str, list[tuple[list[int], int]]] = {}
    steps = Fleet.steps

    def observed(fleet: Fleet) -> Iterator[int]:
        for kind, actors in (("rank", fleet.policy._ranks), ("engine", fleet.rollout._engines)):
            seen[kind] = ray.get([actor.__ray_call__.remote(_gpu_and_threads) for actor in actors], timeout=120)
        yield from steps(fleet)

    monkeypatch.setattr(Fleet, "steps", observed)
    figures = run_stage(config, tmp_path / "grpo")
    assert figures["sync/gap_max"] < 1e-3
    placement = stage_demand(config).place([Node("node0", 8, 2, 8, 2)])
    for kind in ("rank", "engine"):
        planned = [[device for _, device in actor.devices] for actor in placement.actors if actor.kind == kind]
        assert [gpus for gpus, _ in seen[kind]] == planned == [[0], [1]]
        assert [threads for _, threads in seen[kind]] == [1, 1]
