"""Settings of GRPO that exclude each other, or have no effect."""

from typing import Any

import pytest
from pydantic import ValidationError

from configs.grpo import GRPOConfig
from tests.settings import GRPO


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": {"max_tokens": 8, "top_p": 0.9}}, "needs sampling.top_k"),
        ({"sampling": {"max_tokens": 8, "top_k": 2049}}, "at most 2048"),
        ({"objective": {"reference_every_steps": 2}}, "no effect within steps=2"),
        ({"objective": {"reference_every_steps": 1, "kl_coef": 0}}, "kl_coef above 0"),
        ({"objective": {"kl_target": 0.1, "kl_coef": 0}}, "kl_coef above 0"),
        ({"objective": {"kl_target": 0.1, "kl_coef_of": {"math": 0.0}}}, "remove kl_coef_of"),
    ],
)
def test_settings_without_effect_are_refused(changes: dict[str, Any], message: str) -> None:
    GRPOConfig.model_validate(GRPO)
    with pytest.raises(ValidationError, match=message):
        GRPOConfig.model_validate(GRPO | changes)
