"""Let a `transformers` model read packed rows, with our attention, experts and norms.

Legend: T tokens of the packed row, D model width.
"""

from torch import Tensor
from transformers import PreTrainedModel

from pipeline.models.attention import PACKED, Layout
from pipeline.models.experts import SORTED
from pipeline.models.fp8_layers import use_fp8
from pipeline.models.norms import use_lean_norms


def use_packed(model: PreTrainedModel, *, fp8: bool) -> None:
    """Switch `model` to packed attention, our experts and norms and, with `fp8`, to products in FP8 (`use_fp8`)."""
    model.set_attn_implementation(PACKED)
    model.set_experts_implementation(SORTED)
    use_lean_norms(model)
    if fp8:
        use_fp8(model)


def hidden_states(model: PreTrainedModel, token_ids_T: Tensor, layout: Layout) -> Tensor:
    """Compute the hidden states [T, D] of a packed `model` after its last norm, for token_ids_T int64 [T]."""
    return model.base_model(
        input_ids=token_ids_T.unsqueeze(0),
        position_ids=layout.position_ids_T.to(token_ids_T.device).unsqueeze(0),
        layout=layout,
        use_cache=False,
    ).last_hidden_state[0]
