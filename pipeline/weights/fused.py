"""Fused weights, taken apart without a copy.

`transformers` keeps all experts of a layer in one tensor, gate and up projections side by side, and knows what a
model's checkpoint calls the parts. Its own way back copies what it splits; here the parts stay views.
"""

from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    WeightConverter,
    WeightTransform,
    revert_weight_conversion,
)


def checkpoint_tensors(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors`, under the model's names, as the checkpoint has them: names, order and values are those of
    `transformers`' revert_weight_conversion, but what is split off a fused tensor is a view of it.

    What a model converts in another way (permuted, transposed) is converted by `transformers`, which copies.
    `model` comes from `from_pretrained`.
    """
    with_views: Any = copy(model)
    with_views._weight_conversions = [_splitting_into_views(each) for each in with_views._weight_conversions]
    return revert_weight_conversion(with_views, tensors)


def _splitting_into_views(conversion: WeightTransform) -> WeightTransform:
    if not isinstance(conversion, WeightConverter):
        return conversion
    changed = copy(conversion)
    changed.operations = [
        _Joined(each.dim, each.num_shards_attribute) if type(each) is Concatenate else each
        for each in conversion.operations
    ]
    return changed


class _Joined(Concatenate):
    @property
    def reverse_op(self) -> ConversionOps:
        return _Parts(self.dim, self.num_shards_attribute)


class _Parts(Chunk):
    def convert(
        self, input_dict: dict[str, Tensor], source_patterns: list[str], target_patterns: list[str], **kwargs: object
    ) -> dict[str, Tensor]:
        [fused] = (each[0] if isinstance(each, list) else each for each in input_dict.values())
        names = self.get_target_patterns(target_patterns, **kwargs)
        return dict(zip(names, torch.chunk(fused, len(names), dim=self.dim), strict=True))
