"""Loading: a rank's memory by the kernel's high-water mark, and what it reads of the checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3Config

from pipeline.models.tokenizer import byte_tokenizer
from tests.pipeline import load_ranks
from tests.pipeline.rank_processes import run_ranks

MIB = 2**20


def mixture(folder: Path, *, layers: int, width: int, experts: int, dtype: torch.dtype) -> Path:
    """A checkpoint of a DeepSeek-V3 of equal layers, all of them mixtures."""
    config = DeepseekV3Config(
        vocab_size=264,
        hidden_size=width,
        moe_intermediate_size=width,
        num_hidden_layers=layers,
        first_k_dense_replace=0,
        n_routed_experts=experts,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def loaded(model: Path, folder: Path, dtype: str, zero: int, experts: int) -> list[dict[str, int]]:
    """The figures of two ranks."""
    small = mixture(folder / "small", layers=2, width=64, experts=4, dtype=torch.float32)
    run_ranks(load_ranks.main, 2, folder, model, small, folder / "figures", dtype, zero, experts)
    return [json.loads((folder / f"figures-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.ranks
@pytest.mark.parametrize(("zero", "experts"), [(3, 1), (3, 2), (2, 1)])
def test_a_rank_never_holds_more_than_its_part_and_two_layers(tmp_path: Path, zero: int, experts: int) -> None:
    """Without ZeRO-3, its part is the model, once."""
    model = mixture(tmp_path / "model", layers=12, width=256, experts=16, dtype=torch.float32)
    assert_bounded(model, 12, loaded(model, tmp_path, "float32", zero, experts), zero, slack=24)


@pytest.mark.ranks
@pytest.mark.slow
def test_nor_of_a_model_of_gigabytes(tmp_path: Path) -> None:
    model = mixture(tmp_path / "model", layers=16, width=1024, experts=16, dtype=torch.bfloat16)
    assert_bounded(model, 16, loaded(model, tmp_path, "bfloat16", 3, 1), 3, slack=128)


def assert_bounded(model: Path, layers: int, figures: list[dict[str, int]], zero: int, slack: int) -> None:
    whole = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    print(whole / MIB, [{name: round(x / MIB) for name, x in each.items()} for each in figures])
    assert 0.99 * whole < sum(each["read"] for each in figures) <= whole  # each byte once, by one of them
    for each in figures:
        assert each["kept"] < (0.52 if zero == 3 else 1.01) * whole
        assert each["peak"] - each["before"] < each["kept"] + 2 * whole / layers + slack * MIB
        assert each["read"] > 0.4 * whole
