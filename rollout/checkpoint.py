"""Facts about a checkpoint, read from its JSON files and the headers of its safetensors files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from huggingface_hub import parse_local_safetensors_file_metadata

from configs.model import AnyDtype, Dtype

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Attention head sizes that vLLM's CPU kernels support."""


def refuse_head_size(folder: Path) -> None:
    """Raise ValueError for a checkpoint whose head size vLLM's CPU kernels don't support."""
    config = _config(folder)
    text = config.get("text_config", config)
    if text.get("kv_lora_rank"):
        size = text["qk_nope_head_dim"] + text["qk_rope_head_dim"]
        keys = "qk_nope_head_dim + qk_rope_head_dim"
    elif text.get("head_dim"):
        size, keys = text["head_dim"], "head_dim"
    elif text.get("hidden_size") and text.get("num_attention_heads"):
        size, keys = text["hidden_size"] // text["num_attention_heads"], "hidden_size / num_attention_heads"
    else:  # no attention, or a config.json that doesn't give its head size
        return
    if size not in CPU_HEAD_SIZES:
        raise ValueError(
            f"checkpoint '{folder}' has attention heads of {size} ({keys}), which engines on a CPU can't compute; they "
            f"can compute {', '.join(map(str, CPU_HEAD_SIZES))}: take another model, or a machine with a GPU"
        )


def checkpoint_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that an engine loads: all in the safetensors files but the modules for multi-token
    prediction. Raises ValueError for a folder without safetensors."""
    mtp = mtp_prefixes(_config(folder))
    return {name: shape for name, shape in _tensor_shapes(folder).items() if not name.startswith(mtp)}


def resolve_dtype(dtype: AnyDtype, folder: Path) -> Dtype:
    """Return `dtype`, or for `auto` the precision of the checkpoint `folder` (see `described_dtype`), which is float32
    where its config.json does not say. Raises ValueError as `described_dtype`."""
    return dtype if dtype != "auto" else described_dtype(_config(folder)) or "float32"


def described_dtype(config: Mapping[str, Any]) -> Dtype | None:
    """Return the precision in which a checkpoint with this config.json is trained: its own, and bfloat16 for weights in
    FP8. None where it does not say. Raises ValueError for a precision that is not trained, such as float16."""
    described = {"torch_dtype": None, "dtype": None} | dict(config.get("text_config", {})) | dict(config)
    name = described["dtype"] or described["torch_dtype"]
    if _has_fp8(config):
        return "bfloat16"
    if name not in ("float32", "bfloat16", None):
        raise ValueError(f"dtype=auto: the checkpoint is in {name}, which is not trained; set bfloat16 or float32")
    return name


def is_in_fp8(folder: Path) -> bool:
    """Return True for a checkpoint whose weights are in FP8, as DeepSeek-V3 is published."""
    return _has_fp8(_config(folder))


def is_reward_model(folder: Path) -> bool:
    """Return True for a checkpoint whose architecture scores texts (AutoModelForSequenceClassification)."""
    architectures = cast(list[str], _config(folder).get("architectures") or [])
    return any(name.endswith("ForSequenceClassification") for name in architectures)


def vocab_size(folder: Path) -> int:
    """Rows of the checkpoint's output head. Raises KeyError where config.json does not give them."""
    config = _config(folder)
    return int(config.get("text_config", config)["vocab_size"])


def eos_ids(folder: Path) -> list[int]:
    """The end tokens in the checkpoint's generation_config.json; empty without that file."""
    file = folder / "generation_config.json"
    ids: Any = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
    return cast(list[int], ids if isinstance(ids, list) else [] if ids is None else [ids])


def mtp_prefixes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Prefixes of the tensor names of a config.json's multi-token prediction modules, which follow its last layer."""
    depth = config.get("num_nextn_predict_layers") or 0
    return tuple(f"model.layers.{config['num_hidden_layers'] + k}." for k in range(depth))


def mtp_depth(folder: Path) -> int:
    """Number of a checkpoint's multi-token prediction modules. 0 where config.json names some but the files hold none
    of their weights, as `transformers` saves."""
    prefixes = mtp_prefixes(_config(folder))
    return len(prefixes) if any(name.startswith(prefixes) for name in _tensor_shapes(folder)) else 0


def _has_fp8(config: Mapping[str, Any]) -> bool:
    quantization = cast(dict[str, Any], config.get("quantization_config") or {})
    return quantization.get("quant_method") == "fp8"


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
