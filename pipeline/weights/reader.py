"""Read tensors of a checkpoint by name; weights in FP8 are dequantised on the way, on every kind of machine alike.

`transformers` dequantises by itself only where no device multiplies in FP8, and takes the side of a block from the
number of scales, so it refuses DeepSeek-V3's 576 rows in five blocks of 128 (integrations/finegrained_fp8.py, 5.19).
"""

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import parse_local_safetensors_file_metadata
from safetensors import safe_open
from torch import Tensor

from pipeline.models.fp8 import BLOCK, Quantised, dequantise
from rollout.checkpoint import is_in_fp8

SCALE = "_scale_inv"
"""Ends the name of a weight's scales."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class CheckpointReader:
    """The tensors in a folder's safetensors files. A weight and its scales may lie in different files.

    shapes, dtypes: of each tensor as `read` returns it, by name; scales are not listed.

    Example:
        reader = CheckpointReader(folder)
        with reader:
            weight = reader.read("lm_head.weight")
    """

    def __init__(self, folder: Path) -> None:
        """Raises ValueError for a folder without safetensors, and for FP8 in other blocks than 128 x 128."""
        if is_in_fp8(folder):
            config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            blocks = config["quantization_config"].get("weight_block_size")
            if blocks != list(BLOCK):
                raise ValueError(f"'{folder}' is in FP8 with weight_block_size={blocks}; only {list(BLOCK)} is read")
        self._files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for file in sorted(folder.glob("*.safetensors")):
            for name, info in parse_local_safetensors_file_metadata(file).tensors.items():
                self._files[name] = file
                self.shapes[name], self.dtypes[name] = torch.Size(info.shape), _DTYPES[info.dtype]
        if not self._files:
            raise ValueError(f"no *.safetensors in '{folder}': save the checkpoint with save_pretrained")
        for name in [name for name in self._files if name.removesuffix(SCALE) in self._files and name.endswith(SCALE)]:
            del self.shapes[name], self.dtypes[name]
            self.dtypes[name.removesuffix(SCALE)] = torch.bfloat16

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self._open.clear()

    def num_bytes(self, name: str) -> int:
        """Bytes of a tensor as `read` returns it."""
        return self.shapes[name].numel() * self.dtypes[name].itemsize

    def read(self, name: str) -> Tensor:
        """Return a tensor with memory of its own: a mapped file would count as this process's for as long as any tensor
        of it lives."""
        tensor = self._stored(name)
        if (scales := name + SCALE) not in self._files:
            return tensor
        return dequantise(Quantised(tensor, self._stored(scales).float(), BLOCK)).to(torch.bfloat16)

    def _stored(self, name: str) -> Tensor:
        file = self._files[name]
        if file not in self._open:
            self._open[file] = safe_open(file, "pt", backend="pread")
        return self._open[file].get_tensor(name)
