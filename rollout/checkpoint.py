"""What a checkpoint's folder says of its tensors, read from the headers of its files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from huggingface_hub import parse_local_safetensors_file_metadata

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Widths of an attention head that vLLM's kernels for the CPU are built for."""


def refuse_head_size(folder: Path) -> None:
    """Raise ValueError for a checkpoint whose attention no engine on a CPU can compute."""
    config = _config(folder)
    text = config.get("text_config", config)
    if text.get("kv_lora_rank"):
        size = text["qk_nope_head_dim"] + text["qk_rope_head_dim"]
        keys = "qk_nope_head_dim + qk_rope_head_dim"
    elif text.get("head_dim"):
        size, keys = text["head_dim"], "head_dim"
    elif text.get("hidden_size") and text.get("num_attention_heads"):
        size, keys = text["hidden_size"] // text["num_attention_heads"], "hidden_size / num_attention_heads"
    else:  # no attention, or none of a form that says its width
        return
    if size not in CPU_HEAD_SIZES:
        raise ValueError(
            f"checkpoint '{folder}' has attention heads of {size} ({keys}), which engines on a CPU can't compute; they "
            f"can compute {', '.join(map(str, CPU_HEAD_SIZES))}: take another model, or a machine with a GPU"
        )


def checkpoint_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint that an engine speaks with: all in its safetensors files but those
    of modules for multi-token prediction.

    Raises ValueError when the folder has none.
    """
    ahead = mtp_prefixes(_config(folder))
    return {name: shape for name, shape in _tensor_shapes(folder).items() if not name.startswith(ahead)}


def eos_ids(folder: Path) -> list[int]:
    """The tokens at which the checkpoint's generation_config.json ends a text; none where it has no such file."""
    file = folder / "generation_config.json"
    ids: Any = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    return cast(list[int], ids if isinstance(ids, list) else [] if ids is None else [ids])


def mtp_prefixes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What the names of the modules for multi-token prediction begin with in a checkpoint of that config.json: they are
    further layers, after the last that it counts."""
    depth = config.get("num_nextn_predict_layers") or 0
    return tuple(f"model.layers.{config['num_hidden_layers'] + k}." for k in range(depth))


def mtp_depth(folder: Path) -> int:
    """How many modules for multi-token prediction a checkpoint has. 0 for one whose config.json promises some without
    a weight of them in its files, as `transformers` saves."""
    prefixes = mtp_prefixes(_config(folder))
    return len(prefixes) if any(name.startswith(prefixes) for name in _tensor_shapes(folder)) else 0


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        header = parse_local_safetensors_file_metadata(file)
        shapes |= {name: tuple(tensor.shape) for name, tensor in header.tensors.items()}
    if not shapes:
        raise ValueError(f"no *.safetensors in '{folder}': save the checkpoint with save_pretrained")
    return shapes
