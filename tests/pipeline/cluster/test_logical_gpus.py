"""Logical GPUs: Ray allots them without a device, so that actors report where a real cluster would put them.

The handles, their Ray options and the placement groups are the product's; the actors in them start in a moment.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import yaml

from configs.stages import AnyStage
from jobs.cli import main
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
        reports, ranks_started = running.rollout._call_all("report"), running.ranks._all("started")
    for kind in ("rank", "engine"):
        assert len({device for [device] in reported[kind]}) == 8, kind
    assert reported["rank"] == reported["engine"]
    assert all(report["calls"] == ["to", "devices", "report"] and report["sharers"] == 8 for report in reports)
    # vLLM starts only where its share of the memory is free, so the last engine sleeps before the first rank starts.
    assert max(report["asleep"] for report in reports) < min(ranks_started)


def test_a_second_stage_takes_the_devices_that_are_left(one_node: None) -> None:
    with started(config(4, 4)) as first, started(config(4, 4)) as second:
        used = [gpu for running in (first, second) for [(_, gpu)] in running.devices()["rank"]]
    assert sorted(used) == list(range(8))


def test_the_file_of_a_dry_run_says_where_a_run_sits(one_node: None, tmp_path: Path) -> None:
    stage, file, written = config(4, 2, 2, gpus=1.0), tmp_path / "recipe.yaml", tmp_path / "placement.json"
    settings = stage.model_dump(mode="json", exclude_unset=True)
    file.write_text(yaml.safe_dump({"name": "small", "runs_dir": str(tmp_path), "stages": {"reason": settings}}))
    assert main(["run", str(file), "--dry-run", "--cluster", "1x8xH100", "--json", str(written)]) == 0
    with started(stage) as running:
        reported = running.devices()
    actors = json.loads(written.read_text())["stages"]["reason"]["actors"]
    for kind, devices in reported.items():
        planned = [[gpu for _, gpu in actor["devices"]] for actor in actors if actor["kind"] == kind]
        assert sorted([gpu for _, gpu in own] for own in devices) == planned, kind
