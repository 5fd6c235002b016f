"""Import a checkpoint in FP8, such as DeepSeek-V3 is published: a copy in bfloat16, which can be trained and synced.

`transformers` dequantises by itself only where no device multiplies in FP8, and elsewhere keeps weights that can't be
trained. Its reader also takes the side of a block from the number of scales, so it refuses DeepSeek-V3's 576 rows in
five blocks of 128 (integrations/finegrained_fp8.py, 5.19).
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pipeline.disk.files import new_folder
from pipeline.models.fp8 import BLOCK, Quantised, dequantise
from pipeline.weights.shards import INDEX, write_weights

SCALE = "_scale_inv"
"""Ends the name of a weight's scales."""


def import_fp8(checkpoint: Path, out: Path) -> Path:
    """Write `checkpoint` to `out` with its weights in bfloat16, the modules for multi-token prediction included, and
    return `out`. Tensors that are not in FP8 are copied.

    One tensor is in memory at a time, beside an output file. Raises ValueError for other blocks than 128 x 128.
    """
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    blocks = config.pop("quantization_config").get("weight_block_size")
    if blocks != list(BLOCK):
        raise ValueError(f"'{checkpoint}' is in FP8 with weight_block_size={blocks}; only {list(BLOCK)} is imported")
    files = sorted(checkpoint.glob("*.safetensors"))
    with new_folder(out) as partial:
        write_weights(_dequantised(files), partial)
        for file in checkpoint.iterdir():
            if file.is_file() and file.name != INDEX and file not in files:
                shutil.copy2(file, partial)
        config.pop("torch_dtype", None)
        (partial / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}, indent=2) + "\n", "utf-8")
    return out


def _dequantised(files: list[Path]) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of `files` one by one. A weight and its scales may lie in different files."""
    sources = [safe_open(file, "pt") for file in files]
    places = {name: source for source in sources for name in source.keys()}  # noqa: SIM118 - no dicts
    for name, source in places.items():
        if name.endswith(SCALE):
            continue
        tensor = source.get_tensor(name)
        if scales := places.get(name + SCALE):
            scale = scales.get_tensor(name + SCALE).float()
            tensor = dequantise(Quantised(tensor, scale, BLOCK)).to(torch.bfloat16)
        yield {name: tensor}
