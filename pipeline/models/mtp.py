"""Multi-token prediction: modules that guess the token after the next (DeepSeek-V3, arXiv:2412.19437, section 2.2).

Module k takes what module k - 1 knew of a position (the main model, for k = 1) and the k-th token after it, and
predicts the token after that, through a decoder layer of its own and the main model's embedding and head:

    h'_i = M_k [RMSNorm(Emb(t_{i+k})); RMSNorm(h_i^{k-1})],  h_i^k = RMSNorm(layer(h'_i)),  P_{i+k+1} = head(h_i^k)

(eq. 21-23, the halves in the order of DeepSeek's checkpoints). h^0 is the main model's output after its last norm: so
vLLM's and `transformers`' speculative decoding read the modules, whose names in a checkpoint are DeepSeek-V3's.

Here a module's row is named by the last token it sees, t_{i+k}. Then each module predicts what the main model predicts
in the same row, and what it takes from module k - 1 lies in the row before, within the segment or at the end of its
prompt. So a shared prompt stays shared, though its last token is followed by another one in every completion:

    row        [ p0 p1 p2 | a0 a1 | b0 b1 ]
    module 1   [    p1 p2 | a0 a1 | b0 b1 ]   embeddings
               [    p0 p1 | p2 a0 | p2 b0 ]   hidden states; p2's is read once by each completion
    predicts   [    p2  - | a1  - | b1  - ]   and what follows p2: a0, b0

The first k rows of a sequence have no module k; a sequence's last row predicts nothing, in the main model as here.

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
    """One module but for the embedding and head it shares; its names are those of DeepSeek-V3's checkpoints."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.enorm, self.hnorm, norm = (
            DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps) for _ in range(3)
        )
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = nn.ModuleDict({"norm": norm})

    def forward(self, known_TD: Tensor, embedded_TD: Tensor, **kwargs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """[1, T, D]: h^k from h^{k-1} and the embeddings, all in the module's rows."""
        joined_TD = self.eh_proj(torch.cat([self.enorm(embedded_TD), self.hnorm(known_TD)], dim=-1))
        return self.shared_head["norm"](super().forward(joined_TD, **kwargs))


class _Shared(nn.Module):
    """A weight of the main model. `detached`: what is done with it here does not move it."""

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
        return linear(hidden_ND, self._read())


class Mtp(nn.Module):
    """The modules of a main model, in order of depth.

    `detached`: the main model, its embedding and its head get no gradient from them.
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
        """The main model's, as the modules use it."""
        return self.layers[0].shared_head["head"]  # pyright: ignore

    def forward(
        self,
        hidden_TD: Tensor,
        token_ids_T: Tensor,
        layout: Layout,
        source_N: Tensor,
        rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """What every module knows in rows source_N: [K, N, D] for the head, and bool [K, N], where it knows anything.

        hidden_TD: the main model's answer after its last norm. rotary: its rotary embedding.
        """
        device = hidden_TD.device
        positions_T, previous_T = layout.position_ids_T.to(device), previous_rows(layout).to(device)
        known, place_T = (
            hidden_TD.detach() if self._detached else hidden_TD,
            torch.arange(len(hidden_TD), device=device),
        )
        read_ND: list[Tensor] = []
        for depth, layer in enumerate(self.layers, start=1):
            rows, rows_layout = module_rows(layout, depth)
            rows = rows.to(device)
            embedded = layer.embed_tokens(token_ids_T[rows]).unsqueeze(0)  # pyright: ignore[reportCallIssue]
            position_ids = rows_layout.position_ids_T.to(device).unsqueeze(0)
            known = layer(
                known[place_T[previous_T[rows]]].unsqueeze(0),
                embedded,
                position_ids=position_ids,
                position_embeddings=rotary(embedded, position_ids),
                layout=rows_layout,
                use_cache=False,
            )[0]
            place_T = torch.zeros_like(token_ids_T).index_copy(0, rows, torch.arange(len(rows), device=device))
            read_ND.append(known[place_T[source_N]])
        depths_K1 = torch.arange(1, len(self.layers) + 1, device=device).unsqueeze(1)
        return torch.stack(read_ND), positions_T[source_N] >= depths_K1


@contextmanager
def attached(mtp: Mtp | None, causal_lm: Any) -> Iterator[None]:
    """While the block runs the modules, if there are any, are the main model's last layers, under their names in a
    checkpoint: for what is done to all layers alike. Its forward pass does not reach them."""
    layers: nn.ModuleList = causal_lm.base_model.layers if mtp else nn.ModuleList()
    own = len(layers)
    layers.extend(mtp.layers if mtp else ())
    try:
        yield
    finally:
        del layers[own:]


def new_layers(causal_lm: PreTrainedModel, depth: int) -> list[MtpLayer]:
    """`depth` fresh modules for a DeepSeek-V3, drawn as `transformers` draws its layers; its configuration says so."""
    config: Any = causal_lm.config
    layers = [MtpLayer(config, config.num_hidden_layers + k) for k in range(depth)]
    for layer in layers:
        for module in layer.modules():
            causal_lm._init_weights(module)
        for parameter in layer.parameters():  # not the gate's bias, a buffer that stays float32
            parameter.data = parameter.data.to(causal_lm.dtype)
    config.num_nextn_predict_layers = depth
    return layers


class WithModules(DeepseekV3ForCausalLM):
    """A DeepSeek-V3 as it is loaded: its modules are further layers, which its forward pass does not reach."""

    _keys_to_ignore_on_load_unexpected: ClassVar[Any] = [r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\."]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        depth = config.num_nextn_predict_layers
        self.model.layers.extend(MtpLayer(config, config.num_hidden_layers + k) for k in range(depth))
        self.post_init()

    def without_modules(self) -> tuple[PreTrainedModel, list[MtpLayer]]:
        """The model as it is without them, and the modules."""
        num_layers = self.config.num_hidden_layers
        layers: Any = list(self.model.layers[num_layers:])
        self.model.layers = self.model.layers[:num_layers]
        self.__class__ = DeepseekV3ForCausalLM  # pyright: ignore[reportAttributeAccessIssue]
        return self, layers


def previous_rows(layout: Layout) -> Tensor:
    """int64 [T]: the row of the token before, at the start of a segment its parent's last. 0 where there is none."""
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
    """The rows that a module has, those of tokens with `depth` before them, and their layout.

    Where there are none it is row 0, which nothing reads: a rank without work must take part all the same.
    """
    rows = (layout.position_ids_T >= depth).nonzero().squeeze(1)
    if not len(rows):
        return torch.zeros(1, dtype=torch.int64), Layout((1,), (-1,))
    firsts = [0 if parent == -1 else layout.lengths[parent] for parent in layout.parents]
    lengths = (n - min(max(depth - first, 0), n) for first, n in zip(firsts, layout.lengths, strict=True))
    return rows, Layout(tuple(lengths), layout.parents)
