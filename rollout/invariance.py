"""Sampling and sums of vLLM on the CPU that don't depend on the batch, so that a completion depends on the weights, the
prompt and its own seed alone: not on the engine, nor on the other requests that it decodes.

vLLM 0.32.0 is batch invariant there but for the places that are changed here, found by comparing every module's output
over batches of 1 to 128 rows:

* Requests without a seed share one generator. With one, each has a torch.Generator of its own, which costs 3
  microseconds a token and raises where a prompt is computed in parts (`CPU Generator does not use offset`).
* torch's elementwise kernels compute the last few numbers of a tensor by another `exp` than the others, which changes
  the last bit of some router scores.
* oneDNN multiplies a single row by another kernel than several, in float32 with 1,536 inputs or more.
* Attention of a request may be split in two where the work is divided among threads (VLLM_CPU_ATTN_SPLIT_KV, which
  our engines turn off).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from vllm import _custom_ops as vllm_ops
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler, apply_top_k_top_p
from vllm.v1.worker.gpu_input_batch import CachedRequestState

from rollout.types import BEGUN

_ROWS = 32
"""Rows of router scores are padded to a multiple of this, so that their number is one of SIMD registers and threads."""
_STRIDE = np.int64(0x1E3779B97F4A7C15)
"""Odd, so that no two places of a completion have the same noise, nor those of its neighbours in the group, whose seeds
are consecutive."""


class RequestSeed:
    """The noise of one request, in the place of torch's generator: a function of its seed and of the number of its
    tokens so far, so there is no state to rewind."""

    def __init__(self, request: CachedRequestState) -> None:
        assert request.sampling_params is not None and request.sampling_params.seed is not None
        self.seed = request.sampling_params.seed
        self._begun: int = (request.sampling_params.extra_args or {}).get(BEGUN, 0)
        self._request = request

    @property
    def request(self) -> str:
        """Name of the request, to which vLLM appends a random suffix."""
        return self._request.req_id.rpartition("-")[0]

    @property
    def place(self) -> int:
        """Index of the completion's next token."""
        return self._begun + len(self._request.output_token_ids)

    def get_offset(self) -> int:
        """Return 0; vLLM rewinds a generator with it after a part of a prompt, whose sampled token is discarded."""
        return 0

    def set_offset(self, offset: int) -> None:
        """Have no effect (see get_offset)."""


def make_batch_invariant() -> None:
    """Patch vLLM in this process, before it builds a model."""
    _seed_requests()
    _pad_router_scores()
    _pad_single_rows()


def row_seeds(sources: Sequence[RequestSeed | None]) -> torch.Tensor:
    """Return the seed of each row's noise, int64 [rows], which the kernel hashes with the number of each token; a
    random one for a request without a seed, None."""
    seeds = np.array([source.seed if source else int(torch.randint(2**62, ())) for source in sources], np.int64)
    places = np.array([source.place if source else 0 for source in sources], np.int64)
    return torch.from_numpy(seeds + places * _STRIDE)  # wraps around


def _seed_requests() -> None:
    finish, sample_unseeded = CachedRequestState.__post_init__, TopKTopPSampler.forward_cpu

    def post_init(self: CachedRequestState) -> None:
        finish(self)
        if self.generator is not None:
            self.generator = RequestSeed(self)  # pyright: ignore[reportAttributeAccessIssue]

    def forward_cpu(
        self: TopKTopPSampler, logits: torch.Tensor, generators: dict[int, Any], k: Any, p: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not generators:
            return sample_unseeded(self, logits, generators, k, p)
        seeds = row_seeds([generators.get(row) for row in range(len(logits))])
        logits = apply_top_k_top_p(logits, k, p).float()
        logprobs = logits.log_softmax(dim=-1) if self.logprobs_mode == "processed_logprobs" else None
        return torch.ops._C.fused_gumbel_argmax(logits, seeds), logprobs

    if finish.__module__ != __name__:
        CachedRequestState.__post_init__, TopKTopPSampler.forward_cpu = post_init, forward_cpu


def _pad_router_scores() -> None:
    route = CPURouter._compute_routing

    def compute_routing(
        self: CPURouter, hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = len(router_logits)
        padded = pad(router_logits, (0, 0, 0, -rows % _ROWS))
        weights, experts = route(self, hidden_states, padded, *args, **kwargs)
        return weights[:rows], experts[:rows]

    if route.__module__ != __name__:
        CPURouter._compute_routing = compute_routing


def _pad_single_rows() -> None:
    multiply = vllm_ops.onednn_mm

    def onednn_mm(handler: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if x.numel() == x.shape[-1]:
            rows = x.reshape(1, -1).repeat(2, 1)
            return multiply(handler, rows, bias)[:1].view(*x.shape[:-1], -1)
        return multiply(handler, x, bias)

    if multiply.__module__ != __name__:
        vllm_ops.onednn_mm = onednn_mm
