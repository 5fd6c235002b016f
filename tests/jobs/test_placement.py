"""`alignyard run RECIPE --dry-run --cluster`: the shipped recipes on clusters that need not exist."""

import json
from pathlib import Path
from typing import Any

import pytest

from configs.load import load_config
from configs.stages import Recipe
from jobs.cli import main
from pipeline.planner.devices import cluster_of
from pipeline.run.preview_placement import machines_of, preview_placement


def test_every_actor_is_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "placement.json"
    line = ["run", "deepseek_v2_lite", f"runs_dir={tmp_path}", "--dry-run", "--cluster", "1x8xH100"]
    assert main([*line, "--json", str(file)]) == 0
    stages: dict[str, Any] = json.loads(file.read_text())["stages"]
    actors = stages["grpo_preference"]["actors"]
    assert [(actor["kind"], actor["index"], actor["devices"]) for actor in actors if not actor["suite"]] == [
        *(("rank", i, [["node0", i]]) for i in range(4)),
        *(("engine", i, [["node0", i]]) for i in range(4)),
        ("judge", 0, [["node0", 4]]),
        ("judge", 0, [["node0", 5]]),
    ]
    judges = [("helpful", ""), ("safety", ""), ("helpful", "helpful"), ("safety", "safety")]
    assert [(actor["label"], actor["suite"]) for actor in actors[8:]] == judges
    assert all(set(actor["bytes"]) == {"train", "sync", "generate"} for actor in actors)
    assert all(actor["bytes"]["sync"] > 2**30 for actor in actors)
    printed = capsys.readouterr().out
    assert "node0:3" in printed and "rank 3 (0.5)" in printed


def test_what_cannot_be_placed_names_the_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "placement.json"
    line = ["run", "deepseek_v2_lite", f"runs_dir={tmp_path}", "--dry-run", "--cluster", "1x4xH100"]
    assert main([*line, "--json", str(file)]) != 0
    refused = json.loads(file.read_text())["stages"]["grpo_reasoning"]
    assert refused["actors"] == []
    assert "lower trainer.num_ranks or rollout.num_engines or reward_pool.workers.reasoning" in refused["refused"]
    assert main([*line[:-2], "--json", str(file)]) != 0  # a file without a cluster has nothing to hold
    assert "--cluster" in capsys.readouterr().err


def test_a_device_that_would_be_too_full_is_refused() -> None:
    recipe = load_config("deepseek_v2_lite", ["stages.grpo_reasoning.rollout.kv_cache_gib=60"], Recipe).config
    preview = preview_placement(recipe.stages["grpo_reasoning"], recipe, cluster_of("8xH100"))
    assert preview.placement is None and "generate: device 0 of node0 would hold" in preview.refused
    assert "lower rollout.kv_cache_gib" in preview.refused


def test_an_automatic_cache_fills_the_device() -> None:
    recipe = load_config("deepseek_v2_lite", ["stages.grpo_reasoning.rollout.kv_cache_gib=auto"], Recipe).config
    cluster = cluster_of("8xH100")
    preview = preview_placement(recipe.stages["grpo_reasoning"], recipe, cluster)
    assert preview.placement is not None, preview.refused
    rank, engine = preview.placement.of("rank")[0], preview.placement.of("engine")[0]
    used = rank.bytes["generate"] + engine.bytes["generate"]
    assert used == pytest.approx(0.92 * cluster.device.memory)


@pytest.mark.parametrize(
    ("text", "sizes"), [("1x8xH100", [8]), ("2x4xA100", [4, 4]), ("12xH100", [8, 4]), ("1xcpu", [0]), ("4xH100", [4])]
)
def test_machines_of_a_cluster(text: str, sizes: list[int]) -> None:
    assert [node.gpus for node in machines_of(cluster_of(text))] == sizes
