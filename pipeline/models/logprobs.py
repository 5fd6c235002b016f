"""Compute log-probabilities of given tokens without materialising the logits of a whole batch.

The head runs on chunks of the rows that predict a trained token. The float32 logits of a chunk are recomputed in the
backward pass instead of stored, so memory is chunk x V for every batch size.

Legend: T tokens of the packed row, N trained tokens, C rows of a chunk, D model width, V vocabulary, K modules for
multi-token prediction.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pipeline.data.trees import Tree, micro_batch
from pipeline.models.attention import Layout
from pipeline.models.mtp import Mtp, mtp_as_layers
from pipeline.models.packed import hidden_states, use_packed
from pipeline.models.parity import narrow_windows, probe_trees, readable, refuse_leaks, refuse_other_values, sequences
from pipeline.models.routing import Routers, counted_tokens
from pipeline.objectives.distillation import reverse_kl

CHUNK_TOKENS = 1024
"""Rows of float32 logits in memory at once: 0.5 GB with DeepSeek-V3's vocabulary."""
_PROBE_LOGIT = 30.0
"""The start-up check scales logits up until the largest has this size."""


class MtpLogprobs(NamedTuple):
    """Output of a training pass with modules for multi-token prediction.

    logprobs_N: of the main model. mtp_logprobs_KN: of each module for the same tokens; 0 for the first tokens of a
    sequence, for which a module has no row. accepted_KN: True where the module's most likely token is the main model's,
    so that speculative decoding at temperature 0 would accept it.
    """

    logprobs_N: Tensor
    mtp_logprobs_KN: Tensor
    accepted_KN: Tensor


class TokenSampling(NamedTuple):
    """Distribution that the trained tokens were sampled from, where it is not softmax(logits) over the vocabulary.

    temperature_N: float32 [N], divides the logits. kept_NK: integers [N, K], the tokens that top_k and top_p kept,
    padded with -1; all others have probability 0.
    """

    temperature_N: Tensor | None = None
    kept_NK: Tensor | None = None


class TeacherTokens(NamedTuple):
    """A teacher's side of the tokens of a row: its last hidden states, [N, teacher's D], and its head.

    The head's weight has at least V rows, of which the first V count: a larger model of a family may pad its vocabulary
    further.
    """

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None


class TaughtTokens(NamedTuple):
    """Output of a pass beside a teacher, float32 [N]: log-probabilities of the targets, without a gradient, and the
    divergence from the teacher."""

    logprobs_N: Tensor
    divergence_N: Tensor


