"""A `transformers` model that reads packed rows: its attention, experts and norms are ours.

Legend: T tokens of the packed row, D model width.
"""

from torch import Tensor
from transformers import PreTrainedModel

from pipeline.models.attention import PACKED, Layout
from pipeline.models.experts import SORTED
from pipeline.models.fp8_layers import use_fp8
from pipeline.models.norms import use_lean_norms


def use_packed(model: PreTrainedModel, *, fp8: bool) -> None:
    """Switches `model`'s attention to the packed one, its experts and norms to ours, and with `fp8` its layers'
    products to FP8. Raises ValueError as `use_fp8` does."""
    model.set_attn_implementation(PACKED)
    model.set_experts_implementation(SORTED)
    use_lean_norms(model)
    if fp8:
        use_fp8(model)


def hidden_states(model: PreTrainedModel, token_ids_T: Tensor, layout: Layout) -> Tensor:
    """[T, D]: what the base of a packed `model` makes of the row int64 [T], behind its last norm."""
    return model.base_model(
        input_ids=token_ids_T.unsqueeze(0),
        position_ids=layout.position_ids_T.to(token_ids_T.device).unsqueeze(0),
        layout=layout,
        use_cache=False,
    ).last_hidden_state[0]
