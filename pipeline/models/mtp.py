"""Multi-token prediction: modules that predict the token after the next (DeepSeek-V3, arXiv:2412.19437, section 2.2).

Module k combines the hidden state of module k - 1 (the main model, for k = 1) at a position with the embedding of the
k-th token after it, and predicts the token after that. It has a decoder layer of its own and shares the main model's
embedding and head:

    h'_i = M_k [RMSNorm(Emb(t_{i+k})); RMSNorm(h_i^{k-1})],  h_i^k = RMSNorm(layer(h'_i)),  P_{i+k+1} = head(h_i^k)

(eq. 21-23, the halves in the order of DeepSeek's checkpoints). h^0 is the main model's output after its last norm, as
in the speculative decoding of vLLM and `transformers`. The modules have DeepSeek-V3's names in a checkpoint.

A row of a module is indexed by the last token that it sees, t_{i+k}. Each module then predicts the same token as the
main model in that row, and reads module k - 1 in the row before, which is in the same segment or at the end of its
prompt. So a prompt is computed once for all completions, although each continues it with another token:

    row        [ p0 p1 p2 | a0 a1 | b0 b1 ]
    module 1   [    p1 p2 | a0 a1 | b0 b1 ]   embeddings
               [    p0 p1 | p2 a0 | p2 b0 ]   hidden states; each completion reads that of p2
    predicts   [    p2  - | a1  - | b1  - ]   and, after p2: a0, b0

Module k has no rows for the first k tokens of a sequence. The last row of a sequence predicts nothing.

Legend: T tokens of the packed row, N trained tokens, K modules, D model width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from transformers import DeepseekV3ForCausalLM, PreTrainedModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

from pipeline.models.attention import Layout


class MtpLayer(DeepseekV3DecoderLayer):
    """One MTP module without the shared embedding and head, named as in DeepSeek-V3's checkpoints."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.enorm, self.hnorm, norm = (
            DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps) for _ in range(3)
        )
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = nn.ModuleDict({"norm": norm})

    def forward(self, hidden_TD: Tensor, embedded_TD: Tensor, **kwargs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Compute h^k [1, T, D] from h^{k-1} and the embeddings, both in the module's rows."""
        joined_TD = self.eh_proj(torch.cat([self.enorm(embedded_TD), self.hnorm(hidden_TD)], dim=-1))
        return self.shared_head["norm"](super().forward(joined_TD, **kwargs))


class _Shared(nn.Module):
    """A weight of the main model; `detached` keeps gradients of the modules away from it."""

    def __init__(self, of: Any, *, detached: bool) -> None:
        super().__init__()
        self.weight: nn.Parameter = of.weight
        self._detached = detached
        self._padding_idx: int | None = getattr(of, "padding_idx", None)

    def _read(self) -> Tensor:
        return self.weight.detach() if self._detached else self.weight


class _Embedding(_Shared):
    def forward(self, token_ids_T: Tensor) -> Tensor:
        return embedding(token_ids_T, self._read(), self._padding_idx)


class _Head(_Shared):
    def forward(self, hidden_ND: Tensor) -> Tensor:
        return linear(hidden_ND, self._read())  # in the model's dtype: no engine computes the same


class Mtp(nn.Module):
    """The MTP modules of a main model, in order of depth.

    With `detached`, the main model, its embedding and its head get no gradient from the modules.
    """

    def __init__(self, causal_lm: PreTrainedModel, layers: list[MtpLayer], *, detached: bool) -> None:
        super().__init__()
        embed_tokens = _Embedding(causal_lm.get_input_embeddings(), detached=detached)
        head = _Head(causal_lm.get_output_embeddings(), detached=detached)
        for layer in layers:
            layer.embed_tokens = embed_tokens
            layer.shared_head["head"] = head
        self.layers = nn.ModuleList(layers)
        self._detached = detached

    @property
    def head(self) -> nn.Module:
        """The main model's head, as the modules use it."""
        return self.layers[0].shared_head["head"]  # pyright: ignore

    def forward(
        self,
        hidden_TD: Tensor,
        token_ids_T: Tensor,
        layout: Layout,
        source_N: Tensor,
        rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Return the hidden states [K, N, D] of the modules in rows source_N, and bool [K, N]: where they have a row.

        hidden_TD is the main model's output after its last norm; `rotary` is its rotary embedding.
        """
        device = hidden_TD.device
        positions_T, previous_T = layout.position_ids_T.to(device), previous_rows(layout).to(device)
        hidden = hidden_TD.detach() if self._detached else hidden_TD
        index_T = torch.arange(len(hidden_TD), device=device)  # of each row of the packed row in `hidden`
        outputs_ND: list[Tensor] = []
        for depth, layer in enumerate(self.layers, start=1):
            rows, rows_layout = module_rows(layout, depth)
            rows = rows.to(device)
            embedded = layer.embed_tokens(token_ids_T[rows]).unsqueeze(0)  # pyright: ignore[reportCallIssue]
            position_ids = rows_layout.position_ids_T.to(device).unsqueeze(0)
            hidden = layer(
                hidden[index_T[previous_T[rows]]].unsqueeze(0),
                embedded,
                position_ids=position_ids,
                position_embeddings=rotary(embedded, position_ids),
                layout=rows_layout,
                use_cache=False,
            )[0]
            index_T = torch.zeros_like(token_ids_T).index_copy(0, rows, torch.arange(len(rows), device=device))
            outputs_ND.append(hidden[index_T[source_N]])
        depths_K1 = torch.arange(1, len(self.layers) + 1, device=device).unsqueeze(1)
        return torch.stack(outputs_ND), positions_T[source_N] >= depths_K1


@contextmanager
def mtp_as_layers(mtp: Mtp | None, causal_lm: Any) -> Iterator[None]:
    """Append the modules to the main model's layers within the block, so that operations on all layers include them.

    The modules then have their names in a checkpoint. The main model's forward pass does not run them.
    """
    layers: nn.ModuleList = causal_lm.base_model.layers if mtp else nn.ModuleList()
    num_layers = len(layers)
    layers.extend(mtp.layers if mtp else ())
    try:
        yield
    finally:
        del layers[num_layers:]


def new_mtp_layers(causal_lm: PreTrainedModel, depth: int) -> list[MtpLayer]:
    """Create `depth` modules with `transformers`' initialisation, and set their number in the model's config."""
    config: Any = causal_lm.config
    layers = [MtpLayer(config, config.num_hidden_layers + k) for k in range(depth)]
    for layer in layers:
        for module in layer.modules():
            causal_lm._init_weights(module)
        for parameter in layer.parameters():  # not the gate's bias, a buffer that stays float32
            parameter.data = parameter.data.to(causal_lm.dtype)
    config.num_nextn_predict_layers = depth
    return layers


class DeepseekV3WithMtp(DeepseekV3ForCausalLM):
    """A DeepSeek-V3 for loading: its MTP modules are further layers, which its forward pass does not run."""

    _keys_to_ignore_on_load_unexpected: ClassVar[Any] = [r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\."]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        depth = config.num_nextn_predict_layers
        self.model.layers.extend(MtpLayer(config, config.num_hidden_layers + k) for k in range(depth))
        self.post_init()

    def split_mtp(self) -> tuple[PreTrainedModel, list[MtpLayer]]:
        """Return the plain model, changed in place, and the modules."""
        num_layers = self.config.num_hidden_layers
        layers: Any = list(self.model.layers[num_layers:])
        self.model.layers = self.model.layers[:num_layers]
        self.__class__ = DeepseekV3ForCausalLM  # pyright: ignore[reportAttributeAccessIssue]
        return self, layers


def previous_rows(layout: Layout) -> Tensor:
    """Return int64 [T]: the row of the token before; at the start of a segment its parent's last row, or 0."""
    previous: list[Tensor] = []
    starts: list[int] = []
    start = 0
    for length, parent in zip(layout.lengths, layout.parents, strict=True):
        before = torch.arange(start - 1, start + length - 1)
        if length:
            before[0] = 0 if parent == -1 else starts[parent] + layout.lengths[parent] - 1
        previous.append(before)
        starts.append(start)
        start += length
    return torch.cat(previous)


def module_rows(layout: Layout, depth: int) -> tuple[Tensor, Layout]:
    """Return the rows of the module of `depth`, those of tokens with `depth` tokens before them, and their layout.

    If there are none, row 0 is returned, which nothing reads: a rank without work must join the collectives too.
    """
    rows = (layout.position_ids_T >= depth).nonzero().squeeze(1)
    if not len(rows):
        return torch.zeros(1, dtype=torch.int64), Layout((1,), (-1,))
    firsts = [0 if parent == -1 else layout.lengths[parent] for parent in layout.parents]
    lengths = (n - min(max(depth - first, 0), n) for first, n in zip(firsts, layout.lengths, strict=True))
    return rows, Layout(tuple(lengths), layout.parents)
