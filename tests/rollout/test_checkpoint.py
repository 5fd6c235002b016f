"""Facts read from a checkpoint's folder, and models that engines on a CPU refuse."""

import json
from pathlib import Path
from typing import Any

import pytest

from rollout.checkpoint import CPU_HEAD_SIZES, refuse_head_size

DENSE = {"hidden_size": 64, "num_attention_heads": 2}


def folder(path: Path, settings: dict[str, Any]) -> Path:
    (path / "config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize(
    "settings",
    [
        DENSE,
        DENSE | {"head_dim": 128},
        DENSE | {"head_dim": None},
        {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "head_dim": 64},
        {"text_config": DENSE, "hidden_size": 16, "num_attention_heads": 1},
        {"model_type": "mamba", "hidden_size": 16},
    ],
)
def test_widths_with_a_kernel_are_accepted(settings: dict[str, Any], tmp_path: Path) -> None:
    refuse_head_size(folder(tmp_path, settings))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (DENSE | {"num_attention_heads": 4}, r"heads of 16 \(hidden_size / num_attention_heads\)"),
        (DENSE | {"head_dim": 48}, r"heads of 48 \(head_dim\)"),
        ({"kv_lora_rank": 8, "qk_nope_head_dim": 32, "qk_rope_head_dim": 8}, "heads of 40"),
        ({"text_config": DENSE | {"head_dim": 16}, "head_dim": 64}, "heads of 16"),
    ],
)
def test_other_widths_are_refused_with_those_that_there_are(
    settings: dict[str, Any], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"{complaint}.*32, 64, 80"):
        refuse_head_size(folder(tmp_path, settings))


@pytest.mark.engine
def test_the_widths_are_those_of_the_vllm_that_is_installed() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert tuple(CPUAttentionBackend.get_supported_head_sizes()) == CPU_HEAD_SIZES
