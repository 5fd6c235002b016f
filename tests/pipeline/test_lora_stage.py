"""GRPO of adapters as a stage: its reference, its syncs, its exports, and that a stopped one goes on to the bit."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from configs.grpo import GRPOConfig
from pipeline.cluster.room import cluster
from pipeline.models.lora import merged_weight
from pipeline.stages.context import Context
from pipeline.stages.grpo import launch
from pipeline.weights.fresh import create_model
from pipeline.weights.load import load_model
from tests.pipeline.test_reference import config_of
from tests.series import series

pytestmark = [pytest.mark.engine, pytest.mark.ranks]


def adapted(home: Path) -> GRPOConfig:
    return config_of(
        home,
        steps=2,
        lora={"rank": 4},
        objective={"kl_coef": 0.1},
        optimizer={"learning_rate": 2e-2},
        trainer={"threads": 1},
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("lora")
    create_model("tiny", 0, home / "lm")
    with cluster():
        launch(adapted(home), home / "grpo", Context(Path("evaluations")))
        yield home


def test_engines_follow_adapters_and_an_export_holds_both_forms(home: Path) -> None:
    """The second step is sampled with merged weights, which the proof of the sync holds to the trainer's. Its reference
    is the model without adapters: the divergence is that of rounding in the first step, and more in the second."""
    first, second = series(home / "grpo" / "metrics.jsonl")
    assert first["loss/kl_mean"] < 1e-5 and second["loss/kl_mean"] > 1e-4
    for row in (first, second):
        assert 0 < row["sync/gap_mean"] <= row["sync/bound_mean"]
    base, merged = (load_file(folder / "model.safetensors") for folder in (home / "lm", home / "grpo" / "hf"))
    adapters = load_file(home / "grpo" / "hf" / "adapter" / "adapter_model.safetensors")
    assert merged.keys() == base.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    for name in changed:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        expected = merged_weight(base[name], *(adapters[f"{stem}.lora_{part}.weight"] for part in "AB"), 32.0 / 4)
        torch.testing.assert_close(merged[name], expected, rtol=1e-6, atol=1e-7)
    assert len(changed) == len(adapters) / 2
    load_model(home / "grpo" / "hf", "float32")
    config = json.loads((home / "grpo" / "hf" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 32.0, str(home / "lm"))


@pytest.mark.slow
def test_stopped_and_run_again_the_series_is_the_same_to_the_bit(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "grpo"
    shutil.copytree(home / "grpo", folder)
    shutil.rmtree(folder / "hf")
    shutil.rmtree(folder / "checkpoints" / "step-2")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(lines[0])
    launch(adapted(home), folder, Context(Path("evaluations")))
    assert series(folder / "metrics.jsonl", "reward_pool/") == series(home / "grpo" / "metrics.jsonl", "reward_pool/")
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (folder / "hf" / file).read_bytes() == (home / "grpo" / "hf" / file).read_bytes()
