"""Attention over packed rows in which segments may share a prompt.

A packed row is one long line of tokens cut into segments. A segment sees its own past and, if it has a parent, all
tokens of the parent. So a prompt is computed once for its G completions, and no token is padding.

    row        [ p0 p1 p2 | a0 a1 | b0 b1 b2 | q0 q1 ]
    lengths    [    3     |   2   |    3     |   2   ]
    parents    [   -1     |   0   |    0     |  -1   ]
    positions  [ 0  1  2  | 3  4  | 3  4  5  | 0  1  ]

On CPUs, segments of the same shape (own length, parent's length) are computed as one batch. Elsewhere, one kernel call
takes the row and the lengths of its segments, so no mask is made. The function is registered with `transformers` under
the name PACKED, for every model that selects its attention implementation by name.

Legend: T tokens of the row, H heads, G key heads, n segments of one shape, L own length, S parent's length + L, R keys
of all segments, D head dimension, V width of a value.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.bias import CausalVariant
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

PACKED = "alignyard_packed"
_LOWER_RIGHT = int(CausalVariant.LOWER_RIGHT)

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

    query [1, H, T, D], key [1, G, T, D], value [1, G, T, V]; returns ([1, T, H, V], None). `layout` comes through the
    model's keyword arguments and replaces `attention_mask`, which is None. With `sliding_window`, a token sees only the
    last of the tokens in its layout. Raises ValueError for an unsupported argument that would change the result, such
    as a cap on the scores or attention sinks.
    """
    assert attention_mask is None
    unsupported = {name for name, value in kwargs.items() if value is not None and value is not False} - _IGNORED
    if unsupported or dropout or is_causal is False:
        names = sorted(unsupported) or [f"dropout={dropout}" if dropout else "is_causal=False"]
        raise ValueError(f"attention with {', '.join(names)} is not supported in packed rows ({type(module).__name__})")
    # Squeeze instead of indexing, whose gradient is written into zeros of the whole size.
    rows = (x.squeeze(0) for x in (query, key, value))
    out_THV = _ATTENTION.get(query.device.type, _by_lengths)(*rows, layout, scaling, sliding_window)
    return out_THV.unsqueeze(0), None


def _by_shape(
    query_HTD: Tensor, key_GTD: Tensor, value_GTV: Tensor, layout: Layout, scaling: float, window: int | None
) -> Tensor:
    """Compute attention [T, H, V], the segments of one shape in one call."""
    queries, keys, values = (
        x.split(layout.lengths, dim=1) for x in (query_HTD, key_GTD, _as_wide_as(key_GTD, value_GTV))
    )
    outputs: list[Tensor] = [query_HTD.new_empty(0)] * len(layout.lengths)
    for members, own, parent in layout.classes:
        q_nHLD = _side_by_side([queries[s] for s in members], len(members))
        k_nHSD, v_nHSD = (
            _side_by_side([x[part] for s in members for part in (layout.parents[s], s) if part != -1], len(members))
            for x in (keys, values)
        )
        mask = _mask(own, parent, window)
        out_nHLD = scaled_dot_product_attention(
            q_nHLD,
            k_nHSD,
            v_nHSD,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=q_nHLD.shape[1] != k_nHSD.shape[1],
        )
        for segment, out_HLD in zip(members, out_nHLD.unbind(0), strict=True):
            outputs[segment] = out_HLD[..., : value_GTV.shape[-1]].transpose(0, 1)
    return torch.cat([out for out in outputs if out.numel()])


class _Lengths(NamedTuple):
    """A layout as kernels of variable length read it: sequence i has the queries of segment i, and as keys those of
    its parent and its own. `starts_*` are int32 [sequences + 1]; keys_R are the rows of the keys, None if all in order.
    """

    keys_R: Tensor | None
    starts_q: Tensor
    starts_k: Tensor
    longest_q: int
    longest_k: int


@lru_cache(maxsize=8)
def _lengths(layout: Layout, device: torch.device) -> _Lengths:
    """Return the lengths on `device`, made once for all layers of a row."""
    rows = torch.arange(sum(layout.lengths)).split(layout.lengths)
    shapes = [(own, parent) for own, parent in zip(rows, layout.parents, strict=True) if len(own)]
    keys = [own if parent == -1 else torch.cat([rows[parent], own]) for own, parent in shapes]
    lengths_q, lengths_k = ([len(part) for part in parts] for parts in ([own for own, _ in shapes], keys))
    starts_q, starts_k = (
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device) for lengths in (lengths_q, lengths_k)
    )
    keys_R = None if lengths_q == lengths_k else torch.cat(keys).to(device)
    return _Lengths(keys_R, starts_q, starts_k, max(lengths_q), max(lengths_k))


