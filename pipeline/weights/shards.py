"""Weights written as they come: a checkpoint's files of about SHARD_BYTES each, of which one is in memory at a time."""

import json
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 4 * 2**30
INDEX = "model.safetensors.index.json"


def write_weights(parts: Iterable[Mapping[str, Tensor]], folder: Path) -> dict[str, str]:
    """Writes tensors, under their names in a checkpoint, into `folder`: as `model.safetensors`, or where one file would
    be too large as several and an index, the way `transformers` and vLLM read them. Returns the file of each tensor.

    A part's tensors are copied before the next part is asked for.
    """
    shard: dict[str, Tensor] = {}
    written: list[dict[str, int]] = []

    def flush() -> None:
        save_file(shard, folder / f"{len(written)}.partial", metadata={"format": "pt"})
        written.append({name: tensor.nbytes for name, tensor in shard.items()})
        shard.clear()

    for name, tensor in chain.from_iterable(part.items() for part in parts):
        if shard and sum(held.nbytes for held in shard.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
        shard[name] = tensor.to("cpu", copy=True).contiguous()
    flush()
    files: dict[str, str] = {}
    for number, sizes in enumerate(written):
        several = f"-{number + 1:05d}-of-{len(written):05d}" if len(written) > 1 else ""
        (folder / f"{number}.partial").rename(folder / f"model{several}.safetensors")
        files |= dict.fromkeys(sizes, f"model{several}.safetensors")
    if len(written) > 1:
        size = sum(sum(sizes.values()) for sizes in written)
        index = {"metadata": {"total_size": size}, "weight_map": files}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return files
