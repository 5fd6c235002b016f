"""The models that published configurations give, against the tensors that published checkpoints hold: names, shapes,
dtypes and totals of tests/fixtures/published_tensors.json. No weight is read; 671 billion need no memory."""

import json
import math
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.models.fp8 import BLOCK
from pipeline.models.mtp import Mtp, mtp_as_layers
from pipeline.weights.export import QUANTIZATION, is_quantised
from pipeline.weights.fused import checkpoint_tensors
from pipeline.weights.load import unfilled_model, unfilled_with_mtp
from pipeline.weights.reader import SCALE, CheckpointReader

ROOT = Path(__file__).parents[2]
PUBLISHED: dict[str, Any] = json.loads((ROOT / "tests" / "fixtures" / "published_tensors.json").read_text())
BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1}
MODELS = ("deepseek_v2_lite", pytest.param("deepseek_v2", marks=pytest.mark.slow), "deepseek_v3")


def expanded(pattern: str) -> list[str]:
    """The names that a pattern stands for: `a.0-2.b` is a.0.b, a.1.b, a.2.b."""
    parts = [re.fullmatch(r"(\d+)-(\d+)", part) or part for part in pattern.split(".")]
    numbers = ([part] if isinstance(part, str) else map(str, range(int(part[1]), int(part[2]) + 1)) for part in parts)
    return [".".join(name) for name in product(*numbers)]


def tensors(model: str) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of every tensor of a published checkpoint, by name."""
    return {name: (shape, dtype) for line, shape, dtype in PUBLISHED[model]["tensors"] for name in expanded(line)}


def headers(model: str, folder: Path) -> Path:
    """A checkpoint of a config.json and the header of a safetensors file, which has no values."""
    config = json.loads((ROOT / "configs" / "models" / "published" / f"{model}.json").read_text())
    config |= {"dtype": "bfloat16"} | PUBLISHED[model].get("config", {})
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, (shape, dtype) in tensors(model).items():
        start, end = end, end + math.prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    return folder


@pytest.mark.parametrize("model", MODELS)
def test_the_facts_add_up_to_the_published_totals(model: str) -> None:
    facts, held = PUBLISHED[model], tensors(model)
    sizes = {name: math.prod(shape) for name, (shape, _) in held.items()}
    num_bytes = sum(sizes[name] * BYTES[dtype] for name, (_, dtype) in held.items())
    assert sum(sizes.values()) == facts["num_elements"]
    assert len(held) == facts.get("num_tensors", len(held))
    assert num_bytes == facts.get("tensor_bytes", num_bytes)
    experts = sum(size for name, size in sizes.items() if ".mlp.experts." in name)
    assert experts == facts.get("num_expert_elements", experts)
    if "file_bytes" in facts:  # what is left are the headers: name, dtype, shape and place of each tensor
        assert 100 < (facts["file_bytes"] - num_bytes) / len(held) < 200


@pytest.mark.parametrize("model", MODELS)
def test_a_published_checkpoint_is_read_and_written_under_its_names_and_shapes(model: str, tmp_path: Path) -> None:
    """Loading refuses names and shapes that are missing, left over or different; saving gives them back."""
    folder = headers(model, tmp_path)
    if model == "deepseek_v3":
        meta, layers = unfilled_with_mtp(folder, "auto", 1)
        mtp = Mtp(meta, layers, detached=True)
    else:
        meta, mtp = unfilled_model(folder, "auto"), None
    with mtp_as_layers(mtp, meta):
        written = checkpoint_tensors(meta, dict(meta.state_dict()))
    published = {name: value for name, value in tensors(model).items() if not name.endswith(SCALE)}
    assert {name: list(tensor.shape) for name, tensor in written.items()} == {
        name: shape for name, (shape, _) in published.items()
    }
    in_float32 = {name for name, (_, dtype) in published.items() if dtype == "F32"}
    assert {name for name, tensor in written.items() if tensor.dtype == torch.float32} == in_float32
    assert CheckpointReader(folder).shapes.keys() == published.keys()


def test_fp8_is_exported_as_deepseek_v3_was_published() -> None:
    published = tensors("deepseek_v3")
    quantised = {name for name, (_, dtype) in published.items() if dtype == "F8_E4M3"}
    weights = {name: torch.Size(shape) for name, (shape, _) in published.items() if not name.endswith(SCALE)}
    assert {name for name, shape in weights.items() if is_quantised(name, shape)} == quantised
    blocks = {name + SCALE: [-(-n // side) for n, side in zip(weights[name], BLOCK, strict=True)] for name in quantised}
    assert blocks == {name: shape for name, (shape, _) in published.items() if name.endswith(SCALE)}
    assert PUBLISHED["deepseek_v3"]["config"]["quantization_config"] == QUANTIZATION
