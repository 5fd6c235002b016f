"""Reward models: a scalar head on a language model, read at the last token of an answer.

What is loaded and saved is `transformers`' AutoModelForSequenceClassification with one label, which vLLM serves too.

Legend: T tokens of the packed row, N answers in it, D model width.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from pipeline.data.messages import Message
from pipeline.data.scored import scored_ids, with_pad
from pipeline.data.trees import MicroBatch, deal, micro_batch, scored_tree
from pipeline.models.attention import Layout
from pipeline.models.packed import hidden_states, use_packed
from pipeline.models.parity import narrow_windows, probe_trees, readable, refuse_leaks, refuse_other_values, sequences
from pipeline.models.routing import Routers
from pipeline.models.tokenizer import load_tokenizer
from pipeline.weights.load import save_hf, without_mtp

Dtype = Literal["float32", "bfloat16"]
HEAD, LANGUAGE_HEAD = "score.weight", {"lm_head.weight", "lm_head.bias"}


class ScoreModel(nn.Module):
    """A reward model whose forward answers with the scores at given rows of a packed row.

    `model` must have a base model and a linear head named `score`; it is changed to read packed rows, with `fp8` in
    FP8.
    """

    def __init__(self, model: PreTrainedModel, *, fp8: bool = False) -> None:
        super().__init__()
        use_packed(model, fp8=fp8)
        self.model: PreTrainedModel = model
        self.routers = Routers(model)

    def forward(self, token_ids_T: Tensor, layout: Layout, last_N: Tensor) -> Tensor:
        """float32 [N]: the score of what row last_N[i] has seen. token_ids_T int64 [T]; last_N int64 [N] rows of T."""
        self.routers.begin(counts=torch.is_grad_enabled() and len(last_N) > 0)
        hidden_TD = hidden_states(self.model, token_ids_T, layout)
        head: Any = self.model.score
        return head(hidden_TD[last_N]).squeeze(-1).float()


class Scorer:
    """A reward model's checkpoint, ready to score texts on this process's device."""

    def __init__(self, folder: Path, dtype: Dtype, batch_tokens: int) -> None:
        """`batch_tokens` are those of one forward pass; a longer conversation goes alone. Raises ValueError for a
        checkpoint that is no reward model, and for a tokenizer that can't be used."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._tokenizer = load_tokenizer(folder)
        model = load_score_model(folder, dtype)
        refuse_other_scores(model)
        self._model = ScoreModel(model).to(self.device).eval()
        self._batch_tokens = batch_tokens

    def scores(self, items: Sequence[tuple[list[Message], str]]) -> list[float]:
        """The score of each conversation's answer, in the order of `items`. What else is among them changes nothing
        but the last digits; answers to one conversation share its computation. Raises BadRowError for a conversation
        that the chat template refuses."""
        answers: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}
        for place, (messages, answer) in enumerate(items):
            prompt_ids, answer_ids = scored_ids(messages, answer, self._tokenizer)
            answers.setdefault(tuple(prompt_ids), []).append((place, answer_ids))
        trees = [scored_tree(list(prompt), [ids for _, ids in members]) for prompt, members in answers.items()]
        places = [[place for place, _ in members] for members in answers.values()]
        scores = [0.0] * len(items)
        dealt = deal(trees, num_ranks=1, micro_batch_tokens=self._batch_tokens)[0] if trees else []
        for members in dealt:
            values = self._forward(micro_batch([trees[i] for i in members])).tolist()
            for place, value in zip([place for i in members for place in places[i]], values, strict=True):
                scores[place] = value
        return scores

    def _forward(self, row: MicroBatch) -> Tensor:
        token_ids_T, last_N = (torch.from_numpy(x).to(self.device) for x in (row.token_ids_T, row.source_N))
        with torch.inference_mode():
            return self._model(token_ids_T, Layout(row.lengths, row.parents), last_N)


def load_score_model(folder: str | Path, dtype: Dtype) -> PreTrainedModel:
    """The reward model of a checkpoint, in evaluation mode on the CPU.

    Raises ValueError when it is no reward model (a language model, or a head of another shape), or when a weight is
    missing, left over or of another shape: `transformers` would fill it with random numbers and go on.
    """
    if not is_score_model(folder):
        raise ValueError(f"checkpoint '{folder}' is no reward model: its architecture has no score; train one on it")
    model, faults = _load(folder, dtype)
    _refuse(folder, faults)
    return _checked(folder, model)


