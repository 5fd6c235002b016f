"""Checkpoints exported in another precision: files, index, sums, and what `transformers` reads of them."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from jobs.cli import main
from pipeline.models.fp8 import BLOCK, dequantise, quantise
from pipeline.weights import shards
from pipeline.weights.export import export_checkpoint
from pipeline.weights.fresh import create_model
from pipeline.weights.reader import CheckpointReader

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3 in float32 with a module for multi-token prediction."""
    architecture = json.loads((Path(__file__).parents[2] / "configs" / "models" / "tiny.json").read_text())
    file = tmp_path_factory.mktemp("export") / "architecture.json"
    file.write_text(json.dumps(architecture | {"num_nextn_predict_layers": 1}))
    return create_model(str(file), 0, file.parent / "hf")


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def test_bf16_rounds_what_transformers_rounds_and_fp32_brings_it_back(tiny: Path, tmp_path: Path) -> None:
    plain = stored(tiny)
    rounded = stored(export_checkpoint(tiny, tmp_path / "bf16", "bf16"))
    expected = {name: value if name.endswith("correction_bias") else value.bfloat16() for name, value in plain.items()}
    assert any(name.endswith(".eh_proj.weight") for name in plain)  # the module for multi-token prediction
    assert rounded.keys() == expected.keys() and rounded[BIAS].dtype == torch.float32
    assert all(value.dtype == rounded[name].dtype for name, value in expected.items())
    assert all(torch.equal(value, rounded[name]) for name, value in expected.items())
    again = stored(export_checkpoint(tmp_path / "bf16", tmp_path / "fp32", "fp32"))
    assert all(torch.equal(again[name], value.float()) for name, value in rounded.items())
    for folder, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype="auto")
        assert model.dtype == dtype
        assert torch.equal(model.lm_head.weight, rounded["lm_head.weight"].to(dtype))


def test_fp8_is_read_back_as_its_blocks(tiny: Path, tmp_path: Path) -> None:
    reader, plain = CheckpointReader(export_checkpoint(tiny, tmp_path / "fp8", "fp8")), stored(tiny)
    again = stored(export_checkpoint(tmp_path / "fp8", tmp_path / "bf16"))
    assert reader.shapes.keys() == plain.keys() == again.keys()
    for name, value in plain.items():
        in_blocks = "_proj" in name and "eh_proj" not in name
        assert torch.equal(reader.read(name), dequantise(quantise(value, BLOCK)).bfloat16() if in_blocks else value)
        assert torch.equal(reader.read(name), again[name])
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_export_has_an_index_and_sums_that_find_a_flipped_bit(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 1_000_000)
    stage, out = tmp_path / "stage", tmp_path / "out"
    shutil.copytree(tiny, stage / "hf")
    assert main(["export", str(stage), str(out), "--dtype", "bf16"]) == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == stored(out).keys() == stored(tiny).keys()
    assert {line.split()[1] for line in (out / "SHA256SUMS").read_text().splitlines()} == {
        file.name for file in out.iterdir() if file.name != "SHA256SUMS"
    }
    check = ["sha256sum", "-c", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=out).returncode == 0
    file = sorted(out.glob("*.safetensors"))[1]
    content = bytearray(file.read_bytes())
    content[-9] ^= 4
    file.write_bytes(content)
    found = subprocess.run(check, cwd=out, capture_output=True, text=True)
    assert found.returncode == 1 and found.stdout.strip() == f"{file.name}: FAILED"


def test_an_export_that_fails_leaves_what_was_there(tiny: Path, tmp_path: Path) -> None:
    broken, out = tmp_path / "broken", export_checkpoint(tiny, tmp_path / "out", "bf16")
    shutil.copytree(tiny, broken)
    file, before = broken / "model.safetensors", stored(out)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(Exception, match=r"(?i)incomplete|range|buffer|length"):
        export_checkpoint(broken, out, "bf16")
    assert stored(out).keys() == before.keys() and {path.name for path in tmp_path.iterdir()} == {"broken", "out"}


def test_what_cannot_be_exported_is_named(tiny: Path, tmp_path: Path) -> None:
    fp8 = export_checkpoint(tiny, tmp_path / "fp8", "fp8")
    with pytest.raises(ValueError, match="quantised already"):
        export_checkpoint(fp8, tmp_path / "again", "fp8")
    with pytest.raises(ValueError, match="no checkpoint"):
        export_checkpoint(tmp_path, tmp_path / "again")
    with pytest.raises(ValueError, match="itself"):
        export_checkpoint(fp8, fp8)
