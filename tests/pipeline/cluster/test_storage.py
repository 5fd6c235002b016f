"""A node that doesn't share the run's folder, or lacks an input, is named before anything is launched."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.exceptions import RayTaskError

from pipeline.cluster import storage
from pipeline.cluster.room import quoted_interpreter
from pipeline.cluster.storage import look_from_node, refuse_unshared
from pipeline.disk.files import write_atomic
from tests.pipeline.cluster.logical import STORE


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(storage, "_VISIBLE_SECONDS", 0.0)
    file = tmp_path / ".shared-1"
    write_atomic(file, "1")
    return file


def test_a_node_that_shares_everything_leaves_an_answer(token: Path) -> None:
    assert look_from_node(str(token), "1", "other", [str(token.parent)]) == ""
    assert token.with_name(".shared-1-other").read_text() == "1"


def test_a_node_with_a_folder_of_the_same_name_is_noticed(token: Path) -> None:
    token.write_text("of another storage")
    reason = look_from_node(str(token), "1", "other", [])
    assert f"doesn't share the run's folder '{token.parent}'" in reason and "runs_dir" in reason


def test_a_missing_input_is_named_with_a_remedy(token: Path) -> None:
    model, plugin = token.parent / "model", token.parent / "good.py"
    assert f"has no '{model}'" in look_from_node(str(token), "1", "other", [str(model)])
    assert "--address" in look_from_node(str(token), "1", "other", [str(plugin)])


def test_a_read_only_mount_is_noticed(token: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(storage, "write_atomic", refuse)
    assert "can't write to the run's folder" in look_from_node(str(token), "1", "other", [])


def test_a_node_without_the_installation_is_told_from_one_that_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray 2.60.0 (_private/function_manager.py) has this message for a function that a worker can't import."""

    def fail(*_: Any, **__: Any) -> None:
        trace = "Traceback (most recent call last):\n  ...\nModuleNotFoundError: No module named 'pipeline'\n"
        raise RayTaskError("look_from_node", f"RuntimeError: The remote function failed to import:\n\n{trace}", "")

    monkeypatch.setattr(ray, "get", fail)
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": "1", "Alive": True}, {"NodeID": "2", "Alive": False}])
    answer = storage._answer(None, "1", "beta")
    assert answer == (
        "runs none of our tasks (ModuleNotFoundError: No module named 'pipeline'); install alignyard there, in the "
        "version of the other nodes"
    )
    assert storage._answer(None, "2", "beta") is None


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[None]:
    node: dict[str, Any] = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False, runtime_env=quoted_interpreter())
    yield
    ray.shutdown()
    cluster.shutdown()


def test_nodes_that_share_are_accepted_and_leave_nothing(two_nodes: None, tmp_path: Path) -> None:
    refuse_unshared(tmp_path, [tmp_path])
    assert not list(tmp_path.iterdir())


def test_the_other_node_is_named(two_nodes: None, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^node {os.uname().nodename} has no '{tmp_path}/gone'"):
        refuse_unshared(tmp_path, [tmp_path / "gone"])
    assert not list(tmp_path.iterdir())
