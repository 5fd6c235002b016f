"""Load and save whole checkpoints."""

import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from configs.model import AnyDtype
from pipeline.data.chat import turn_ends
from pipeline.disk.files import new_folder
from pipeline.models.mtp import DeepseekV3WithMtp, MtpLayer, new_mtp_layers
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
    model, loading = load_with_info(folder, dtype, AutoModelForCausalLM)
    loading["unexpected_keys"] = without_mtp(model, loading["unexpected_keys"])
    refuse_faults(folder, loading)
    return model


def load_with_mtp(folder: Path, dtype: AnyDtype, depth: int) -> tuple[PreTrainedModel, list[MtpLayer]]:
    """Load a DeepSeek-V3 and its `depth` modules for multi-token prediction, new ones if the checkpoint has none.

    Raises ValueError for another architecture, another number of modules, and weights that don't fit.
    """
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if model_type != "deepseek_v3":
        raise ValueError(f"mtp needs a DeepSeek-V3 model, and '{folder}' is a {model_type}; remove mtp")
    num_modules = mtp_depth(folder)
    if num_modules == 0:
        model = load_model(folder, dtype)
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
    """Load a checkpoint by `model_class.from_pretrained`; return the model and `transformers`' loading info.

    Raises ValueError for weights in FP8, which `transformers` keeps or dequantises by the machine it is on.
    """
    if is_in_fp8(Path(folder)):
        raise ValueError(f"'{folder}' is in FP8, which can't be trained: load the copy that `import_fp8` makes of it")
    precision = getattr(torch, resolve_dtype(dtype, Path(folder)))
    return model_class.from_pretrained(str(folder), dtype=precision, output_loading_info=True, **options)
