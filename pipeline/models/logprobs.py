"""Log-probabilities of chosen tokens, without the logits of a whole batch ever existing.

The head runs on chunks of rows, only those that predict a trained token; each chunk's float32 logits are recomputed in
the backward pass instead of kept. Memory is chunk x V, whatever the batch.

Legend: T tokens of the packed row, N trained tokens, C rows of a chunk, D model width, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from pipeline.models.attention import PACKED, Layout
from pipeline.models.experts import SORTED
from pipeline.models.norms import use_lean_norms

CHUNK_TOKENS = 1024
"""Rows of float32 logits alive at once: 0.5 GB at DeepSeek-V3's vocabulary."""


class LogprobModel(nn.Module):
    """A causal LM whose forward answers with the log-probabilities of given tokens.

    `causal_lm` must be a `transformers` model with a base model and an output head; its attention is switched to the
    packed one, its experts and norms to ours.
    """

    def __init__(self, causal_lm: PreTrainedModel, chunk_tokens: int = CHUNK_TOKENS) -> None:
        super().__init__()
        causal_lm.set_attn_implementation(PACKED)
        causal_lm.set_experts_implementation(SORTED)
        use_lean_norms(causal_lm)
        self.causal_lm: PreTrainedModel = causal_lm
        self.chunk_tokens = chunk_tokens

    def forward(self, token_ids_T: Tensor, layout: Layout, source_N: Tensor, target_N: Tensor) -> Tensor:
        """float32 [N]: log pi(target_N[i] | what row source_N[i] has seen), in nats.

        token_ids_T int64 [T]; source_N int64 [N] rows of T; target_N int64 [N] token ids.
        """
        device = token_ids_T.device
        hidden_TD = self.causal_lm.base_model(
            input_ids=token_ids_T.unsqueeze(0),
            position_ids=layout.position_ids_T.to(device).unsqueeze(0),
            layout=layout,
            use_cache=False,
        ).last_hidden_state[0]
        hidden_ND = hidden_TD[source_N]
        chunks = zip(hidden_ND.split(self.chunk_tokens), target_N.split(self.chunk_tokens), strict=True)
        if torch.is_grad_enabled():
            logprobs = [checkpoint(self._logprobs, h_CD, t_C, use_reentrant=False) for h_CD, t_C in chunks]
        else:
            logprobs = [self._logprobs(h_CD, t_C) for h_CD, t_C in chunks]
        return torch.cat(logprobs)

    def _logprobs(self, hidden_CD: Tensor, target_C: Tensor) -> Tensor:
        head = self.causal_lm.get_output_embeddings()
        assert head is not None
        logits_CV = head(hidden_CD).float()
        return logits_CV.gather(1, target_C.unsqueeze(1)).squeeze(1) - logits_CV.logsumexp(1)


def refuse_randomness(causal_lm: PreTrainedModel) -> None:
    """Raise ValueError for a model that draws random numbers in training: its resume would not be exact, and trainer
    and engine would not agree."""
    dropout = [name for name, module in causal_lm.named_modules() if isinstance(module, nn.Dropout) and module.p > 0]
    settings = causal_lm.config.to_dict()
    dropout += [name for name in ("attention_dropout", "router_jitter_noise") if settings.get(name)]
    if dropout:
        raise ValueError(f"the model drops out at random ({', '.join(dropout)}); set these to 0 in its config.json")


def refuse_other_logits(causal_lm: PreTrainedModel) -> None:
    """Raise ValueError for a model that makes its logits otherwise than head(base model), or attends otherwise than
    packed attention does (soft caps, scaled logits, sinks): its log-probabilities here would be wrong."""
    token_ids_T = torch.arange(1, 17) % causal_lm.config.get_text_config().vocab_size
    with torch.no_grad():
        own_TV = causal_lm(token_ids_T.unsqueeze(0), use_cache=False).logits[0].float().log_softmax(-1)
        expected_N = own_TV[:-1].gather(1, token_ids_T[1:, None]).squeeze(1)
        packed = LogprobModel(causal_lm, chunk_tokens=16)
        values_N = packed(token_ids_T, Layout((16,), (-1,)), torch.arange(15), token_ids_T[1:])
    gap = (values_N - expected_N).abs().max().item()
    if gap > (1e-3 if causal_lm.dtype == torch.float32 else 0.3):
        raise ValueError(
            f"{type(causal_lm).__name__} computes its logits in a way that is not supported (log-probabilities differ "
            f"by {gap:.1e} from the model's own): logits that are scaled or capped after the head, or attention sinks"
        )
