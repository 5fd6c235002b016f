"""Adapters on the disk, in the form of `peft`: `adapter_config.json` and `adapter_model.safetensors`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from configs.lora import LoraConfig
from pipeline.models.lora import A, B, adapted_layers, add_adapters
from pipeline.weights.resolve import ADAPTER_CONFIG, ADAPTER_FOLDER, adapter_folder

_WEIGHTS = "adapter_model.safetensors"
_HEAD = "score"


def prepare_adapters(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Freeze `model` but for the head of a reward model, and give it adapters, those in `lora.start` if it is set.

    Raises ValueError for targets that name no layer, and adapters that don't fit.
    """
    add_adapters(model, lora)
    head = getattr(model, _HEAD, None)
    if isinstance(head, nn.Module):
        head.requires_grad_(True)
    if lora.start is None:
        return
    file = adapter_folder(lora) / _WEIGHTS
    names = {_peft_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with safe_open(file, "pt") as tensors, torch.no_grad():
        stored = set(tensors.keys())
        if stored != set(names):
            differing = sorted(stored ^ set(names))
            raise ValueError(
                f"'{file}' has not the adapters that lora.targets={lora.targets} names: {len(differing)} differ, such "
                f"as {differing[0]}; set lora.targets as they were trained"
            )
        for name, parameter in names.items():
            tensor = tensors.get_tensor(name)
            if tensor.shape != parameter.shape:
                raise ValueError(
                    f"'{file}': {name} is {list(tensor.shape)}, and the model needs {list(parameter.shape)}; start "
                    "from adapters of this model"
                )
            parameter.copy_(tensor)


def write_adapters(
    model: PreTrainedModel, tensors: Mapping[str, Tensor], lora: LoraConfig, base: Path, folder: Path
) -> None:
    """Write the trained `tensors` of `model`, which was loaded from `base`, into `adapter` in a checkpoint's folder."""
    adapters = folder / ADAPTER_FOLDER
    adapters.mkdir()
    targets = lora.targets
    if targets == "all-linear":
        targets = sorted({name.rpartition(".")[2] for name in adapted_layers(model, lora)})
    has_head = hasattr(model, _HEAD)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if has_head else "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "modules_to_save": [_HEAD] if has_head else None,
        "bias": "none",
        "inference_mode": True,
    }
    (adapters / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    named = {_peft_name(name): tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, adapters / _WEIGHTS, metadata={"format": "pt"})


def _peft_name(parameter: str) -> str:
    is_adapter = parameter.rpartition(".")[2] in (A, B)
    return f"base_model.model.{parameter}{'.weight' if is_adapter else ''}"
