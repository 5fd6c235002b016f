"""Adapters: their gradients, what is sent and written of them, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from configs.lora import LoraConfig
from pipeline.data.trees import Tree, micro_batch
from pipeline.models.attention import Layout
from pipeline.models.logprobs import LogprobModel
from pipeline.models.lora import LoraProduct, merge_adapters, merged_weight, without_adapters
from pipeline.models.score import ScoreModel
from pipeline.models.tokenizer import load_tokenizer
from pipeline.planner.architecture import architecture_of
from pipeline.planner.memory import TrainLayout, train_state
from pipeline.weights.adapters import prepare_adapters, write_adapters
from pipeline.weights.fill import layers
from pipeline.weights.load import load_model, save_hf
from pipeline.weights.resolve import check_adapters
from pipeline.weights.reward_model import load_score_model, new_score_model, save_score_model
from tests.pipeline import reward_ranks, train_ranks
from tests.pipeline.rank_processes import run_ranks
from tests.pipeline.sharding import shard
from tests.pipeline.small_models import small_causal_lm
from tests.pipeline.stage_configs import grpo, rm, sft

LORA = LoraConfig(rank=3, alpha=6.0)
MLA = LORA.model_copy(
    update={"targets": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "self_attn.kv_b_proj", "o_proj"]}
)
"""The adapters of a mixture that `peft` 0.21 reads: it takes those of MLPs for adapters of the routed experts."""
ROW = micro_batch([Tree([5, 9, 14, 3, 8], root_mask=[0, 1, 1, 1, 1]), Tree([7, 2, 11], root_mask=[0, 1, 1])])


def test_a_layer_multiplies_by_the_merged_weight_and_its_gradients_are_those_of_the_parts() -> None:
    """Worked by hand with s = 1/2: B A = [2 -2; 0 0] makes W' = [2 1; 3 4], so y = W' [1 3]^T = [5 15]. For G = [1 2]:
    dx = G W' = [8 9]; G B = 2 makes dA = 1/2 * 2 * [1 3]; x A^T = -2 makes dB = 1/2 * -2 * [1 2]^T."""
    x = torch.tensor([[1.0, 3.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    a = torch.tensor([[1.0, -1.0]], requires_grad=True)
    b = torch.tensor([[2.0], [0.0]], requires_grad=True)
    assert merged_weight(weight, a, b, 0.5).tolist() == [[2, 1], [3, 4]]
    y: Any = LoraProduct.apply(x, weight, a, b, None, 0.5)
    assert y.tolist() == [[5, 15]]
    y.backward(torch.tensor([[1.0, 2.0]]))
    assert x.grad is not None and a.grad is not None and b.grad is not None
    assert (x.grad.tolist(), a.grad.tolist(), b.grad.tolist()) == ([[8, 9]], [[1, 3]], [[-1], [-2]])


def adapted(folder: Path, dtype: Any, lora: LoraConfig = LORA) -> Any:
    """The model of `folder` with adapters as after some training."""
    model: Any = load_model(folder, dtype)
    prepare_adapters(model, lora)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.2, generator=generator)
    return model


def merged_parts(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: tensor.detach() for layer in layers(model) for name, tensor in merge_adapters(model, dict(layer)).items()
    }


def logprobs(model: Any) -> Tensor:
    token_ids_T, source_N, target_N = map(torch.from_numpy, (ROW.token_ids_T, ROW.source_N, ROW.target_N))
    return model(token_ids_T, Layout(ROW.lengths, ROW.parents), source_N, target_N)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3"])
def test_gradients_of_adapters_are_projections_of_the_merged_models(family: str, tmp_path: Path) -> None:
    """dA = s B^T dW' and dB = s dW' A^T, with the gradient dW' of a model whose weights are the merged ones."""
    model = adapted(small_causal_lm(family, tmp_path / "lm"), "float32")
    dense = load_model(tmp_path / "lm", "float32")
    dense.load_state_dict(merged_parts(model))
    for causal_lm in (model, dense):
        logprobs(LogprobModel(causal_lm)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in dense.named_parameters()}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.grad is not None}
    stems = [name.removesuffix("lora_A") for name in trained if name.endswith("lora_A")]
    assert len(trained) == 2 * len(stems) and any("o_proj" in stem for stem in stems)
    for stem in stems:
        full, a, b = gradients[stem + "weight"], trained[stem + "lora_A"], trained[stem + "lora_B"]
        torch.testing.assert_close(a.grad, 2.0 * b.t() @ full, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b.grad, 2.0 * full @ a.t(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_is_the_policy_and_peft_reads_its_adapters(dtype: Any, tmp_path: Path) -> None:
    """Merged weights give the policy's log-probabilities to the bit, and so does a policy that starts from the folder.
    `peft` adds the adapter to the result of the layer, so it rounds otherwise."""
    base = small_causal_lm("deepseek_v3", tmp_path / "lm")
    model = adapted(base, dtype, MLA)
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}

    def write(folder: Path) -> None:
        write_adapters(model, trained, MLA, base, folder)

    save_hf(model, load_tokenizer(base), tmp_path / "hf", [merged_parts(model)], write)
    started = MLA.model_copy(update={"start": str(tmp_path / "hf")})
    check_adapters(started)
    again: Any = load_model(base, dtype)
    prepare_adapters(again, started)
    with torch.no_grad():
        policy, exported = LogprobModel(model), LogprobModel(load_model(tmp_path / "hf", dtype))
        assert torch.equal(logprobs(policy), logprobs(exported))
        assert torch.equal(logprobs(policy), logprobs(LogprobModel(again)))
        plain = logprobs(LogprobModel(load_model(base, dtype)))
        with without_adapters(model):
            assert torch.equal(logprobs(policy), plain)
        assert not torch.allclose(logprobs(policy), plain, atol=1e-2)
        if dtype == "float32":
            ids = torch.tensor([[5, 9, 14, 3, 8]])
            own = AutoModelForCausalLM.from_pretrained(base)
            theirs = PeftModel.from_pretrained(own, tmp_path / "hf" / "adapter")(ids).logits
            ours = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(ids).logits
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_the_head_of_a_reward_model_is_trained_whole(tmp_path: Path) -> None:
    base = small_causal_lm("qwen3", tmp_path / "lm")
    model: Any = new_score_model(base, "float32", 3)
    prepare_adapters(model, LORA)
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "score.weight" in trained

    def write(folder: Path) -> None:
        write_adapters(model, trained, LORA, base, folder)

    save_score_model(model, load_tokenizer(base), tmp_path / "hf", [merged_parts(model)], write)
    own = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    ids = torch.tensor([[5, 9, 14, 3, 8]])
    theirs = PeftModel.from_pretrained(own, tmp_path / "hf" / "adapter")(ids, use_cache=False).logits
    ours = AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf", num_labels=1)(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    base = small_causal_lm("deepseek_v3", tmp_path / "lm")
    for target in ("gate", "experts", "lm_head"):
        with pytest.raises(ValueError, match=f"lora.targets: '{target}' names no linear layer .* kv_b_proj"):
            prepare_adapters(load_model(base, "float32"), LoraConfig(rank=2, targets=[target]))
    with pytest.raises(ValueError, match=r"lora.start='.*' has no adapters"):
        check_adapters(LoraConfig(rank=2, start=str(base)))
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": 6.0}))
    with pytest.raises(ValueError, match="has r=8, and lora sets 3"):
        check_adapters(LORA.model_copy(update={"start": str(folder)}))
    lora = {"rank": 4}
    for changes, message in (
        ({"trainer": {"fp8": True}}, "trainer.fp8=true can't be combined with lora"),
        ({"mtp": {}}, "mtp or mtp_weight can't be combined with lora"),
        ({"balance": {"type": "v3"}}, "balance can't be combined with lora"),
        ({"lora": {"rank": 4, "targets": []}}, r"lora.targets=\[\] trains nothing"),
        ({"lora": {"rank": 4, "dropout": 0.1}}, "dropout"),
    ):
        with pytest.raises(ValueError, match=message):
            sft(base, **{"lora": lora} | changes)
    with pytest.raises(ValueError, match="balance can't be combined with lora"):
        rm(base, lora=lora, balance={"type": "v3"})
    with pytest.raises(ValueError, match="reference_every_steps=1 can't be combined with lora"):
        grpo(base, lora=lora, objective={"reference_every_steps": 1})


def test_the_planner_counts_gradients_and_moments_of_adapters_alone() -> None:
    """Rank 8 on q, k, v and o of Qwen3-8B: widths 4096 + 4096, 4096 + 1024 twice, 4096 + 4096, in 36 layers, are
    8 * 26624 * 36 = 7.7 million parameters. ZeRO-1 on one rank holds 4 bytes of gradient for each, 4 of master weight
    and 8 of moments; the frozen weights take 2 bytes each."""
    lora = LoraConfig(rank=8, targets=["q_proj", "k_proj", "v_proj", "o_proj"])
    model = architecture_of("Qwen/Qwen3-8B", lora=lora)
    assert model.adapters == 8 * 26624 * 36 == 7_667_712
    device, host = train_state(model, TrainLayout(1, 1, 1, 1000, False), reference=False)
    assert device == {
        "weights": 2 * (model.total + model.adapters),
        "gradients": 4 * model.adapters,
        "moments": 8 * model.adapters,
        "master weights": 4 * model.adapters,
    }
    assert not host


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("lora")
    small_causal_lm("deepseek_v3", folder / "lm")
    run_ranks(train_ranks.main, 1, folder, folder / "lm", folder / "trace.npz", 1, 4096, "lora", 0)
    return folder / "lm", dict(np.load(folder / "trace.npz"))


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("ranks", "zero"),
    [(2, 3), pytest.param(2, 0, marks=pytest.mark.slow), pytest.param(2, 2, marks=pytest.mark.slow)],
)
def test_ranks_and_zero_stages_train_adapters_alike(
    one_rank: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, ranks: int, zero: int
) -> None:
    """Each also repeats its third update from a reloaded state to the bit, whose files hold the adapters alone."""
    model, expected = one_rank
    run_ranks(train_ranks.main, ranks, tmp_path, model, tmp_path / "trace.npz", zero, 4096, "lora", 1)
    trace = np.load(tmp_path / "trace.npz")
    np.testing.assert_allclose(trace["losses"], expected["losses"], rtol=2e-5)
    np.testing.assert_allclose(trace["grad_norms"], expected["grad_norms"], rtol=2e-4)
    np.testing.assert_allclose(trace["weights"], expected["weights"], atol=2e-5)


@pytest.mark.slow
@pytest.mark.ranks
def test_a_reward_model_learns_by_adapters_and_its_head(tmp_path: Path) -> None:
    """Its loss falls in three updates, and the export has the policy's scores."""
    model = small_causal_lm("qwen3", tmp_path / "lm")
    run_ranks(reward_ranks.train_adapters, 1, tmp_path, model, tmp_path)
    trace = np.load(tmp_path / "lm-2.npz")
    losses = trace["steps"][:, 0]
    assert losses[2] < losses[1] < losses[0]
    [row] = shard(reward_ranks.comparisons(), num_ranks=1, micro_batch_tokens=4096)[0]
    with torch.no_grad():
        exported = ScoreModel(load_score_model(tmp_path / "lm-2", "float32"))(
            torch.from_numpy(row.token_ids_T), Layout(row.lengths, row.parents), torch.from_numpy(row.source_N)
        )
    np.testing.assert_allclose(exported.numpy(), trace["scores"], atol=1e-5)
    head = load_file(tmp_path / "lm-2" / "adapter" / "adapter_model.safetensors")["base_model.model.score.weight"]
    initial: Any = new_score_model(model, "float32", 1)
    assert not torch.equal(head, initial.score.weight)
