"""Export a checkpoint in another precision: bfloat16, float32, or FP8 in DeepSeek's blocks of 128 x 128; and a training
state as a checkpoint."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from configs.model import AnyDtype
from pipeline.disk.checksums import damage
from pipeline.disk.files import new_folder
from pipeline.disk.hashes import CACHE, file_hash
from pipeline.disk.recorded import read_lineage
from pipeline.models.fp8 import BLOCK, quantise
from pipeline.models.fp8_layers import LINEAR
from pipeline.models.mtp import Mtp, mtp_as_layers
from pipeline.models.tokenizer import load_tokenizer
from pipeline.weights.fill import layers
from pipeline.weights.fused import checkpoint_tensors
from pipeline.weights.load import save_hf, unfilled_model, unfilled_with_mtp
from pipeline.weights.pieces import BUFFER, WEIGHT, PieceReader
from pipeline.weights.reader import SCALE, CheckpointReader
from pipeline.weights.shards import INDEX, write_weights
from rollout.checkpoint import is_in_fp8

ExportDtype = Literal["bf16", "fp32", "fp8"]
QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": list(BLOCK),
}
SUMS = "SHA256SUMS"
"""The hash of each file, as `sha256sum -c` reads it."""


def export_checkpoint(checkpoint: Path, out: Path, dtype: ExportDtype | None = None, *, sums: bool = False) -> Path:
    """Write `checkpoint` to `out` in `dtype`, or in its own precision, and return `out`. Weights in FP8 become bfloat16
    then, modules for multi-token prediction included.

    `fp8` stores the projections of attention, MLPs and experts in E4M3, each with a `weight_scale_inv` for its blocks;
    other tensors keep their precision. `bf16` leaves in float32 what `transformers` always computes there. A tensor and
    an output file are in memory at a time. `sums` adds SHA256SUMS. Raises ValueError for a folder that is no
    checkpoint, for FP8 in other blocks, and for `fp8` of one that is quantised already or has nothing to quantise.

    Example: `export_checkpoint(Path("runs/demo/grpo/hf"), Path("models/demo-fp8"), "fp8")`
    """
    if not any(checkpoint.glob("*.safetensors")) or not (checkpoint / "config.json").is_file():
        raise ValueError(f"'{checkpoint}' is no checkpoint: it needs a config.json and .safetensors files")
    if out.resolve() == checkpoint.resolve():
        raise ValueError(f"'{out}' is the checkpoint itself; give another folder to write to")
    was_fp8, reader = is_in_fp8(checkpoint), CheckpointReader(checkpoint)
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if config.pop("quantization_config", None) and (dtype == "fp8" or not was_fp8):
        raise ValueError(f"'{checkpoint}' is quantised already; export the checkpoint it was made of")
    if dtype == "fp8":
        if not any(is_quantised(name, shape) for name, shape in reader.shapes.items()):
            raise ValueError(f"'{checkpoint}' has no *_proj.weight to quantise; serve it as it is")
        config["quantization_config"] = QUANTIZATION
    elif dtype is not None or was_fp8:
        config.pop("torch_dtype", None)
        config["dtype"] = "float32" if dtype == "fp32" else "bfloat16"
    with new_folder(out) as partial:
        for file in checkpoint.iterdir():
            if file.is_file() and file.name not in (INDEX, SUMS, CACHE) and file.suffix != ".safetensors":
                shutil.copy2(file, partial)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_weights(_tensors(reader, dtype, checkpoint), partial)
        if sums:
            _write_sums(partial)
    return out


def is_training_state(folder: Path) -> bool:
    """Return True for a folder `checkpoints/step-N` of a stage."""
    return (folder / "rank-0.json").is_file()


def export_state(state: Path, out: Path, dtype: ExportDtype | None = None) -> Path:
    """Write the policy of a stage's training state to `out` as a checkpoint with SHA256SUMS, and return `out`.

    Its master weights are rounded to `dtype`, or to the precision of the model that the stage started from. A layer and
    an output file are in memory at a time. Raises ValueError for a damaged state, and for one of adapters or of a
    reward model.

    Example: `export_state(Path("runs/demo/grpo/checkpoints/step-20"), Path("models/step-20"), "bf16")`
    """
    if problems := damage(state):
        raise ValueError(f"'{state}' is damaged: {'; '.join(problems)}; export another of the stage's states")
    reader, stage = PieceReader(state), state.resolve().parents[1]
    if any("lora_" in name or not name.startswith(("causal_lm.", "mtp.")) for name in reader.shapes):
        raise ValueError(f"'{state}' is of adapters or of a reward model; export '{stage}' once it is done")
    lineage = read_lineage(stage)
    origin = (stage / lineage["models"]["model"]["folder"]).resolve()
    precision: AnyDtype = {"bf16": "bfloat16", "fp32": "float32"}.get(dtype or "", "auto")  # pyright: ignore
    depth = sum(name.endswith(".eh_proj.weight") for name in reader.shapes)
    model, modules = unfilled_with_mtp(origin, precision, depth) if depth else (unfilled_model(origin, precision), [])
    mtp = Mtp(model, modules, detached=True) if modules else None
    whole = nn.ModuleDict({"causal_lm": model} | ({"mtp": mtp} if mtp else {}))
    names = {id(tensor): name for name, tensor in reversed(whole.state_dict(keep_vars=True).items())}

    def parts() -> Iterator[dict[str, Tensor]]:
        for layer in layers(model):
            tensors = {
                name: reader.whole(WEIGHT if tensor.requires_grad else BUFFER, names[id(tensor)]).to(tensor.dtype)
                for name, tensor in layer.items()
                if name not in model.all_tied_weights_keys
            }
            for name, tensor in checkpoint_tensors(model, tensors).items():
                yield _quantised(name, tensor) if dtype == "fp8" else {name: tensor}

    def finish(partial: Path) -> None:
        if dtype == "fp8":
            file = partial / "config.json"
            config = json.loads(file.read_text(encoding="utf-8")) | {"quantization_config": QUANTIZATION}
            file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _write_sums(partial)

    tokenizer = load_tokenizer(origin, lineage["config"]["model"].get("chat_template"))
    with mtp_as_layers(mtp, model):
        return save_hf(model, tokenizer, out, parts(), finish)


def _write_sums(folder: Path) -> None:
    lines = [f"{file_hash(file)}  {file.name}\n" for file in sorted(folder.iterdir())]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def is_quantised(name: str, shape: torch.Size) -> bool:
    """Return True for a tensor that DeepSeek-V3's releases store in FP8: the weight of a projection."""
    module_name, _, kind = name.rpartition(".")
    return kind == "weight" and len(shape) == 2 and LINEAR.search(module_name) is not None


def _tensors(reader: CheckpointReader, dtype: ExportDtype | None, checkpoint: Path) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of a checkpoint in `dtype`, quantised ones with their scales."""
    kept = _kept_in_float32(checkpoint) if dtype == "bf16" else set[str]()
    target = {"bf16": torch.bfloat16, "fp32": torch.float32}.get(dtype or "")
    for name in reader.shapes:
        with reader:  # so that no file stays in memory
            tensor = reader.read(name)
        if dtype == "fp8":
            yield _quantised(name, tensor)
        elif target is not None and tensor.is_floating_point() and kept.isdisjoint(name.split(".")):
            yield {name: tensor.to(target)}
        else:
            yield {name: tensor}


def _quantised(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return a tensor in FP8 with its scales, or as it is if it stays."""
    if not is_quantised(name, tensor.shape):
        return {name: tensor}
    weight = quantise(tensor, BLOCK)
    return {name: weight.data_MK, name + SCALE: weight.scale}


def _kept_in_float32(checkpoint: Path) -> set[str]:
    """Return the names of modules and tensors that `transformers` loads in float32 into a model in bfloat16."""
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(checkpoint))
    return set(model._get_dtype_plan(torch.bfloat16))
