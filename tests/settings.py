"""Settings of a small GRPO stage, for tests that change some of them."""

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
