"""Write weights into files of about SHARD_BYTES, with one file in memory at a time."""

import json
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 4 * 2**30
INDEX = "model.safetensors.index.json"


def write_weights(parts: Iterable[Mapping[str, Tensor]], folder: Path) -> dict[str, str]:
    """Write tensors by their checkpoint names into `folder`, and return the file name of each.

    The tensors go to `model.safetensors`, or to several files and an index that `transformers` and vLLM read. The
    tensors of a part are copied before the iterator advances to the next part.
    """
    shard: dict[str, Tensor] = {}
    sizes_by_file: list[dict[str, int]] = []

    def flush() -> None:
        save_file(shard, folder / f"{len(sizes_by_file)}.partial", metadata={"format": "pt"})
        sizes_by_file.append({name: tensor.nbytes for name, tensor in shard.items()})
        shard.clear()

    for name, tensor in chain.from_iterable(part.items() for part in parts):
        if shard and sum(other.nbytes for other in shard.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
        shard[name] = tensor.to("cpu", copy=True).contiguous()
    flush()
    files: dict[str, str] = {}
    for number, sizes in enumerate(sizes_by_file):
        part = f"-{number + 1:05d}-of-{len(sizes_by_file):05d}" if len(sizes_by_file) > 1 else ""
        (folder / f"{number}.partial").rename(folder / f"model{part}.safetensors")
        files |= dict.fromkeys(sizes, f"model{part}.safetensors")
    if len(sizes_by_file) > 1:
        size = sum(sum(sizes.values()) for sizes in sizes_by_file)
        index = {"metadata": {"total_size": size}, "weight_map": files}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return files
