"""Score answers with a reward model: a scalar head, read at the last token of each answer in a packed row.

Legend: T tokens of the packed row, N answers in it, D model width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.data.trees import micro_batch, scored_tree
from pipeline.models.attention import Layout
from pipeline.models.packed import hidden_states, use_packed
from pipeline.models.parity import narrow_windows, probe_trees, readable, refuse_leaks, refuse_other_values, sequences
from pipeline.models.routing import Routers, counted_tokens


class ScoreModel(nn.Module):
    """A reward model whose forward pass returns the scores at given tokens of a packed row.

    `model` must have a base model and a linear head named `score`. It is changed in place to read packed rows, with
    `fp8` in FP8.
    """

    def __init__(self, model: PreTrainedModel, *, fp8: bool = False) -> None:
        super().__init__()
        use_packed(model, fp8=fp8)
        self.model: PreTrainedModel = model
        self.routers = Routers(model)

    def forward(self, token_ids_T: Tensor, layout: Layout, last_N: Tensor) -> Tensor:
        """Return float32 [N], the score at token last_N[i]. token_ids_T is int64 [T]; last_N is int64 [N]."""
        self.routers.begin(counted_T=counted_tokens(layout, len(last_N), token_ids_T.device))
        hidden_TD = hidden_states(self.model, token_ids_T, layout)
        head: Any = self.model.score
        return head(hidden_TD[last_N]).squeeze(-1).float()


def refuse_other_scores(model: PreTrainedModel) -> None:
    """Raise ValueError for a model whose own forward pass gives other scores than ScoreModel.

    Such a model pools elsewhere than at the last token, has another attention, or carries a state along the row.
    """
    first, second, prompt = probe_trees(model)
    trees = [scored_tree(tree.root_ids[:-4], [tree.root_ids[-4:]]) for tree in (first, second)]
    trees.append(scored_tree(prompt.root_ids, [branch.token_ids for branch in prompt.branches]))
    row = micro_batch(trees)
    with narrow_windows(model), torch.no_grad(), readable(model):
        own = [model(torch.tensor([ids]), use_cache=False).logits[0].float() for ids in sequences(trees)]
        score_model = ScoreModel(model)

        def packed() -> list[Tensor]:
            token_ids_T, last_N = torch.from_numpy(row.token_ids_T), torch.from_numpy(row.source_N)
            return list(score_model(token_ids_T, Layout(row.lengths, row.parents), last_N).split(1))

        refuse_leaks(model)
        refuse_other_values(model, own, packed, quantity="score")
