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


class LogprobModel(nn.Module):
    """A causal LM whose forward answers with the log-probabilities of given tokens.

    `causal_lm` must be a `transformers` model with a base model and an output head; its attention is switched to the
    packed one.
    """

    def __init__(self, causal_lm: PreTrainedModel, chunk_tokens: int) -> None:
        super().__init__()
        causal_lm.set_attn_implementation(PACKED)
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
