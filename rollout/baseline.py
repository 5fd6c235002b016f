"""vLLM alone, with its own defaults, as the benchmarks' baseline."""

import time
from pathlib import Path

import torch

import rollout.engine  # noqa: F401  sets vLLM up, before it is imported
from configs.sampling import RolloutConfig, SamplingConfig
from rollout.memory import cache_gib
from rollout.process import num_threads

from vllm import LLM, SamplingParams, TokensPrompt  # isort: skip
from vllm.platforms import current_platform  # isort: skip


def time_plain_vllm(
    model: Path,
    config: RolloutConfig,
    prompts: list[list[int]],
    sampling: SamplingConfig,
    num_completions: int,
    repeats: int,
) -> list[float]:
    """Seconds of each run of `LLM.generate` with vLLM's defaults in float32, in this process; a first, slower run is
    not counted."""
    torch.set_num_threads(num_threads(config.threads))
    llm = LLM(
        model=str(model),
        dtype="float32",
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        kv_cache_memory_bytes=int(cache_gib(config) * 2**30),
        enforce_eager=current_platform.is_cpu(),
        distributed_executor_backend="uni",
        attention_backend="CPU_MLA" if current_platform.is_cpu() else None,  # another fails in float32 on some CPUs
    )
    params = SamplingParams(
        n=num_completions,
        temperature=sampling.temperature,
        max_tokens=sampling.max_tokens,
        ignore_eos=sampling.ignore_eos,
    )
    seconds: list[float] = []
    for _ in range(repeats + 1):
        llm.reset_prefix_cache()
        started = time.perf_counter()
        llm.generate([TokensPrompt(prompt_token_ids=ids) for ids in prompts], params, use_tqdm=False)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]