def _by_lengths(
    query_HTD: Tensor, key_GTD: Tensor, value_GTV: Tensor, layout: Layout, scaling: float, window: int | None
) -> Tensor:
    """Compute attention [T, H, V] in one call, causal from the lower right corner of each segment's scores.

    FlashAttention takes bfloat16 and widths up to 256 that are multiples of 8, and reads grouped keys as they are; the
    other kernel takes all, and each query head's own keys (docs/decisions/0014-training-on-gpus.md).
    """
    lengths = _lengths(layout, query_HTD.device)
    width = value_GTV.shape[-1]
    is_flash = query_HTD.dtype != torch.float32 and query_HTD.shape[-1] % 8 == 0 and query_HTD.shape[-1] <= 256
    if is_flash:
        value_GTV = _as_wide_as(key_GTD, value_GTV)
    query_THD, key_RGD, value_RGV = (x.transpose(0, 1) for x in (query_HTD, key_GTD, value_GTV))
    if lengths.keys_R is not None:
        key_RGD, value_RGV = (_Gather.apply(x, lengths.keys_R) for x in (key_RGD, value_RGV))
    group = query_THD.shape[1] // key_RGD.shape[1]
    if is_flash:
        causal = (-1 if window is None else window - 1, 0)
        out_THD = varlen_attn(
            query_THD, key_RGD, value_RGV, *lengths[1:], scale=scaling, window_size=causal, enable_gqa=group > 1
        )
        return out_THD[..., :width]  # pyright: ignore[reportCallIssue, reportArgumentType]
    key_RHD, value_RHV = (x.repeat_interleave(group, dim=1) for x in (key_RGD, value_RGV))
    return _Efficient.apply(query_THD, key_RHD, value_RHV, lengths, scaling, window)  # pyright: ignore[reportReturnType]


class _Efficient(torch.autograd.Function):
    """torch's memory-efficient attention, whose own gradient forgets the window (derivatives of torch 2.13)."""

    @staticmethod
    def forward(
        ctx: Any, query_THD: Tensor, key_RHD: Tensor, value_RHV: Tensor, lengths: _Lengths, scaling: float, window: int
    ) -> Tensor:
        tensors = [x.unsqueeze(0) for x in (query_THD, key_RHD, value_RHV)]
        ctx.lengths, ctx.settings = lengths[1:], {"scale": scaling, "window_size": window}
        out, logsumexp, seed, offset, *_ = torch.ops.aten._efficient_attention_forward(
            *tensors, None, *ctx.lengths, 0.0, _LOWER_RIGHT, any(ctx.needs_input_grad), **ctx.settings
        )
        ctx.save_for_backward(*tensors, out, logsumexp, seed, offset)
        return out.squeeze(0)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_THV: Tensor
    ) -> tuple[Tensor | None, ...]:
        *tensors, out, logsumexp, seed, offset = ctx.saved_tensors
        grads = torch.ops.aten._efficient_attention_backward(
            grad_THV.unsqueeze(0), *tensors, None, out, *ctx.lengths, logsumexp, 0.0, seed, offset, _LOWER_RIGHT, False,
            **ctx.settings,
        )  # fmt: skip
        return *(grad.squeeze(0) for grad in grads[:3]), None, None, None


class _Gather(torch.autograd.Function):
    """x[rows_R] for rows that may repeat; the gradients of a row are added in float32."""

    @staticmethod
    def forward(ctx: Any, x_TGD: Tensor, rows_R: Tensor) -> Tensor:
        ctx.save_for_backward(rows_R)
        ctx.num_rows = len(x_TGD)
        return x_TGD.index_select(0, rows_R)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_RGD: Tensor
    ) -> tuple[Tensor, None]:
        (rows_R,) = ctx.saved_tensors
        sums_TGD = grad_RGD.new_zeros(ctx.num_rows, *grad_RGD.shape[1:], dtype=torch.float32)
        return sums_TGD.index_add_(0, rows_R, grad_RGD.float()).to(grad_RGD.dtype), None


def _as_wide_as(key: Tensor, value: Tensor) -> Tensor:
    """Pad the value to the key's width. MLA's is narrower, and most kernels are fast, or work, with one width only."""
    missing = key.shape[-1] - value.shape[-1]
    return pad(value, (0, missing)) if missing else value


def _side_by_side(pieces_HLD: list[Tensor], num_sequences: int) -> Tensor:
    """Join the pieces of n sequences of one length to [n, H, L, D], in one copy."""
    return torch.cat(pieces_HLD, dim=1).unflatten(1, (num_sequences, -1)).transpose(0, 1)


def _mask(own: int, parent: int, window: int | None) -> Tensor | None:
    """Return bool [own, parent + own], True where a token is visible; None for plain causal attention."""
    windowed = window is not None and parent + own > window
    if not parent and not windowed:
        return None
    # Own tokens are the last of S, so the mask is causal from the lower right corner.
    mask = torch.ones(own, parent + own, dtype=torch.bool).tril(parent)
    return mask if window is None else mask.triu(parent - window + 1)


_ATTENTION: dict[str, Callable[..., Tensor]] = {"cpu": _by_shape}
"""Forms by type of device; others compute `_by_lengths`."""

AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, lambda *_, **__: None)
