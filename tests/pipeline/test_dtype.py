"""`dtype: auto` in every stage, and checkpoints in FP8: trained in bfloat16, whatever the machine."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from configs.base import walk
from configs.evaluation import EvalConfig
from configs.model import FirstModelConfig, ModelConfig
from configs.sft import SFTConfig
from configs.stages import AnyStage, Recipe
from configs.train import OptimizerConfig, TrainerConfig
from pipeline.models.fp8 import BLOCK, dequantise, quantise
from pipeline.planner.stage import dtype_of
from pipeline.run.preview_placement import architecture_of
from pipeline.train.spec import TrainSpec
from pipeline.weights.export import export_checkpoint
from pipeline.weights.fill import layers
from pipeline.weights.fused import checkpoint_tensors
from pipeline.weights.load import load_model
from pipeline.weights.resolve import resolve_model, with_dtypes
from tests.pipeline import stage_configs
from tests.pipeline.small_models import small_causal_lm

FP8 = {"dtype": "bfloat16", "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def checkpoint(folder: Path, described: dict) -> Path:
    stage_configs.make_checkpoint(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | described))
    return folder


def evaluation(model: Path) -> EvalConfig:
    settings = stage_configs.gate(model, model).model_dump(include={"suites", "sampling", "rollout"})
    return EvalConfig.model_validate(settings | {"type": "eval", "model": {"path": str(model)}})


STAGES = {
    "sft": stage_configs.sft,
    "rm": stage_configs.rm,
    "grpo": stage_configs.grpo,
    "gate": lambda model: stage_configs.gate(model, model),
    "eval": evaluation,
}


def with_auto(config: AnyStage) -> AnyStage:
    models = {
        name: getattr(config, name).model_copy(update={"dtype": "auto"})
        for name in ("model", "candidate", "parent")
        if hasattr(config, name)
    }
    return config.model_copy(update=models)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize(
    ("described", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),  # as transformers wrote it before version 5
        ({"dtype": "float32"}, "float32"),
        ({"text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ({}, "float32"),
        (FP8, "bfloat16"),
    ],
)
def test_every_stage_takes_the_precision_of_its_checkpoint(
    name: str, described: dict, dtype: str, tmp_path: Path
) -> None:
    config = with_dtypes(with_auto(STAGES[name](checkpoint(tmp_path / "model", described))))
    found = [node.dtype for _, node in walk(config) if isinstance(node, ModelConfig | FirstModelConfig)]
    assert set(found) == {dtype}


def test_a_precision_that_is_not_trained_is_refused(tmp_path: Path) -> None:
    config = with_auto(stage_configs.sft(checkpoint(tmp_path / "model", {"dtype": "float16"})))
    with pytest.raises(ValueError, match=r"dtype=auto.*float16.*set bfloat16"):
        with_dtypes(config)


def test_settings_that_do_not_fit_the_precision_are_refused(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", {"dtype": "bfloat16"})
    config = with_auto(stage_configs.grpo(model, sync={"max_mean_gap": 1e-5}))
    with pytest.raises(ValidationError, match="max_mean_gap=1e-05 is for float32"):
        with_dtypes(config)


def test_a_new_model_is_float32() -> None:
    settings = stage_configs.sft(Path("model")).model_dump()
    config = SFTConfig.model_validate(settings | {"model": {"init_config": "tiny", "dtype": "auto"}})
    assert with_dtypes(config).model.dtype == "float32"


def test_a_rank_and_a_load_take_it_too(tmp_path: Path) -> None:
    model = load_model(small_causal_lm("llama", tmp_path / "model"), "float32").bfloat16()
    model.save_pretrained(tmp_path / "half")
    assert load_model(tmp_path / "half", "auto").dtype == torch.bfloat16
    spec = TrainSpec(tmp_path / "half", "auto", TrainerConfig(), OptimizerConfig(learning_rate=1e-3), 1)
    assert spec.dtype == "bfloat16"


def test_a_plan_follows_the_stages_to_the_first() -> None:
    sft = stage_configs.sft(Path("deepseek-ai/DeepSeek-V3-Base")).model_dump()
    grpo = stage_configs.grpo(Path("stage:first")).model_dump() | {"model": {"path": "stage:first", "dtype": "auto"}}
    for first, expected in (("float32", "float32"), ("bfloat16", "bfloat16"), ("auto", "auto")):
        stages = {"first": sft | {"model": sft["model"] | {"dtype": first}}, "second": grpo}
        recipe = Recipe.model_validate({"name": "two", "stages": stages})
        assert dtype_of(recipe.stages["second"], recipe) == expected
    assert architecture_of("deepseek-ai/DeepSeek-V3-Base", "auto").dtype == "bfloat16"


@pytest.fixture(params=["a CPU", "Hopper"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda as on another machine: `transformers` decides by it whether weights stay in FP8."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param == "Hopper")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


def test_weights_in_fp8_are_trained_and_saved_in_bfloat16(machine: None, tmp_path: Path) -> None:
    """With DeepSeek's 576 rows in five blocks, and scales in another file than their weights."""
    plain = small_causal_lm("deepseek_v3", tmp_path / "plain")
    export_checkpoint(plain, tmp_path / "fp8", "fp8")
    tensors = load_file(tmp_path / "fp8" / "model.safetensors")
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith("_scale_inv")}
    save_file(tensors, tmp_path / "fp8" / "model.safetensors", {"format": "pt"})
    save_file(scales, tmp_path / "fp8" / "a.safetensors", {"format": "pt"})
    config = ModelConfig(path=str(tmp_path / "fp8"), dtype="auto")
    assert resolve_model(config, workdir=tmp_path / "work") == tmp_path / "fp8"
    copy = resolve_model(config, workdir=tmp_path / "work", copy_fp8=True)
    assert resolve_model(config, workdir=tmp_path / "work", copy_fp8=True) == copy  # made once
    model = load_model(copy, "auto")
    expected = {
        name: dequantise(quantise(weight, BLOCK)).bfloat16() if f"{name}_scale_inv" in scales else weight.bfloat16()
        for name, weight in load_file(plain / "model.safetensors").items()
        if not name.endswith("e_score_correction_bias")
    }
    trained = {name: value for layer in layers(model) for name, value in checkpoint_tensors(model, layer).items()}
    assert {name for name in trained if not name.endswith("e_score_correction_bias")} == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(trained[name], weight), name
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == trained.keys()


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_weights_in_fp8_are_read_as_those_of_their_copy(machine: None, family: str, tmp_path: Path) -> None:
    export_checkpoint(small_causal_lm(family, tmp_path / "plain"), tmp_path / "fp8", "fp8")
    model = load_model(tmp_path / "fp8", "auto")
    copy = load_model(export_checkpoint(tmp_path / "fp8", tmp_path / "copy"), "auto")
    assert model.dtype == torch.bfloat16 and not hasattr(model.config, "quantization_config")
    expected = copy.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


def test_other_blocks_are_refused(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "fp8", {"quantization_config": {"quant_method": "fp8", "weight_block_size": [1, 32]}})
    with pytest.raises(ValueError, match=r"weight_block_size=\[1, 32\]"):
        export_checkpoint(model, tmp_path / "out")
