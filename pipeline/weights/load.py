"""Load and save whole checkpoints."""

import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.auto_factory import _get_model_class
from transformers.utils.logging import disable_progress_bar

from configs.model import AnyDtype
from pipeline.data.chat import turn_ends
from pipeline.disk.files import new_folder
from pipeline.models.mtp import DeepseekV3WithMtp, MtpLayer, new_mtp_layers
from pipeline.weights.fill import fill
from pipeline.weights.reader import CheckpointReader
from pipeline.weights.shards import write_weights
from rollout.checkpoint import is_in_fp8, mtp_depth, mtp_prefixes, resolve_dtype

disable_progress_bar()  # transformers draws its own progress bars over ours
if not torch.cuda.is_available():  # save_pretrained imports deepspeed, which warns without a GPU
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

NEW_MODULES_SEED = 0
"""Seed of the weights of new modules for multi-token prediction."""


def load_model(folder: str | Path, dtype: AnyDtype) -> PreTrainedModel:
    """Load the causal language model of a checkpoint on the CPU, in evaluation mode, without its MTP modules.

    Raises ValueError when a weight is missing, unexpected or of another shape; `transformers` would fill it with random
    numbers and continue.

    Example: `load_model("runs/demo/sft/hf", "float32")`
    """
    model = unfilled_model(folder, dtype)
    fill(model, CheckpointReader(Path(folder)), torch.device("cpu"))
    return model


def unfilled_model(folder: str | Path, dtype: AnyDtype) -> PreTrainedModel:
    """Load the model of a checkpoint without its values, on the meta device; `fill` reads them.

    Names and shapes of the checkpoint's tensors are checked. Raises ValueError as `load_model`.
    """
    model, loading = load_with_info(folder, dtype, AutoModelForCausalLM)
    loading["unexpected_keys"] = without_mtp(model, loading["unexpected_keys"])
    refuse_faults(folder, loading)
    return model


def unfilled_with_mtp(folder: Path, dtype: AnyDtype, depth: int) -> tuple[PreTrainedModel, list[MtpLayer]]:
    """Load a DeepSeek-V3 and its `depth` modules for multi-token prediction without their values, as `unfilled_model`.

    If the checkpoint has no modules, new ones are made, with their values. Raises ValueError for another architecture,
    another number of modules, and weights that don't fit.
    """
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if model_type != "deepseek_v3":
        raise ValueError(f"mtp needs a DeepSeek-V3 model, and '{folder}' is a {model_type}; remove mtp")
    num_modules = mtp_depth(folder)
    if num_modules == 0:
        model = unfilled_model(folder, dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(NEW_MODULES_SEED)
            return model, new_mtp_layers(model, depth)
    if num_modules != depth:
        raise ValueError(
            f"mtp.depth={depth}, but the checkpoint '{folder}' has {num_modules} modules; set mtp.depth: {num_modules}"
        )
    model, loading = load_with_info(folder, dtype, DeepseekV3WithMtp)
    refuse_faults(folder, loading)
    return model.split_mtp()


def refuse_faults(folder: str | Path, loading: Mapping[str, Collection[Any]]) -> None:
    """Raise ValueError when `transformers`' loading info names missing, unexpected or mismatched weights."""
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[fault]:
            names = sorted(str(name) for name in loading[fault])
            raise ValueError(
                f"checkpoint '{folder}' does not fit its config.json: {fault} {names[:5]} ({len(names)} in all); "
                "repair or export the checkpoint again"
            )


def without_mtp(model: PreTrainedModel, unexpected: Iterable[str]) -> set[str]:
    """Drop the names of MTP modules from `unexpected`, and set their number in the model's configuration to 0."""
    prefixes = mtp_prefixes(model.config.to_dict())
    if prefixes:
        model.config.num_nextn_predict_layers = 0
    return {name for name in unexpected if not name.startswith(prefixes)}


def save_hf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    parts: Iterable[Mapping[str, torch.Tensor]] | None = None,
    extend: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint that `transformers` and vLLM load, replacing `folder` as a whole, and return `folder`.

    `parts` replace the model's own weights. They are named as in the checkpoint and written one by one
    (`pipeline.weights.shards`); `model` then only gives the architecture and may be on the meta device. For a language
    model, the tokens that end a turn are added to those that end a text (`end_with_turns`). `extend` may add files to
    the folder before it appears.
    """
    if model.can_generate():
        end_with_turns(model, tokenizer)
    with new_folder(folder) as partial:
        model.save_pretrained(partial, state_dict=None if parts is None else {})
        if parts is not None:
            write_weights(parts, partial)
        tokenizer.save_pretrained(partial)
        if extend is not None:
            extend(partial)
    return folder


def end_with_turns(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make generation stop where the tokenizer's chat template ends a turn.

    The ends of a turn become the first of `generation_config`'s end tokens, at which `transformers` and vLLM stop. The
    tokenizer's single `eos_token` becomes the end of a turn too, unless the template itself writes `eos_token`.
    """
    ends = turn_ends(cast(PreTrainedTokenizerFast, tokenizer))
    if not ends:
        return
    before = model.generation_config.eos_token_id
    before = before if isinstance(before, list) else [before]
    eos_ids = list(dict.fromkeys(end for end in (*ends, tokenizer.eos_token_id, *before) if end is not None))
    model.generation_config.eos_token_id = eos_ids[0] if len(eos_ids) == 1 else eos_ids
    if "eos_token" not in str(tokenizer.chat_template):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])


