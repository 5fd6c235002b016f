"""Import a checkpoint in FP8, such as DeepSeek-V3 is published: a copy in bfloat16.

Rollout engines need it, whose weights a sync replaces. Training ranks read the checkpoint itself
(`pipeline.weights.reader`).
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.disk.files import new_folder
from pipeline.weights.reader import CheckpointReader
from pipeline.weights.shards import INDEX, write_weights


def import_fp8(checkpoint: Path, out: Path) -> Path:
    """Write `checkpoint` to `out` with its weights in bfloat16, the modules for multi-token prediction included, and
    return `out`. Tensors that are not in FP8 are copied.

    One tensor is in memory at a time, beside an output file. Raises ValueError for other blocks than 128 x 128.
    """
    reader = CheckpointReader(checkpoint)
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    with new_folder(out) as partial:
        write_weights(_tensors(reader), partial)
        for file in checkpoint.iterdir():
            if file.is_file() and file.name != INDEX and file.suffix != ".safetensors":
                shutil.copy2(file, partial)
        config.pop("torch_dtype", None)
        (partial / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}, indent=2) + "\n", "utf-8")
    return out


def _tensors(reader: CheckpointReader) -> Iterator[dict[str, Tensor]]:
    for name in reader.shapes:
        with reader:  # so that no file stays in memory
            yield {name: reader.read(name)}