class LogprobModel(nn.Module):
    """A causal language model whose forward pass returns the log-probabilities of given tokens.

    `causal_lm` must be a `transformers` model with a base model and an output head. It is changed in place to read
    packed rows, with `fp8` in FP8. Its MTP modules `mtp` run only in passes with gradients.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        chunk_tokens: int = CHUNK_TOKENS,
        *,
        fp8: bool = False,
        mtp: Mtp | None = None,
    ) -> None:
        super().__init__()
        with mtp_as_layers(mtp, causal_lm):
            use_packed(causal_lm, fp8=fp8)
        use_float_head(causal_lm)
        self.causal_lm: PreTrainedModel = causal_lm
        self.mtp = mtp
        self.routers = Routers(causal_lm)
        self.chunk_tokens = chunk_tokens

    def forward(
        self,
        token_ids_T: Tensor,
        layout: Layout,
        source_N: Tensor,
        target_N: Tensor | None,
        experts_TLK: Tensor | None = None,
        sampling: TokenSampling | None = None,
        teacher: TeacherTokens | None = None,
    ) -> Tensor | MtpLogprobs | TaughtTokens:
        """Return float32 [N]: log pi(target_N[i] | tokens that row source_N[i] sees), in nats.

        token_ids_T int64 [T]; source_N int64 [N] rows of T; target_N int64 [N] token ids; experts_TLK: routes to
        replay (see pipeline.models.routing). With `mtp` and gradients, returns MtpLogprobs, whose modules predict
        without regard to `sampling`; with `teacher`, TaughtTokens; without target_N, the last hidden states [N, D].
        Passes with gradients count towards the load of the experts.
        """
        self.routers.begin(experts_TLK, counted_T=counted_tokens(layout, len(source_N), token_ids_T.device))
        hidden_TD = hidden_states(self.causal_lm, token_ids_T, layout)
        if target_N is None:
            return hidden_TD[source_N]
        head = self.causal_lm.get_output_embeddings()
        assert head is not None
        if teacher is not None:
            divergence = partial(_chunk_divergence, weight_VD=teacher.weight_VD, bias_V=teacher.bias_V)
            return TaughtTokens(*self._over_chunks(head, divergence, hidden_TD[source_N], target_N, teacher.hidden_ND))
        if self.mtp is None or not torch.is_grad_enabled():
            return self._logprobs(head, hidden_TD[source_N], target_N, sampling)[0]
        logprobs_N, likeliest_N = self._logprobs(head, hidden_TD[source_N], target_N, sampling, likeliest=True)
        rotary = self.causal_lm.base_model.rotary_emb
        mtp_hidden_KND, valid_KN = self.mtp(hidden_TD, token_ids_T, layout, source_N, rotary)
        targets = target_N.repeat(len(mtp_hidden_KND))
        flat_logprobs, flat_likeliest = self._logprobs(
            self.mtp.head, mtp_hidden_KND.flatten(0, 1), targets, likeliest=True
        )
        return MtpLogprobs(
            logprobs_N,
            torch.where(valid_KN, flat_logprobs.view_as(valid_KN), 0.0),
            valid_KN & (flat_likeliest.view_as(valid_KN) == likeliest_N),
        )

    def _logprobs(
        self,
        head: nn.Module,
        hidden_ND: Tensor,
        target_N: Tensor,
        sampling: TokenSampling | None = None,
        *,
        likeliest: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of the targets, float32 [N], and the `likeliest` tokens, int64 [N] or empty."""
        function = partial(_chunk_logprobs, likeliest=likeliest)
        return self._over_chunks(head, function, hidden_ND, target_N, *(sampling or TokenSampling()))

    def _over_chunks(
        self,
        head: nn.Module,
        function: Callable[..., tuple[Tensor, Tensor]],
        hidden_ND: Tensor,
        *columns: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return `function(logits, hidden_CD, *columns)` of all chunks, joined; columns have N rows or are None.

        The head is called once for all chunks: under ZeRO-3 a call gathers its weight with all ranks, and their rows
        have unequal numbers of chunks.
        """
        logits = head.forward
        head.forward = partial(self._in_chunks, logits, function, columns)
        try:
            return head(hidden_ND)
        finally:
            head.forward = logits

    def _in_chunks(
        self,
        logits: Callable[[Tensor], Tensor],
        function: Callable[..., tuple[Tensor, Tensor]],
        columns: Sequence[Tensor | None],
        hidden_ND: Tensor,
    ) -> tuple[Tensor, Tensor]:
        columns_C = [repeat(None) if column is None else column.split(self.chunk_tokens) for column in columns]
        chunks = zip(hidden_ND.split(self.chunk_tokens), *columns_C, strict=False)
        if torch.is_grad_enabled():
            function = partial(checkpoint, function, use_reentrant=False)
        first, second = zip(*(function(logits, *chunk) for chunk in chunks), strict=True)
        return torch.cat(first), torch.cat(second)


def _chunk_logprobs(
    logits: Callable[[Tensor], Tensor],
    hidden_CD: Tensor,
    target_C: Tensor,
    temperature_C: Tensor | None,
    kept_CK: Tensor | None,
    *,
    likeliest: bool,
) -> tuple[Tensor, Tensor]:
    logits_CV = logits(hidden_CD).float()
    tokens_C = logits_CV.argmax(1) if likeliest else target_C[:0]
    logprobs_C: Any = TargetLogprobs.apply(logits_CV, target_C, temperature_C, kept_CK)
    return logprobs_C, tokens_C


def _chunk_divergence(
    logits: Callable[[Tensor], Tensor],
    hidden_CD: Tensor,
    target_C: Tensor,
    teacher_hidden_CD: Tensor,
    *,
    weight_VD: Tensor,
    bias_V: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities of the targets and the divergence from the teacher, whose logits are rebuilt here."""
    logits_CV = logits(hidden_CD).float()
    size = logits_CV.shape[1]
    product: Any = _FloatProduct.apply if weight_VD.dtype == torch.bfloat16 else linear
    teacher_logits_CV = product(teacher_hidden_CD, weight_VD[:size])
    if bias_V is not None:
        teacher_logits_CV += bias_V[:size].float()
    divergence_C, logprobs_C = reverse_kl(logits_CV=logits_CV, teacher_logits_CV=teacher_logits_CV, target_C=target_C)
    return logprobs_C, divergence_C


class TargetLogprobs(torch.autograd.Function):
    """Log-probabilities of target_C under softmax(logits_CV / temperature_C) over the tokens kept_CK, float32 [C].

    They and the gradient overwrite the memory of the logits. Tokens that are not kept have probability and gradient 0.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_CV: Tensor, target_C: Tensor, temperature_C: Tensor | None, kept_CK: Tensor | None
    ) -> Tensor:
        scaled_CV = logits_CV.detach()
        if temperature_C is not None:
            scaled_CV.div_(temperature_C.unsqueeze(1))
        if kept_CK is not None:
            keep_only(scaled_CV, kept_CK)
        target_logit_C, largest_C = scaled_CV.gather(1, target_C.unsqueeze(1)).squeeze(1), scaled_CV.amax(1)
        exp_CV = scaled_CV.sub_(largest_C.unsqueeze(1)).exp_()
        sum_C = exp_CV.sum(1)
        ctx.save_for_backward(exp_CV, sum_C, target_C, temperature_C)
        return target_logit_C - largest_C - sum_C.log()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_C: Tensor
    ) -> tuple[Tensor | None, ...]:
        exp_CV, sum_C, target_C, temperature_C = ctx.saved_tensors
        if temperature_C is not None:
            grad_C = grad_C / temperature_C
        grad_CV = exp_CV.mul_((-grad_C / sum_C).unsqueeze(1))
        grad_CV[torch.arange(len(grad_CV), device=grad_CV.device), target_C] += grad_C
        return grad_CV, None, None, None


def keep_only(logits_CV: Tensor, kept_CK: Tensor) -> None:
    """Set all logits but those of the tokens kept_CK, [C, K] padded with -1, to minus infinity, in place."""
    row, place = torch.nonzero(kept_CK >= 0, as_tuple=True)
    token = kept_CK[row, place].long()
    kept = logits_CV[row, token]
    logits_CV.fill_(-torch.inf)
    logits_CV[row, token] = kept


def use_float_head(causal_lm: PreTrainedModel) -> None:
    """Let the output head of a bfloat16 model return float32 logits, as vLLM's does (`head_dtype`).

    Logits of 16 to 32 in bfloat16 are multiples of 0.125: a gap between trainer and engine that no layer causes. The
    products of bfloat16 numbers are exact in float32 and summed there; gradients are products of bfloat16.
    """
    head = causal_lm.get_output_embeddings()
    if isinstance(head, nn.Linear) and head.weight.dtype == torch.bfloat16:
        head.forward = MethodType(_float_logits, head)


def _float_logits(head: nn.Linear, hidden_CD: Tensor) -> Tensor:
    logits_CV: Any = _FloatProduct.apply(hidden_CD, head.weight)
    return logits_CV if head.bias is None else logits_CV + head.bias.float()


class _FloatProduct(torch.autograd.Function):
    """hidden @ weight_VD^T of bfloat16 tensors in float32, without a float32 copy of the weight on CUDA."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight_VD)
        if not hidden.is_cuda:
            return linear(hidden.float(), weight_VD.float())
        return torch.mm(hidden.flatten(0, -2), weight_VD.t(), out_dtype=torch.float32).unflatten(0, hidden.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight_VD = ctx.saved_tensors
        grad = grad.to(weight_VD.dtype)
        wants_hidden, wants_weight = ctx.needs_input_grad
        return (
            grad @ weight_VD if wants_hidden else None,
            grad.flatten(0, -2).t() @ hidden.flatten(0, -2) if wants_weight else None,
        )


def refuse_randomness(causal_lm: PreTrainedModel) -> None:
    """Raise ValueError for a model with dropout: no exact resume, and trainer and engine would differ."""
    dropout = [name for name, module in causal_lm.named_modules() if isinstance(module, nn.Dropout) and module.p > 0]
    settings = causal_lm.config.to_dict()
    dropout += [name for name in ("attention_dropout", "router_jitter_noise") if settings.get(name)]
    if dropout:
        raise ValueError(f"the model drops out at random ({', '.join(dropout)}); set these to 0 in its config.json")


def refuse_other_logits(causal_lm: PreTrainedModel) -> None:
    """Raise ValueError for a model whose own forward pass gives other log-probabilities than LogprobModel.

    Its logits are not head(base model), its attention differs, or it carries a state along the row.
    """
    use_float_head(causal_lm)
    trees = probe_trees(causal_lm)
    row = micro_batch(trees)
    tensors = (torch.from_numpy(x) for x in (row.token_ids_T, row.source_N, row.target_N, row.sequence_N))
    token_ids_T, source_N, target_N, sequence_N = tensors
    head = causal_lm.get_output_embeddings()
    assert head is not None
    with narrow_windows(causal_lm), torch.no_grad(), readable(causal_lm), _enlarged_logits(causal_lm, head, trees):
        own = [
            _own_logprobs(causal_lm, token_ids, int((sequence_N == sequence).sum()))
            for sequence, token_ids in enumerate(sequences(trees))
        ]
        model = LogprobModel(causal_lm)

        def packed() -> list[Tensor]:
            values_N = model(token_ids_T, Layout(row.lengths, row.parents), source_N, target_N)
            return [values_N[sequence_N == sequence] for sequence in range(row.num_sequences)]

        refuse_leaks(causal_lm)
        refuse_other_values(causal_lm, own, packed, quantity="log-probabilities")


def _own_logprobs(causal_lm: PreTrainedModel, token_ids: list[int], last: int) -> Tensor:
    """Compute log-probabilities of the `last` tokens of a sequence by the model's own forward pass."""
    ids_T = torch.tensor(token_ids)
    logprobs_TV = causal_lm(ids_T.unsqueeze(0), use_cache=False).logits[0].float().log_softmax(-1)
    return logprobs_TV[:-1].gather(1, ids_T[1:, None]).squeeze(1)[-last:]


@contextmanager
def _enlarged_logits(causal_lm: PreTrainedModel, head: nn.Module, trees: Sequence[Tree]) -> Iterator[None]:
    """Scale the input of the head up within the block, so that logits reach _PROBE_LOGIT.

    Otherwise a cap on logits would not be noticed: it hardly changes the small ones of an untrained model.
    """
    ids_T = torch.tensor(trees[0].root_ids)
    largest = head(causal_lm.base_model(ids_T.unsqueeze(0), use_cache=False).last_hidden_state).abs().max().item()
    factor = max(1.0, _PROBE_LOGIT / largest) if largest else 1.0
    hook = head.register_forward_pre_hook(lambda _, args: (args[0] * factor,))
    try:
        yield
    finally:
        hook.remove()