def new_score_model(folder: str | Path, dtype: Dtype, seed: int) -> PreTrainedModel:
    """The reward model that training starts with: the language model of a checkpoint under a new head.

    The head's weights are normal with standard deviation 1 / D, drawn by `seed`: the first scores are near 0, the first
    loss near log 2. Raises ValueError where a weight of the language model is missing or left over, and where the
    architecture has no such form.
    """
    model, faults = _load(folder, dtype)
    faults["missing_keys"] -= {HEAD}
    faults["unexpected_keys"] -= LANGUAGE_HEAD
    _refuse(folder, faults)
    _checked(folder, model)
    head: Any = model.score
    drawn = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed)) / head.weight.shape[1]
    with torch.no_grad():
        head.weight.copy_(drawn)
    model.config.problem_type = "regression"  # vLLM would put the score through a sigmoid
    return model


def save_score_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    parts: Iterable[Mapping[str, Tensor]] | None = None,
) -> Path:
    """Writes a reward model as `save_hf` does, with a pad token that can't be taken for the end of an answer, in the
    model's configuration and in `tokenizer` (see `with_pad`)."""
    model.config.pad_token_id = with_pad(tokenizer).pad_token_id
    return save_hf(model, tokenizer, folder, parts)


def is_score_model(folder: str | Path) -> bool:
    """Whether a checkpoint is a reward model, not a language model, by the architecture that its config.json names."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    return any(name.endswith("ForSequenceClassification") for name in config.get("architectures") or [])


def refuse_other_scores(model: PreTrainedModel) -> None:
    """Raise ValueError for a model whose own forward gives another score than ScoreModel: one that pools otherwise than
    at the last token, attends otherwise than packed attention does, or carries a state along the row."""
    first, second, prompt = probe_trees(model)
    trees = [scored_tree(tree.root_ids[:-4], [tree.root_ids[-4:]]) for tree in (first, second)]
    trees.append(scored_tree(prompt.root_ids, [branch.token_ids for branch in prompt.branches]))
    row = micro_batch(trees)
    with narrow_windows(model), torch.no_grad(), readable(model):
        own = [model(torch.tensor([ids]), use_cache=False).logits[0].float() for ids in sequences(trees)]
        scoring = ScoreModel(model)

        def packed() -> list[Tensor]:
            token_ids_T, last_N = torch.from_numpy(row.token_ids_T), torch.from_numpy(row.source_N)
            return list(scoring(token_ids_T, Layout(row.lengths, row.parents), last_N).split(1))

        refuse_leaks(model)
        refuse_other_values(model, own, packed, what="score")


def _load(folder: str | Path, dtype: Dtype) -> tuple[PreTrainedModel, dict[str, set[str]]]:
    try:
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            str(folder), dtype=getattr(torch, dtype), num_labels=1, output_loading_info=True
        )
    except (RuntimeError, ValueError) as error:  # a head of another shape; an architecture without this form
        raise ValueError(f"checkpoint '{folder}' can't be a reward model with one score: {error}") from error
    model, loading = loaded
    faults = ("missing_keys", "unexpected_keys", "mismatched_keys")
    loading["unexpected_keys"] = without_mtp(model, loading["unexpected_keys"])
    return model, {fault: {str(name) for name in loading[fault]} for fault in faults}


def _refuse(folder: str | Path, faults: dict[str, set[str]]) -> None:
    for fault, names in faults.items():
        if names:
            raise ValueError(
                f"checkpoint '{folder}' does not fit its config.json: {fault} {sorted(names)[:5]} ({len(names)} in "
                "all); repair or export the checkpoint again"
            )


def _checked(folder: str | Path, model: PreTrainedModel) -> PreTrainedModel:
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.bias is not None or head.out_features != 1:
        raise ValueError(
            f"checkpoint '{folder}': {type(model).__name__} has no head 'score' of one number without bias; take a "
            "decoder of transformers' usual form (DeepSeek, Llama, Qwen, ...)"
        )
    return model
