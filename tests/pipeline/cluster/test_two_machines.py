"""The placement on two machines, which one imitates: logical GPUs of two Ray nodes (see test_logical_gpus)."""

from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from configs.stages import AnyStage
from pipeline.cluster.actors import Node
from pipeline.cluster.room import quoted_interpreter
from rollout.actors import EngineLost
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


def test_an_engine_whose_devices_left_with_their_node_starts_the_stage_again(two_nodes: Cluster) -> None:
    """No other device is reserved for it, so a replacement would wait for ever. The last test of its cluster."""
    with started(config(1, 5)) as running:
        [node] = two_nodes.worker_nodes
        number = running.rollout._nodes.index(node.node_id)
        two_nodes.remove_node(node)
        with pytest.raises(EngineLost):
            running.rollout._get(running.rollout._engines[number].node_id.remote(), number, "a call")
        with pytest.raises(EngineLost, match="its devices left the cluster with their node"):
            running.rollout._replace()
