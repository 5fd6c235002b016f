"""A vLLM engine in this process that scores token ids with a reward model.

It takes vLLM's arguments and patches from `rollout.engine`.
"""

from pathlib import Path

import torch

from configs.sampling import RolloutConfig
from rollout.engine import engine_arguments
from rollout.process import num_threads

from vllm import LLM, PoolingParams, TokensPrompt  # isort: skip  after rollout.engine, which sets vLLM up
from vllm.config import PoolerConfig  # isort: skip
from vllm.platforms import current_platform  # isort: skip


class ScoreEngine:
    """A checkpoint of AutoModelForSequenceClassification with one label. A process holds one engine at a time."""

    def __init__(self, model: Path, config: RolloutConfig, dtype: str, batch_tokens: int) -> None:
        """Load the folder `model` in `dtype` ("float32", "bfloat16"); a forward pass takes up to `batch_tokens`.

        `config.num_engines` is not used. Raises as RolloutEngine does, and ValueError for weights in FP8 on a CPU
        without AMX.
        """
        if current_platform.is_cpu():
            _refuse_rounding(config)
        # Before vLLM starts: it replaces set_num_threads by a function that does nothing.
        torch.set_num_threads(num_threads(config.threads))
        arguments = engine_arguments(model, config, dtype, seed=0) | {
            "runner": "pooling",
            "convert": "classify",
            # Without this vLLM returns sigmoid(score).
            "pooler_config": PoolerConfig(use_activation=False),
            "max_num_batched_tokens": max(batch_tokens, config.max_num_seqs),
            "enable_sleep_mode": False,
            "skip_tokenizer_init": False,  # the pooling runner needs one, even for ids
        }
        if "weights" in config.fp8:
            arguments["quantization_config"] = {"ignore": ["score"]}  # one row, which no block of 128 fits
        self._llm = LLM(**arguments)

    def scores(self, sequences: list[list[int]]) -> list[float]:
        """Score each sequence at its last token; a common beginning of several is computed once.

        Raises ValueError for a sequence that is empty or longer than `max_model_len`.
        """
        prompts = [TokensPrompt(prompt_token_ids=token_ids) for token_ids in sequences]
        params = PoolingParams(use_activation=False)
        outputs = self._llm.encode(prompts, params, pooling_task="classify", use_tqdm=False)
        return [output.outputs.data.item() for output in outputs]


def _refuse_rounding(config: RolloutConfig) -> None:
    from rollout.cpu import rounds_to_fp8  # names modules of one release of vLLM

    if rounds_to_fp8(config):
        raise ValueError("fp8: 'weights' of a reward model need a GPU, or a CPU with AMX; remove it")
