"""Small stages that are started on logical GPUs as a run starts them, with actors that report their devices."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import ray

from configs.stages import STAGES, AnyStage
from pipeline.cluster import start
from pipeline.cluster.actors import Node
from pipeline.cluster.demand import stage_demand
from pipeline.cluster.placement import DeviceKey, StagePlacement
from pipeline.cluster.room import nodes, wait_for_resources
from pipeline.train.spec import TrainSpec
from pipeline.train.worker import TrainingRanks
from rewards.pool.workers import RewardPool
from rewards.types import Placement
from rollout.pool import RolloutPool
from tests.pipeline.cluster.light_actors import Devices, LightEngine, LightJudge, LightRank

MODEL = Path("no-model")
STORE = 80 * 2**20
"""Bytes of a test cluster's object store."""


def use_light_actors(patch: pytest.MonkeyPatch) -> None:
    """Let the product's handles start actors that only report, on the cluster of the test."""
    patch.setattr("rollout.actors.EngineActors.actor", LightEngine)
    patch.setattr("pipeline.train.worker.TrainingRanks.actor", LightRank)
    patch.setattr("rewards.pool.workers.RewardWorker", LightJudge)
    patch.setattr(start, "cluster", nullcontext)


def config(ranks: int = 4, engines: int = 4, size: int = 1, gpus: float | None = None, **settings: Any) -> AnyStage:
    judge = {"name": "reward_model", "label": "fair", "args": {"path": "judge", "gpus": gpus}}
    return STAGES["grpo"].model_validate(
        {
            "type": "grpo",
            "model": {"path": "base"},
            "prompts": {"source": {"type": "sums", "size": 10}, "max_prompt_length": 16},
            "rewards": [{"name": "math"}, *([] if gpus is None else [judge])],
            "reward_pool": {} if gpus is None else {"workers": {"fair": 2}},
            "steps": 2,
            "prompts_per_step": 8 * ranks,
            "group_size": 2,
            "sampling": {"max_tokens": 8},
            "optimizer": {"learning_rate": 1e-3},
            "trainer": {"num_ranks": ranks, "zero_stage": 3},
            "rollout": {"max_model_len": 32, "num_engines": engines, "tensor_parallel_size": size},
        }
        | settings
    )


class Running:
    """The handles of a started stage, which report their actors' devices."""

    def __init__(self, ranks: TrainingRanks, rollout: RolloutPool, rewards: RewardPool) -> None:
        self.ranks, self.rollout, self.rewards = ranks, rollout, rewards

    def devices(self) -> dict[str, list[Devices]]:
        workers = [worker for group in self.rewards._worker_groups.values() for worker in group._workers]
        return {
            "rank": self.ranks._all("devices"),
            "engine": self.rollout._call_all("devices"),
            "judge": ray.get([worker.devices.remote() for worker in workers], timeout=60),
        }


@contextmanager
def started(stage: AnyStage) -> Iterator[Running]:
    """Start a stage as `pipeline.run.stage` does."""
    spec = TrainSpec(MODEL, "float32", stage.trainer, stage.optimizer, 1)  # pyright: ignore
    rewards = [spec for spec in stage.rewards if spec.label == "fair"]  # pyright: ignore
    where = {"fair": Placement("fair", "model", rewards[0].args["gpus"], None)} if rewards else {}
    with (
        start.cluster_when_needed(lambda: wait_for_resources(stage, None, print)),
        start.start_all(
            lambda: start.start_rollout(MODEL, stage.rollout, dtype="float32", seed=0),  # pyright: ignore
            lambda: start.start_ranks(spec),
            lambda: start.start_rewards(rewards, stage.reward_pool, where),  # pyright: ignore
        ) as (rollout, ranks, pool),
    ):
        yield Running(ranks, rollout, pool)


def dry(stage: AnyStage, machines: list[Node]) -> StagePlacement:
    """The placement as a dry run computes it, on machines of the same size that nobody uses."""
    return stage_demand(stage).place(machines)


def by_kind(placement: StagePlacement, kind: Any, names: list[str]) -> list[list[DeviceKey]]:
    """Devices as (number of the machine, device)."""
    return [
        [(names.index(node), device) for node, device in actor.devices]  # pyright: ignore
        for actor in placement.actors
        if actor.kind == kind
    ]


def as_numbers(reported: list[Devices], names: list[str]) -> list[list[tuple[int, int]]]:
    return [[(names.index(node), gpu) for node, gpu in devices] for devices in reported]


def refuse_difference(stage: AnyStage, machines: list[Node]) -> None:
    """Start the stage, and compare what its actors report with the dry run on equal machines."""
    placement, dry_names = dry(stage, machines), [machine.key for machine in machines]
    real_names = [node.key for node in nodes()]
    with started(stage) as running:
        reported = running.devices()
    for kind, devices in reported.items():
        expected = by_kind(placement, kind, dry_names)
        if kind == "judge":  # whichever worker of a label has them
            assert sorted(as_numbers(devices, real_names)) == sorted(expected)
        else:
            assert as_numbers(devices, real_names) == expected, kind
