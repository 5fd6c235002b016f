"""The placement on two machines, which one imitates: logical GPUs of two Ray nodes (see test_logical_gpus)."""

from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from configs.stages import AnyStage
from pipeline.cluster.actors import Node
from pipeline.cluster.room import quoted_interpreter
from pipeline.errors import RankLost
from rewards.pool.workers import _slots
from rewards.types import Placement
from rollout.actors import DataLost, EngineLost
from tests.pipeline.cluster.logical import STORE, config, refuse_difference, started, use_light_actors

TWO = [Node("node0", 12, 4, 12, 4), Node("node1", 12, 4, 12, 4)]


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Cluster]:
    node: dict[str, Any] = {"num_cpus": 12, "num_gpus": 4, "object_store_memory": STORE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False, runtime_env=quoted_interpreter())
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    use_light_actors(monkeypatch)


@pytest.mark.parametrize(
    "stage",
    [config(8, 8), config(8, 2, 4), config(6, 2, 3), config(4, 4, placement="separate"), config(4, 2, 2, gpus=1.0)],
    ids=["8+8", "8+2xTP4", "6+2xTP3", "separate", "judges"],
)
def test_two_machines_are_filled_in_order(two_nodes: None, stage: AnyStage) -> None:
    refuse_difference(stage, TWO)


def test_an_engine_over_two_machines(two_nodes: None) -> None:
    rollout = {"max_model_len": 32, "num_engines": 1, "tensor_parallel_size": 8, "span_nodes": True}
    refuse_difference(config(8, rollout=rollout), TWO)


def test_threads_are_shared_by_the_ranks_of_a_machine(two_nodes: None) -> None:
    with started(config(6, 6)) as running:
        assert running.ranks._all("sharers") == [4, 4, 4, 4, 2, 2]
        assert running.ranks._all("rank") == list(range(6))


def test_reward_workers_without_gpus_take_the_live_nodes_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, gone = ("0" * 56, "1" * 56, "2" * 56)
    alive = {second: True, first: True, gone: False}
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": node, "Alive": alive[node]} for node in alive])
    rules, programs = [Placement("math", "rule", 0, None)], [Placement("code", "sandbox", 0, None)]
    strategies = [slot["scheduling_strategy"] for slot in (*_slots(1, rules, 0), *_slots(3, programs, 1))]
    assert [strategy.node_id for strategy in strategies] == [first, second, first, second]
    assert all(strategy.soft for strategy in strategies)


def test_what_a_lost_node_held_starts_the_stage_again(two_nodes: Cluster) -> None:
    """Data in its object store, and an engine's devices: no others are reserved for it, so a replacement would wait for
    ever. The last test of its cluster."""
    with started(config(5, 5)) as running:
        [node] = two_nodes.worker_nodes
        ranks, engines, places = running.ranks._ranks, running.rollout._engines, running.rollout._nodes
        number = places.index(node.node_id)
        other = next(index for index, place in enumerate(places) if place != node.node_id)  # rank i is with engine i
        running.ranks.refuse_lost_node()
        data = engines[number].call.remote("data")
        ray.wait([data], timeout=60, fetch_local=False)
        two_nodes.remove_node(node)
        with pytest.raises(EngineLost):
            running.rollout._get(engines[number].node_id.remote(), number, "a call")
        with pytest.raises(RankLost, match=f"training rank {number} was lost with its node"):
            running.ranks.refuse_lost_node()
        with pytest.raises(DataLost, match="'hold': what it was to read was lost with the node"):
            running.ranks._get([ranks[other].call.remote("rank", data)], "hold")
        with pytest.raises(DataLost, match=f"engine {other}, 'receive': what it was to read was lost"):
            running.rollout._get(engines[other].call.remote("report", data), other, "'receive'")
        with pytest.raises(EngineLost, match="its devices left the cluster with their node"):
            running.rollout._replace()
