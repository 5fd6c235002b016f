"""Checkpoints: loaded whole, saved whole."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from pipeline.data.chat import turn_ends
from pipeline.disk.files import new_folder
from pipeline.models.mtp import MtpLayer, WithModules, new_layers
from pipeline.weights.shards import write_weights
from rollout.checkpoint import mtp_depth, mtp_prefixes

disable_progress_bar()  # transformers draws its own progress bars, above ours
if not torch.cuda.is_available():  # save_pretrained imports deepspeed, which warns without a GPU
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

Dtype = Literal["float32", "bfloat16"]

NEW_MODULES_SEED = 0
"""Draws the weights of modules for multi-token prediction that a checkpoint does not have yet."""


def load_model(folder: str | Path, dtype: Dtype) -> PreTrainedModel:
    """The causal language model of a checkpoint, in evaluation mode on the CPU, without modules for multi-token
    prediction.

    Raises ValueError when a weight is missing, left over or of another shape: `transformers` would fill it with random
    numbers and go on.
    """
    model, loading = _load(folder, dtype, AutoModelForCausalLM)
    loading["unexpected_keys"] = without_mtp(model, loading["unexpected_keys"])
    _refuse_faults(folder, loading)
    return model


def load_with_mtp(folder: Path, dtype: Dtype, depth: int) -> tuple[PreTrainedModel, list[MtpLayer]]:
    """The causal language model of a checkpoint, and its `depth` modules for multi-token prediction, or so many new
    ones where it has none.

    Raises ValueError as `load_model` does, for a model that can't have modules, and where it has another number.
    """
    model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if model_type != "deepseek_v3":
        raise ValueError(f"mtp needs a DeepSeek-V3 model, and '{folder}' is a {model_type}; remove mtp")
    found = mtp_depth(folder)
    if found == 0:
        model = load_model(folder, dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(NEW_MODULES_SEED)
            return model, new_layers(model, depth)
    if found != depth:
        raise ValueError(
            f"mtp.depth={depth}, but the checkpoint '{folder}' has {found} modules; set mtp.depth: {found}"
        )
    model, loading = _load(folder, dtype, WithModules)
    _refuse_faults(folder, loading)
    return model.without_modules()


def _load(folder: str | Path, dtype: Dtype, model_class: Any) -> Any:
    return model_class.from_pretrained(str(folder), dtype=getattr(torch, dtype), output_loading_info=True)


def _refuse_faults(folder: str | Path, loading: dict[str, Any]) -> None:
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[fault]:
            names = sorted(str(name) for name in loading[fault])
            raise ValueError(
                f"checkpoint '{folder}' does not fit its config.json: {fault} {names[:5]} ({len(names)} in all); "
                "repair or export the checkpoint again"
            )


def without_mtp(model: PreTrainedModel, unexpected: Iterable[str]) -> set[str]:
    """Which of the names that `model` has no place for are no modules for multi-token prediction; from here on its
    configuration promises none."""
    ahead = mtp_prefixes(model.config.to_dict())
    if ahead:
        model.config.num_nextn_predict_layers = 0
    return {name for name in unexpected if not name.startswith(ahead)}


def end_with_turns(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the tokens that end a turn in the tokenizer's chat template the first of those that end a text.

    generation_config has a list of them, at which `transformers` and vLLM stop; the tokenizer has one, which becomes
    the end of a turn unless the template itself writes `eos_token`.
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


def save_hf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    parts: Iterable[Mapping[str, torch.Tensor]] | None = None,
) -> Path:
    """Writes a checkpoint that `transformers` and vLLM load, replacing `folder` as a whole, and returns `folder`.

    `parts` take the place of the model's own weights, under the names of its checkpoint, and are written as they come
    (`pipeline.weights.shards`); `model` then only gives the architecture and may lie on the meta device. A language
    model is written with the end of a turn in its chat template as the end of a text (`end_with_turns`).
    """
    if model.can_generate():
        end_with_turns(model, tokenizer)
    with new_folder(folder) as partial:
        model.save_pretrained(partial, state_dict=None if parts is None else {})
        if parts is not None:
            write_weights(parts, partial)
        tokenizer.save_pretrained(partial)
    return folder
