"""Settings, refusals and patches for vLLM on the CPU.

vLLM 0.32.0 computes wrong results there, without an error, in three places that are patched here:

* The rotary kernel treats the queries of DeepSeek's attention, [tokens, heads, rope], as one head.
* A reload leaves experts in the checkpoint's layout, but the kernel reads its own packed layout.
* A reload leaves the packed copy of an output head that is tied to the embedding at its old weights.
"""

import inspect
import os
import re
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, cast

import torch
from vllm import _custom_ops as vllm_ops
from vllm import envs
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization.online import fp8 as online_fp8
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.v1.sample import sampler

from configs.sampling import RolloutConfig
from rollout.checkpoint import checkpoint_shapes, is_in_fp8, refuse_head_size
from rollout.invariance import make_batch_invariant
from rollout.memory import cache_gib
from rollout.process import num_threads
from rollout.version import PATCHED_VLLM

PLUGIN = "alignyard"
"""Name of the entry point of rollout.plugin in pyproject.toml, by which VLLM_PLUGINS knows it."""
FP8_BLOCK = 128
"""Side of the blocks in which vLLM quantises weights."""
FP8_WIDTH = 32
"""The CPU's FP8 product needs input sizes that are multiples of this. vLLM pads those of experts only."""
_CACHED_SHAPES = 32
"""Numbers of rows for which oneDNN keeps a kernel, as vLLM sets it."""
_MAP = re.compile(r"_proj(_with_mqa)?\.weight$")


