"""Export a checkpoint to FP8 as DeepSeek-V3 is deployed: weights in blocks of 128 x 128, each with a scale."""

import json
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from pipeline.disk.files import new_folder
from pipeline.models.fp8 import BLOCK, quantise
from pipeline.models.fp8_layers import LINEAR
from pipeline.weights.shards import INDEX, write_weights

QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": list(BLOCK),
}


def export_fp8(checkpoint: Path, out: Path) -> int:
    """Write `checkpoint` to `out` with the weights of its projections in E4M3, and return their number.

    Each quantised weight gets a `weight_scale_inv` with the scales of its blocks; other tensors are copied. One output
    file is in memory at a time. Raises ValueError for a folder that is no checkpoint, one that is already quantised,
    and one without a weight to quantise.

    Example: `export_fp8(Path("runs/demo/grpo/hf"), Path("models/demo-fp8"))`
    """
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files or not (checkpoint / "config.json").is_file():
        raise ValueError(f"'{checkpoint}' is no checkpoint: it needs a config.json and .safetensors files")
    if out.resolve() == checkpoint.resolve():
        raise ValueError(f"'{out}' is the checkpoint itself; give another folder to write to")
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise ValueError(f"'{checkpoint}' is quantised already; export the checkpoint it was made of")
    with new_folder(out) as partial:
        file_names = write_weights(chain.from_iterable(_quantised(file) for file in files), partial)
        num_quantised = sum(name.endswith(".weight_scale_inv") for name in file_names)
        if not num_quantised:
            raise ValueError(f"'{checkpoint}' has no *_proj.weight to quantise; serve it as it is")
        for file in checkpoint.iterdir():
            if file.is_file() and file.name != INDEX and file not in files:
                shutil.copy2(file, partial)
        (partial / "config.json").write_text(
            json.dumps(config | {"quantization_config": QUANTIZATION}, indent=2) + "\n", encoding="utf-8"
        )
    return num_quantised


def _quantised(file: Path) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of `file`, quantised ones with their scales."""
    with safe_open(file, "pt") as source:
        for name in source.keys():  # noqa: SIM118 - safetensors files are no dicts
            tensor = source.get_tensor(name)
            module_name, _, kind = name.rpartition(".")
            if kind == "weight" and tensor.dim() == 2 and LINEAR.search(module_name):
                weight = quantise(tensor, BLOCK)
                yield {name: weight.data_MK, f"{name}_scale_inv": weight.scale}
            else:
                yield {name: tensor}
