"""Attention over packed rows in which segments may share a prompt.

A packed row is one long line of tokens cut into segments. A segment sees its own past and, if it has a parent, all
tokens of the parent. So a prompt is computed once for its G completions, and no token is padding.

    row        [ p0 p1 p2 | a0 a1 | b0 b1 b2 | q0 q1 ]
    lengths    [    3     |   2   |    3     |   2   ]
    parents    [   -1     |   0   |    0     |  -1   ]
    positions  [ 0  1  2  | 3  4  | 3  4  5  | 0  1  ]

Segments of the same shape (own length, parent's length) are computed as one batch. The function is registered with
`transformers` under the name PACKED, for every model that selects its attention implementation by name.

Legend: T tokens of the row, H heads, n segments of one shape, L own length, S parent's length + L, D head dimension.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

PACKED = "alignyard_packed"

_IGNORED = frozenset({"position_ids", "use_cache", "cache_position"})
"""Keyword arguments that models pass on and that don't change the result."""


@dataclass(frozen=True)
class Layout:
    """The segments of a packed row: s has `lengths[s]` tokens and sees those of its parent `parents[s]`, -1 for none.

    Another row has the segments `repeated` too, and counts them. Raises ValueError unless a parent comes before its
    children and has no parent itself.

    Example: `Layout(lengths=(3, 2, 3), parents=(-1, 0, 0))` is a prompt of 3 tokens with two completions.
    """

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    repeated: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for segment, parent in enumerate(self.parents):
            if parent != -1 and not (0 <= parent < segment and self.parents[parent] == -1):
                raise ValueError(
                    f"segment {segment} names parent {parent}, which is not an earlier segment without a parent"
                )

    @cached_property
    def position_ids_T(self) -> Tensor:
        """int64 [T]; the positions of a segment continue those of its parent."""
        firsts = [0 if parent == -1 else self.lengths[parent] for parent in self.parents]
        return torch.cat([torch.arange(first, first + n) for first, n in zip(firsts, self.lengths, strict=True)])

    @cached_property
    def counted_T(self) -> Tensor:
        """bool [T]: False for the tokens of repeated segments."""
        counted = torch.tensor([segment not in self.repeated for segment in range(len(self.lengths))])
        return counted.repeat_interleave(torch.tensor(self.lengths))

    @cached_property
    def classes(self) -> list[tuple[list[int], int, int]]:
        """Segments by shape: (indices, own length, parent's length), in order of first appearance."""
        by_shape: dict[tuple[int, int], list[int]] = {}
        for segment, (length, parent) in enumerate(zip(self.lengths, self.parents, strict=True)):
            if length:
                by_shape.setdefault((length, 0 if parent == -1 else self.lengths[parent]), []).append(segment)
        return [(members, own, parent) for (own, parent), members in by_shape.items()]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    layout: Layout,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention over one packed row, with `transformers`' signature.

    query [1, H, T, D], key and value [1, H_kv, T, D or D_v]; returns ([1, T, H, D_v], None). `layout` comes through the
    model's keyword arguments and replaces `attention_mask`, which is None. With `sliding_window`, a token sees only the
    last of the tokens in its layout. Raises ValueError for an unsupported argument that would change the result, such
    as a cap on the scores or attention sinks.
    """
    assert attention_mask is None
    unsupported = {name for name, value in kwargs.items() if value is not None and value is not False} - _IGNORED
    if unsupported or is_causal is False:
        names = sorted(unsupported) or ["is_causal=False"]
        raise ValueError(f"attention with {', '.join(names)} is not supported in packed rows ({type(module).__name__})")
    # MLA's value is narrower than its key. The fused kernels need one width; padding is faster than the slow path.
    missing = key.shape[-1] - value.shape[-1]
    padded = pad(value, (0, missing)) if missing else value
    # Squeeze instead of indexing, whose gradient is written into zeros of the whole size.
    queries, keys, values = (x.squeeze(0).split(layout.lengths, dim=1) for x in (query, key, padded))
    outputs: list[Tensor] = [query.new_empty(0)] * len(layout.lengths)
    for members, own, parent in layout.classes:
        q_nHLD = _side_by_side([queries[s] for s in members], len(members))
        k_nHSD, v_nHSD = (
            _side_by_side([x[part] for s in members for part in (layout.parents[s], s) if part != -1], len(members))
            for x in (keys, values)
        )
        mask = _mask(own, parent, sliding_window, query.device)
        out_nHLD = scaled_dot_product_attention(
            q_nHLD,
            k_nHSD,
            v_nHSD,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            dropout_p=dropout,
            enable_gqa=q_nHLD.shape[1] != k_nHSD.shape[1],
        )
        for segment, out_HLD in zip(members, out_nHLD.unbind(0), strict=True):
            outputs[segment] = out_HLD[..., : value.shape[-1]].transpose(0, 1)
    return torch.cat([out for out in outputs if out.numel()]).unsqueeze(0), None


def _side_by_side(pieces_HLD: list[Tensor], num_sequences: int) -> Tensor:
    """Join the pieces of n sequences of one length to [n, H, L, D], in one copy."""
    return torch.cat(pieces_HLD, dim=1).unflatten(1, (num_sequences, -1)).transpose(0, 1)


def _mask(own: int, parent: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return bool [own, parent + own], True where a token is visible; None for plain causal attention."""
    windowed = window is not None and parent + own > window
    if not parent and not windowed:
        return None
    # Own tokens are the last of S, so the mask is causal from the lower right corner.
    mask = torch.ones(own, parent + own, dtype=torch.bool, device=device).tril(parent)
    return mask if window is None else mask.triu(parent - window + 1)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, lambda *_, **__: None)