def cpu_arguments(model: Path, config: RolloutConfig) -> dict[str, Any]:
    """Patch vLLM for the CPU and return its arguments. Raises ValueError for a model or setting it can't compute."""
    refuse_head_size(model)
    _refuse_fp8(model, config)
    patch_vllm()
    # Expand the keys and values of DeepSeek's attention: a quarter faster than the latent cache, whose CPU kernel can't
    # share a prompt within its group and takes no latent size but 576.
    os.environ.setdefault("VLLM_MLA_DISABLE", "1")
    os.environ["VLLM_CPU_ATTN_SPLIT_KV"] = "0"  # where a request's attention is split depends on the others' lengths
    if config.tensor_parallel_size > 1:
        refuse_unpatched_workers()
        # Worker processes take their threads from here, since vLLM would bind each to a NUMA node of its own.
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["OMP_NUM_THREADS"] = str(max(num_threads(config.threads) // config.tensor_parallel_size, 1))
    # Small blocks share even short prompts. CPU_MLA is the only backend for the latent cache that computes in float32;
    # models without a latent cache ignore it.
    cache = int(cache_gib(config) * 2**30)
    arguments = {"block_size": 32, "attention_backend": "CPU_MLA", "kv_cache_memory_bytes": cache}
    return arguments | ({"quantization": None} if rounds_to_fp8(config) else {})


def rounds_to_fp8(config: RolloutConfig) -> bool:
    """Return True where weights are to be in FP8, and this CPU has no AMX, which vLLM's product needs
    (model_executor/kernels/linear/scaled_mm/cpu.py, 0.32.0): they are rounded to FP8 instead."""
    return "weights" in config.fp8 and not torch.cpu._is_amx_tile_supported()


def rounded_to_fp8(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Round a weight, named as in its checkpoint, to the numbers that vLLM's quantiser has in blocks of 128 x 128, in
    bfloat16; return tensors that it does not quantise as they are.

    vLLM's product on a CPU multiplies such blocks with activations in bfloat16. So what is left out is that it applies
    the scales to sums in float32, and that parts of a merged matrix may share a block.
    """
    if not _MAP.search(name):
        return weight
    data_NK, scale = cast(Any, online_fp8).per_block_cast_to_fp8(weight.bfloat16(), [FP8_BLOCK, FP8_BLOCK])
    by_row = scale.repeat_interleave(FP8_BLOCK, 0)[: len(data_NK)]
    scale_NK = by_row.repeat_interleave(FP8_BLOCK, 1)[:, : data_NK.shape[1]]
    return (data_NK.float() * scale_NK).bfloat16()


def refuse_unpatched_workers() -> None:
    """Raise RuntimeError where the workers of an engine would not load rollout.plugin, and compute wrong results."""
    if not any(point.name == PLUGIN for point in entry_points(group="vllm.general_plugins")):
        raise RuntimeError(
            f"vLLM's workers don't find the plug-in '{PLUGIN}', whose patches vLLM {PATCHED_VLLM} needs on the CPU: "
            "the installation is older than the source; install alignyard again (in a checkout: make setup)"
        )
    if envs.VLLM_PLUGINS is not None and PLUGIN not in envs.VLLM_PLUGINS:
        raise RuntimeError(
            f"VLLM_PLUGINS keeps out '{PLUGIN}', whose patches vLLM needs on the CPU; add it or unset the variable"
        )


def patch_vllm() -> None:
    """Patch vLLM in this process; its worker processes do it as they start (see rollout.plugin)."""
    _patch_rotary_kernel()
    _patch_expert_reload()
    _patch_float_head()
    make_batch_invariant()
    _skip_compilation()


def pack_output_head(worker: Any) -> None:
    """Pack the output head after it is loaded: after a reload vLLM skips a head that is tied to the embedding, and for
    float32 logits of a bfloat16 model it would convert the whole weight at every step."""
    heads: list[Any] = [module for module in worker.get_model().modules() if isinstance(module, ParallelLMHead)]
    for head in heads:
        head.quant_method.process_weights_after_loading(head)
        if head.weight.dtype != torch.float32:
            handler = vllm_ops.create_onednn_mm(head.weight.float().t(), _CACHED_SHAPES)
            head.cpu_linear, head.is_packed_in_float32 = partial(_multiply, handler), True


def _multiply(handler: Any, x: torch.Tensor, _weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return vllm_ops.onednn_mm(handler, x, bias)


def _refuse_fp8(model: Path, config: RolloutConfig) -> None:
    amx = torch.cpu._is_amx_tile_supported()
    if "kv_cache" in config.fp8 and not (amx or torch.cpu._is_avx512_supported()):
        raise ValueError("rollout.fp8: 'kv_cache' needs AVX-512 or AMX, which this CPU lacks; remove it")
    if is_in_fp8(model) and not amx:
        raise ValueError(f"'{model}' is in FP8, whose products need AMX, which this CPU lacks; take one in bfloat16")
    if "weights" in config.fp8 and amx:
        for name, shape in checkpoint_shapes(model).items():
            if _MAP.search(name) and ".experts." not in name and shape[-1] % FP8_WIDTH:
                raise ValueError(
                    f"rollout.fp8: 'weights' takes maps of multiples of {FP8_WIDTH} inputs on the CPU, '{name}' has "
                    f"{shape[-1]}; remove it"
                )


def _skip_compilation() -> None:
    """Run two small functions uncompiled: compiling vLLM's quantiser takes half a minute for each matrix shape, the
    function that ranks a token by its logits 3 to 8 seconds for each engine."""
    for module, function in ((online_fp8, "per_block_cast_to_fp8"), (sampler, "batched_count_greater_than")):
        setattr(module, function, inspect.unwrap(getattr(module, function)))


def _patch_rotary_kernel() -> None:
    """Pass queries to the kernel as [tokens, heads * rope], which makes it rotate every head."""
    kernel = RotaryEmbedding.forward_cpu

    def forward_cpu(
        self: RotaryEmbedding, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        flat_query, flat_key = kernel(self, positions, query.flatten(1), None if key is None else key.flatten(1))
        return flat_query.view(query.shape), None if key is None or flat_key is None else flat_key.view(key.shape)

    if kernel.__module__ != __name__:
        RotaryEmbedding.forward_cpu = forward_cpu


def _patch_float_head() -> None:
    """Compute float32 logits of a bfloat16 model with the weight that `pack_output_head` has packed, if it has."""
    apply = LogitsProcessor._apply_head

    def apply_head(
        self: LogitsProcessor, lm_head: Any, hidden_states: torch.Tensor, embedding_bias: torch.Tensor | None
    ) -> torch.Tensor:
        if not getattr(lm_head, "is_packed_in_float32", False):
            return apply(self, lm_head, hidden_states, embedding_bias)
        return lm_head.quant_method.apply(lm_head, hidden_states.to(self.head_dtype), bias=embedding_bias)

    if apply.__module__ != __name__:
        LogitsProcessor._apply_head = apply_head


def _patch_expert_reload() -> None:
    """Pack experts at every load; vLLM packs them only at the first, when it makes the kernel."""
    setup = UnquantizedFusedMoEMethod._setup_kernel

    def setup_kernel(self: UnquantizedFusedMoEMethod, layer: Any, w13: torch.Tensor, w2: torch.Tensor) -> None:
        is_reload = self.moe_kernel is not None
        setup(self, layer, w13, w2)
        if is_reload:
            assert self.moe_kernel is not None
            self.moe_kernel.fused_experts.process_weights_after_loading(layer)

    if setup.__module__ != __name__:
        UnquantizedFusedMoEMethod._setup_kernel = setup_kernel
