"""Load and save reward models: `transformers`' AutoModelForSequenceClassification with one label, as vLLM serves it."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from configs.model import AnyDtype
from pipeline.data.scored import with_pad
from pipeline.weights.fill import fill
from pipeline.weights.load import load_with_info, refuse_faults, save_hf, without_mtp
from pipeline.weights.reader import CheckpointReader
from rollout.checkpoint import is_reward_model

_SCORE_HEAD = "score.weight"
_LANGUAGE_HEAD = {"lm_head.weight", "lm_head.bias"}


def load_score_model(folder: str | Path, dtype: AnyDtype) -> PreTrainedModel:
    """Load the reward model of a checkpoint on the CPU, in evaluation mode.

    Raises ValueError for a language model, a head of another shape, and weights that don't fit.

    Example: `load_score_model("runs/demo/rm/hf", "float32")`
    """
    model = unfilled_score_model(folder, dtype)
    fill(model, CheckpointReader(Path(folder)), torch.device("cpu"))
    return model


def unfilled_score_model(folder: str | Path, dtype: AnyDtype) -> PreTrainedModel:
    """Load the reward model of a checkpoint without its values, on the meta device; `fill` reads them. Raises
    ValueError as `load_score_model`."""
    if not is_reward_model(Path(folder)):
        raise ValueError(f"checkpoint '{folder}' is no reward model: its architecture has no score; train one on it")
    model, loading = _load(folder, dtype)
    refuse_faults(folder, loading)
    _refuse_other_head(folder, model)
    return model


def new_score_model(folder: str | Path, dtype: AnyDtype, seed: int) -> PreTrainedModel:
    """Put a new score head on the language model of a checkpoint, on the CPU (see `unfilled_new_score_model`)."""
    model = unfilled_new_score_model(folder, dtype, seed)
    fill(model, CheckpointReader(Path(folder)), torch.device("cpu"))
    return model


def unfilled_new_score_model(folder: str | Path, dtype: AnyDtype, seed: int) -> PreTrainedModel:
    """Put a new score head on the language model of a checkpoint, whose values `fill` reads.

    The weights of the head are normal with standard deviation 1 / D, drawn with `seed`, so that the first scores are
    near 0 and the first loss is near log 2. Raises ValueError for weights that don't fit, and for an architecture that
    `transformers` can't use as a reward model.
    """
    model, loading = _load(folder, dtype)
    loading["missing_keys"] -= {_SCORE_HEAD}
    loading["unexpected_keys"] -= _LANGUAGE_HEAD
    refuse_faults(folder, loading)
    _refuse_other_head(folder, model)
    head: Any = model.score
    weights = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed)) / head.weight.shape[1]
    head.weight = nn.Parameter(weights.to(model.dtype))
    model.config.problem_type = "regression"  # otherwise vLLM applies a sigmoid to the score
    return model


def save_score_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    parts: Iterable[Mapping[str, Tensor]] | None = None,
    extend: Callable[[Path], None] | None = None,
) -> Path:
    """Write a reward model like `save_hf`, with a pad token that differs from the end of an answer (see `with_pad`)."""
    model.config.pad_token_id = with_pad(tokenizer).pad_token_id
    return save_hf(model, tokenizer, folder, parts, extend)


def _load(folder: str | Path, dtype: AnyDtype) -> tuple[PreTrainedModel, dict[str, set[str]]]:
    try:
        model, loading = load_with_info(folder, dtype, AutoModelForSequenceClassification, num_labels=1)
    except (RuntimeError, ValueError) as error:  # a head of another shape, or an architecture without a score
        raise ValueError(f"checkpoint '{folder}' can't be a reward model with one score: {error}") from error
    loading["unexpected_keys"] = without_mtp(model, loading["unexpected_keys"])
    return model, loading


def _refuse_other_head(folder: str | Path, model: PreTrainedModel) -> None:
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.bias is not None or head.out_features != 1:
        raise ValueError(
            f"checkpoint '{folder}': {type(model).__name__} has no head 'score' of one number without bias; take a "
            "decoder of transformers' usual form (DeepSeek, Llama, Qwen, ...)"
        )
