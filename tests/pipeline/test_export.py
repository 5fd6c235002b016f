"""Checkpoints exported in another precision: files, index, sums, and what `transformers` reads of them."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from jobs.cli import main
from pipeline.disk.checksums import write_checksums
from pipeline.models.fp8 import BLOCK, dequantise, quantise
from pipeline.models.mtp import Mtp, mtp_as_layers
from pipeline.weights import shards
from pipeline.weights.export import export_checkpoint, export_state
from pipeline.weights.fill import fill
from pipeline.weights.fresh import create_model
from pipeline.weights.load import unfilled_with_mtp
from pipeline.weights.pieces import BUFFER, WEIGHT, PieceWriter
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


@pytest.fixture
def state(tiny: Path, tmp_path: Path) -> Path:
    """A training state of two ranks, who hold the halves of each weight, of a stage that started from the model."""
    model, modules = unfilled_with_mtp(tiny, "float32", 1)
    mtp = Mtp(model, modules, detached=True)
    with mtp_as_layers(mtp, model):
        fill(model, CheckpointReader(tiny), torch.device("cpu"))
    folder = tmp_path / "stage" / "checkpoints" / "step-2"
    folder.mkdir(parents=True)
    named = nn.ModuleDict({"causal_lm": model, "mtp": mtp}).state_dict(keep_vars=True)
    held = {id(tensor): (name, tensor) for name, tensor in reversed(named.items())}
    sums: dict[str, str] = {}
    for rank in (0, 1):
        pieces = PieceWriter()
        for name, tensor in held.values():
            half, flat = (tensor.numel() + 1) // 2, tensor.detach().flatten()
            kind, start, end = (WEIGHT, rank * half, half + rank * half) if tensor.requires_grad else (BUFFER, 0, 10**9)
            if rank == 0 or kind == WEIGHT:
                pieces.add(name, tuple(tensor.shape), start, {kind: flat[start:end]})
        sums |= pieces.write(folder, rank, {"step": 2, "ranks": 2})
    write_checksums(folder, sums)
    lineage = {"models": {"model": {"folder": os.path.relpath(tiny, tmp_path / "stage")}}, "config": {"model": {}}}
    (tmp_path / "stage" / "lineage.json").write_text(json.dumps(lineage))
    return folder


def test_a_training_state_becomes_the_checkpoint_of_its_weights(tiny: Path, state: Path, tmp_path: Path) -> None:
    plain = stored(tiny)
    assert main(["export", str(state), str(tmp_path / "same")]) == 0
    same = stored(tmp_path / "same")
    assert same.keys() == plain.keys() and all(torch.equal(same[name], value) for name, value in plain.items())
    for dtype in ("bf16", "fp8"):
        of_state, of_model = export_state(state, tmp_path / dtype, dtype), tmp_path / f"model-{dtype}"
        export_checkpoint(tiny, of_model, dtype)
        expected, found = stored(of_model), stored(of_state)
        assert found.keys() == expected.keys() and all(torch.equal(found[n], x) for n, x in expected.items())
        configs = [json.loads((folder / "config.json").read_text()) for folder in (of_state, of_model)]
        assert configs[0] == configs[1]
        assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=of_state).returncode == 0


def test_a_damaged_training_state_is_not_exported(state: Path, tmp_path: Path) -> None:
    file = state / "rank-1.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"rank-1.safetensors is not what was written"):
        export_state(state, tmp_path / "out")


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
