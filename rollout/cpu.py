"""vLLM on the CPU: what it can't do is refused, what it does wrong is mended, what it does slowly is avoided.

vLLM 0.32.0 is silently wrong in three places there:

* its rotary kernel takes the queries of DeepSeek's attention, [tokens, heads, rope], for one head;
* a reload leaves the experts in the checkpoint's layout, where the kernel reads its packed one;
* a reload leaves an output head that is tied to the embedding with the packed copy of the weights before.
"""

import inspect
import os
import re
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.quantization.online import fp8 as online_fp8
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.v1.sample import sampler

from configs.sampling import RolloutConfig
from rollout.checkpoint import checkpoint_shapes, refuse_head_size

FP8_WIDTH = 32
"""The FP8 product of the CPU takes inputs in multiples of this. vLLM pads experts, but no other map."""
_MAP = re.compile(r"(?<!\.experts)\.[^.]*_proj(_with_mqa)?\.weight$")


def cpu_arguments(model: Path, config: RolloutConfig) -> dict[str, Any]:
    """What vLLM's LLM needs to hear on the CPU, after it was mended. Raises ValueError for what can't be done there."""
    if config.tensor_parallel_size > 1:
        raise ValueError(
            f"rollout.tensor_parallel_size={config.tensor_parallel_size} needs accelerators; set it to 1 on the CPU"
        )
    refuse_head_size(model)
    _refuse_fp8(model, config)
    _mend_rotary_kernel()
    _mend_expert_reload()
    _leave_uncompiled()
    # DeepSeek's attention runs with its keys and values expanded: a quarter faster here than over the latent cache,
    # whose CPU kernel can neither share a prompt within its group nor take a latent size other than 576.
    os.environ.setdefault("VLLM_MLA_DISABLE", "1")
    # A small block, so that even short prompts are shared. Where the latent cache is asked for all the same, the
    # backend named is the only one that computes in float32; others ignore it.
    return {"block_size": 32, "attention_backend": "CPU_MLA"}


def mend_tied_head(worker: Any) -> None:
    """Packs the output head after a load: of a tied one vLLM thinks that nothing was loaded."""
    for module in worker.get_model().modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def _refuse_fp8(model: Path, config: RolloutConfig) -> None:
    amx = torch.cpu._is_amx_tile_supported()
    if "weights" in config.fp8 and not amx:
        raise ValueError("rollout.fp8: 'weights' needs AMX, which this CPU lacks (Sapphire Rapids has it); remove it")
    if "kv_cache" in config.fp8 and not (amx or torch.cpu._is_avx512_supported()):
        raise ValueError("rollout.fp8: 'kv_cache' needs AVX-512 or AMX, which this CPU lacks; remove it")
    if "weights" in config.fp8:
        for name, shape in checkpoint_shapes(model).items():
            if _MAP.search(name) and shape[-1] % FP8_WIDTH:
                raise ValueError(
                    f"rollout.fp8: 'weights' takes maps of multiples of {FP8_WIDTH} inputs on the CPU, '{name}' has "
                    f"{shape[-1]}; remove it"
                )


def _leave_uncompiled() -> None:
    """vLLM compiles two small functions where an engine first uses them: the quantiser, whose every new form of matrix
    costs half a minute, and the rank of a token by its logits, which costs each engine 3 to 8 seconds."""
    for module, function in ((online_fp8, "per_block_cast_to_fp8"), (sampler, "batched_count_greater_than")):
        setattr(module, function, inspect.unwrap(getattr(module, function)))


def _mend_rotary_kernel() -> None:
    """Hands the kernel its queries flat, [tokens, heads * rope]: in that form it rotates every head."""
    kernel = RotaryEmbedding.forward_cpu

    def forward_cpu(
        self: RotaryEmbedding, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        flat_query, flat_key = kernel(self, positions, query.flatten(1), None if key is None else key.flatten(1))
        return flat_query.view(query.shape), None if key is None or flat_key is None else flat_key.view(key.shape)

    if kernel.__module__ != __name__:
        RotaryEmbedding.forward_cpu = forward_cpu


def _mend_expert_reload() -> None:
    """Packs the experts on every load: vLLM does so on the first only, when it makes the kernel."""
    setup = UnquantizedFusedMoEMethod._setup_kernel

    def setup_kernel(self: UnquantizedFusedMoEMethod, layer: Any, w13: torch.Tensor, w2: torch.Tensor) -> None:
        reloads = self.moe_kernel is not None
        setup(self, layer, w13, w2)
        if reloads:
            assert self.moe_kernel is not None
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    if setup.__module__ != __name__:
        UnquantizedFusedMoEMethod._setup_kernel = setup_kernel
