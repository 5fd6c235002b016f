"""Split fused weights into the tensors of a checkpoint without a copy.

`transformers` keeps all experts of a layer in one tensor, with gate and up projections side by side. Its own conversion
back to the names of the checkpoint copies the parts; here they are views.
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
    """Convert `tensors` from the model's names to those of its checkpoint, splitting fused ones into views.

    Names, order and values equal those of `transformers`' revert_weight_conversion, which converts and copies permuted
    and transposed weights here too. `model` must come from `from_pretrained`.
    """
    with_views: Any = copy(model)
    with_views._weight_conversions = [
        _splitting_into_views(conversion) for conversion in with_views._weight_conversions
    ]
    return revert_weight_conversion(with_views, tensors)


def _splitting_into_views(conversion: WeightTransform) -> WeightTransform:
    if not isinstance(conversion, WeightConverter):
        return conversion
    changed = copy(conversion)
    changed.operations = [
        _ViewConcatenate(op.dim, op.num_shards_attribute) if type(op) is Concatenate else op
        for op in conversion.operations
    ]
    return changed


class _ViewConcatenate(Concatenate):
    @property
    def reverse_op(self) -> ConversionOps:
        return _ViewChunk(self.dim, self.num_shards_attribute)


class _ViewChunk(Chunk):
    def convert(
        self, input_dict: dict[str, Tensor], source_patterns: list[str], target_patterns: list[str], **kwargs: object
    ) -> dict[str, Tensor]:
        [fused] = (value[0] if isinstance(value, list) else value for value in input_dict.values())
        names = self.get_target_patterns(target_patterns, **kwargs)
        return dict(zip(names, torch.chunk(fused, len(names), dim=self.dim), strict=True))
