"""A reward model in a vLLM engine in this process: token ids in, scores out. The second door to vLLM.

It shares the arguments, and with them the mends, of the engine that speaks (`rollout.engine`).
"""

from pathlib import Path

import torch

from configs.sampling import RolloutConfig
from rollout.engine import engine_arguments
from rollout.process import num_threads

from vllm import LLM, PoolingParams, TokensPrompt  # isort: skip  after rollout.engine, which sets vLLM up
from vllm.config import PoolerConfig  # isort: skip


class ScoreEngine:
    """A checkpoint of AutoModelForSequenceClassification with one label. A process holds one engine at a time."""

    def __init__(self, model: Path, config: RolloutConfig, dtype: str, batch_tokens: int) -> None:
        """Loads the folder `model` in `dtype` ("float32", "bfloat16"); a forward pass takes up to `batch_tokens`.

        Of `config` the number of engines has no meaning here. Raises as `rollout.engine.Engine` does.
        """
        # Before vLLM starts: it replaces set_num_threads by a function that does nothing.
        torch.set_num_threads(num_threads(config.threads))
        arguments = engine_arguments(model, config, dtype, seed=0) | {
            "runner": "pooling",
            "convert": "classify",
            # The score itself: without these words it would go through a sigmoid.
            "pooler_config": PoolerConfig(use_activation=False),
            "max_num_batched_tokens": max(batch_tokens, config.max_num_seqs),
            "enable_sleep_mode": False,
            "skip_tokenizer_init": False,  # this runner wants one, though it is given ids
        }
        self._llm = LLM(**arguments)

    def scores(self, sequences: list[list[int]]) -> list[float]:
        """The score of each sequence, read at its last token. Sequences that begin alike are computed once there.

        Raises ValueError for one that is empty or longer than `max_model_len`.
        """
        prompts = [TokensPrompt(prompt_token_ids=token_ids) for token_ids in sequences]
        params = PoolingParams(use_activation=False)
        outputs = self._llm.encode(prompts, params, pooling_task="classify", use_tqdm=False)
        return [output.outputs.data.item() for output in outputs]