def load_with_info(folder: str | Path, dtype: AnyDtype, model_class: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Load a checkpoint on the meta device by `model_class.from_pretrained`, its configuration changed by `options`;
    return the model and `transformers`' loading info. A checkpoint in FP8 gives the model that is trained from it.

    Only the headers of the weights' files are read; from a folder, `from_pretrained` would read all.
    """
    config: Any = AutoConfig.from_pretrained(folder, **options)
    if is_in_fp8(Path(folder)):
        del config.quantization_config
    if mapping := getattr(model_class, "_model_mapping", None):
        if type(config) not in mapping:
            raise ValueError(f"Unrecognized configuration class {type(config).__name__} for {model_class.__name__}")
        model_class = _get_model_class(config, mapping)
    precision, reader = getattr(torch, resolve_dtype(dtype, Path(folder))), CheckpointReader(Path(folder))
    names = {
        name: torch.empty(shape, dtype=reader.dtypes[name], device="meta") for name, shape in reader.shapes.items()
    }
    model, loading = model_class.from_pretrained(
        None, config=config, dtype=precision, state_dict=names, device_map={"": "meta"}, output_loading_info=True
    )
    model.config.name_or_path = str(folder)
    if model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except OSError:  # the folder has none
            file = {"config_file_name": "config.json", "_from_model_config": True}
            model.generation_config = GenerationConfig.from_pretrained(folder, **file)
    _compute_buffers(model)
    _untie(model, reader)
    return model, loading


def _compute_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers that no checkpoint holds, such as frequencies of positions."""
    for name, buffer in model.named_non_persistent_buffers():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._buffers[leaf] = torch.empty_like(buffer, device="cpu")
    for module in model.modules():
        module._is_hf_initialized = False  # pyright: ignore[reportArgumentType]
    with torch.random.fork_rng(devices=[]):
        model.initialize_weights()


def _untie(model: Any, reader: CheckpointReader) -> None:
    """Let tied weights be one, unless the checkpoint holds both with other values, as `transformers` does."""
    for target, source in list(model.all_tied_weights_keys.items()):
        if model.get_parameter(target) is model.get_parameter(source):
            continue
        with reader:
            held = target in reader.shapes and source in reader.shapes
            if held and torch.equal(reader.read(target), reader.read(source)):
                module, _, leaf = target.rpartition(".")
                setattr(model.get_submodule(module), leaf, model.get_parameter(source))
            else:
                del model.all_tied_weights_keys[target]
