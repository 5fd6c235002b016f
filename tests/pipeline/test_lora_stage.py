"""Stages that train adapters: their reference, syncs and exports, and that a stopped one goes on to the bit."""

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
from pipeline.stages import sft
from pipeline.stages.context import Context
from pipeline.stages.grpo import launch
from pipeline.weights.fresh import create_model
from pipeline.weights.load import load_model
from tests.pipeline import stage_configs
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
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A language model, in a cluster that lives as long as the tests."""
    folder = tmp_path_factory.mktemp("lora")
    with cluster():
        yield create_model("tiny", 0, folder / "lm")


@pytest.fixture(scope="module")
def home(model: Path) -> Path:
    """The folder of the language model, and in `grpo` the stage."""
    launch(adapted(model.parent), model.parent / "grpo", Context(Path("evaluations")))
    return model.parent


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


@pytest.mark.slow
def test_adapters_of_one_stage_are_the_start_of_another(model: Path, tmp_path: Path) -> None:
    """The model with the adapters of the first stage, and the model into which they are merged, are one: the first loss
    is the same to the bit."""
    changes = {"trainer": {"threads": 1}, "optimizer": {"learning_rate": 2e-2}, "steps": 3, "lora": {"rank": 4}}
    first = stage_configs.sft(model, **changes)
    started = {"rank": 4, "start": str(tmp_path / "first" / "hf")}
    configs = {
        "first": first,
        "started": stage_configs.sft(model, **changes | {"lora": started}),
        "merged": stage_configs.sft(tmp_path / "first" / "hf", **changes),
    }
    losses: dict[str, float] = {}
    for name, config in configs.items():
        sft.check(config)
        sft.launch(config, tmp_path / name, Context(Path("evaluations")))
        losses[name] = series(tmp_path / name / "metrics.jsonl")[0]["loss/total"]
    assert losses["started"] == losses["merged"] != losses["first"]
