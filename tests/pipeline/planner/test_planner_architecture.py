import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.models.attention import Layout
from pipeline.models.logprobs import LogprobModel
from pipeline.planner.architecture import HUB, PUBLISHED, architecture_of, as_reward_model
from tests.pipeline.small_models import FAMILIES, small_config


@pytest.mark.parametrize(
    ("model", "total", "active", "mtp"),
    [
        ("deepseek-ai/DeepSeek-V2", "236", "21", "0"),  # arXiv:2405.04434, abstract
        ("deepseek-ai/DeepSeek-V2-Lite", "15.7", "2.4", "0"),  # the same, appendix B
        ("deepseek-ai/DeepSeek-V3", "671", "37", "12"),  # arXiv:2412.19437; the module: 685B on the hub with two copies
        ("Qwen/Qwen3-30B-A3B", "30.5", "3.0", "0"),
        ("Qwen/Qwen3-235B-A22B", "235", "22", "0"),
    ],
)
def test_parameters_are_the_papers(model: str, total: str, active: str, mtp: str) -> None:
    known = architecture_of(model)

    def told(count: int, like: str) -> str:
        return f"{int(count / 1e8) / 10}" if "." in like else f"{count / 1e9:.0f}"

    assert (told(known.total, total), told(known.active, active), told(known.mtp, mtp)) == (total, active, mtp)


def test_a_reward_model_has_a_head_for_one_score() -> None:
    policy = architecture_of("deepseek-ai/DeepSeek-V2-Lite")
    assert as_reward_model(policy).total == policy.total - policy.vocab * policy.hidden + policy.hidden


def test_what_a_token_leaves_in_the_cache() -> None:
    # DeepSeek-V2 table 1: MLA caches (d_c + d_R) l = (512 + 64) x 60; GQA 2 x heads x width x layers.
    assert architecture_of("deepseek-ai/DeepSeek-V2").kv == 576 * 60
    assert architecture_of("Qwen/Qwen3-30B-A3B").kv == 2 * 4 * 128 * 48


def test_every_shipped_architecture_has_a_name_on_the_hub() -> None:
    assert {file.stem for file in PUBLISHED.glob("*.json")} == set(HUB.values())


def test_an_unknown_hub_model_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"'someone/else'.*--model-config FILE.*deepseek-ai/DeepSeek-V3"):
        architecture_of("someone/else")


def test_a_checkpoint_and_a_file_are_read(tmp_path: Path) -> None:
    small_config("llama").save_pretrained(tmp_path)
    known = architecture_of(str(tmp_path))
    # Tied: 264 x 64; a layer: 64 x 64 + 2 x 64 x 32 + 64 x 64, 3 x 64 x 96, two norms; a norm at the end.
    assert known.total == known.active == 264 * 64 + 2 * (12288 + 18432 + 128) + 64
    assert architecture_of(str(tmp_path / "config.json")).total == known.total
    (tmp_path / "other.json").write_text(json.dumps({"model_type": "abacus"}))
    with pytest.raises(ValueError, match="model_type 'abacus'"):
        architecture_of(str(tmp_path / "other.json"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_for_the_backward_pass_is_what_autograd_keeps(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    config, tokens = small_config(family), 256
    config.save_pretrained(tmp_path)
    known = architecture_of(str(tmp_path))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    packed = LogprobModel(model)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: Counter[int] = Counter()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids_T = torch.arange(tokens) % 250
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        values_N = packed(ids_T, Layout((64,) * 4, (-1,) * 4), torch.arange(tokens - 1), ids_T[1:])
    assert values_N.isfinite().all()
    counted = sum(kept.values()) / tokens / dtype.itemsize
    outside = known.hidden * (2 if dtype == torch.float32 else 4)  # the last norm, and what the head reads
    saved = known.saved_lean if dtype == torch.float32 else known.saved
    assert saved + outside == pytest.approx(counted, rel=0.03)
