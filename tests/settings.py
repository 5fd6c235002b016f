"""Settings of small stages, for tests that change some of them or give them to the command."""

from typing import Any

GRPO: dict[str, Any] = {
    "type": "grpo",
    "model": {"path": "x"},
    "prompts": {"source": {"type": "sums", "size": 10}, "max_prompt_length": 16},
    "rewards": [{"name": "math"}],
    "steps": 2,
    "prompts_per_step": 4,
    "group_size": 2,
    "sampling": {"max_tokens": 8},
    "optimizer": {"learning_rate": 1e-3},
    "rollout": {"max_model_len": 64},
}
TINY_SFT = """\
type: sft
model: {init_config: tiny, init_seed: 0}
data: {source: {type: sums, size: 64}, max_length: 64}
conversations_per_step: 4
steps: 1
optimizer: {learning_rate: 1e-3}
trainer: {micro_batch_tokens: 512}
"""
