"""Logical GPUs: Ray allots them without a device, so that actors report where a real cluster would put them.

The handles, their Ray options and the placement groups are the product's; the actors in them start in a moment.
"""

from collections.abc import Iterator

import pytest
import ray

from configs.stages import AnyStage
from pipeline.cluster.actors import Node
from pipeline.cluster.room import quoted_interpreter
from tests.pipeline.cluster.logical import STORE, config, refuse_difference, started, use_light_actors

ONE = [Node("node0", 24, 8, 24, 8)]


@pytest.fixture(scope="module")
def one_node() -> Iterator[None]:
    ray.init(
        num_gpus=8,
        num_cpus=24,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=STORE,
        runtime_env=quoted_interpreter(),
    )
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    use_light_actors(monkeypatch)


@pytest.mark.parametrize(
    "stage",
    [
        config(8, 8),
        config(8, 4, 2),
        config(4, 1, 4),
        config(2, 2, 2, placement="separate"),
        config(4, 2, 2, gpus=2.0),
        config(6, 6, gpus=0.5),
    ],
    ids=["8+8", "8+4xTP2", "4+TP4", "separate", "judges of two", "judges share"],
)
def test_actors_sit_where_the_dry_run_says(one_node: None, stage: AnyStage) -> None:
    refuse_difference(stage, ONE)


def test_no_two_ranks_and_no_two_engines_share_a_device(one_node: None) -> None:
    with started(config(8, 8)) as running:
        reported = running.devices()
        calls = running.rollout._call_all("report")
    for kind in ("rank", "engine"):
        assert len({device for [device] in reported[kind]}) == 8, kind
    assert reported["rank"] == reported["engine"]
    assert all(report["calls"] == ["sleep", "devices", "report"] for report in calls)  # asleep before the ranks
    assert all(report["sharers"] == 8 for report in calls)


def test_a_second_stage_takes_the_devices_that_are_left(one_node: None) -> None:
    with started(config(4, 4)) as first, started(config(4, 4)) as second:
        used = [gpu for running in (first, second) for [(_, gpu)] in running.devices()["rank"]]
    assert sorted(used) == list(range(8))
