"""Multi-token prediction: what each module sees and predicts in a packed row, its names in a checkpoint, and what of it
reaches the main model. `transformers`' own modules, one plain sequence at a time, are the reference."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import MtpModel

from configs.grpo import ObjectiveConfig
from pipeline.data.trees import Branch, Tree, micro_batch
from pipeline.models.attention import Layout
from pipeline.models.logprobs import LogprobModel, MtpLogprobs
from pipeline.models.mtp import Mtp, module_rows, mtp_as_layers, previous_rows
from pipeline.objectives.supervised import mtp_loss
from pipeline.stages.grpo import detached_mtp
from pipeline.train.losses import batch_loss
from pipeline.weights.architecture import architecture_file
from pipeline.weights.fresh import create_model
from pipeline.weights.fused import checkpoint_tensors
from pipeline.weights.load import load_model
from pipeline.weights.reward_model import new_score_model
from rollout.checkpoint import checkpoint_shapes, mtp_depth

from .small_models import load_with_mtp, small_causal_lm

DEPTH, LAYERS = 2, 2

BLOCK = (
    *(f"self_attn.{name}" for name in ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa")),
    *(f"self_attn.{name}" for name in ("kv_a_layernorm", "kv_b_proj", "o_proj")),
    *(f"mlp.{of}.{name}" for of in ("experts.{}", "shared_experts") for name in ("gate_proj", "up_proj", "down_proj")),
    *("mlp.gate", "input_layernorm", "post_attention_layernorm"),
)
MODULE = ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head")
"""Weights of layer 61 in DeepSeek-V3's checkpoint; beside them the gate has a bias."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh DeepSeek-V3 with two layers and two modules, its weights large enough that a wrong one shows."""
    home = tmp_path_factory.mktemp("mtp")
    sizes = json.loads(architecture_file("tiny").read_text())
    sizes |= {"num_hidden_layers": LAYERS, "num_nextn_predict_layers": DEPTH, "q_lora_rank": 24, "n_routed_experts": 4}
    (home / "sizes.json").write_text(json.dumps(sizes))
    made = create_model(str(home / "sizes.json"), 0, home / "model")
    tensors = load_file(made / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    tensors = {name: x + 0.05 * torch.randn(x.shape, generator=generator) for name, x in tensors.items()}
    for layer in range(LAYERS, LAYERS + DEPTH):
        tensors[f"model.layers.{layer}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"model.layers.{layer}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, made / "model.safetensors", {"format": "pt"})
    return made


def ids(length: int, seed: int) -> list[int]:
    return torch.randint(3, 260, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def trees() -> list[Tree]:
    """Shared prompts, one of them shorter than a module is deep, and a conversation between them."""
    return [
        Tree(ids(5, 0), [Branch(ids(4, 1)), Branch(ids(7, 2)), Branch(ids(1, 3))]),
        Tree(ids(9, 4), root_mask=[0, 1, 1, 1, 0, 0, 1, 1, 1]),
        Tree(ids(1, 5), [Branch(ids(1, 6)), Branch(ids(6, 7))]),
    ]


def answer(folder: Path, *, detached: bool = False, mtp: bool = True) -> tuple[PreTrainedModel, MtpLogprobs]:
    causal_lm, layers = load_with_mtp(folder, DEPTH)
    modules = Mtp(causal_lm, layers, detached=detached) if mtp else None
    row = micro_batch(trees())
    token_ids_T, source_N, target_N = map(torch.from_numpy, (row.token_ids_T, row.source_N, row.target_N))
    model = LogprobModel(causal_lm, chunk_tokens=4, mtp=modules)
    return causal_lm, model(token_ids_T, Layout(row.lengths, row.parents), source_N, target_N)


def reference(folder: Path) -> tuple[PreTrainedModel, MtpModel, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Of each trained sequence [K, n] log-probabilities of its tokens, and where the likeliest is the main model's."""
    main = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    main._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{LAYERS + k}\." for k in range(DEPTH)]
    ahead = MtpModel.from_pretrained(main).eval()
    result = []
    for tree in trees():
        sequences = [(tree.root_ids + each.token_ids, len(tree.root_ids)) for each in tree.branches]
        trained = [range(first, len(of)) for of, first in sequences]
        if tree.root_mask is not None:
            sequences, trained = [(tree.root_ids, 0)], [[t for t, mask in enumerate(tree.root_mask) if mask]]
        result += [
            one_sequence(main, ahead, torch.tensor([of]), at) for (of, _), at in zip(sequences, trained, strict=True)
        ]
    return main, ahead, result


def one_sequence(main, ahead, ids_1T, trained) -> tuple[torch.Tensor, torch.Tensor]:
    """By the equations: module k's position i has h_i of module k - 1 and token i + k, and predicts token i + k + 1."""
    known = main.model(ids_1T, use_cache=False).last_hidden_state
    main_likeliest = main.lm_head(known)[0].argmax(-1)
    values, agrees = [], []
    for k, layer in enumerate(ahead.layers, start=1):
        embedded = main.model.embed_tokens(ids_1T[:, k:])
        size = embedded.shape[1]
        if size:
            positions = torch.arange(size).unsqueeze(0)
            known = layer(
                embedded,
                known[:, :size],
                position_embeddings=main.model.rotary_emb(embedded, positions),
                attention_mask=torch.full((size, size), -math.inf).triu(1)[None, None],
                position_ids=positions,
                past_key_values=None,
            )
            logits = main.lm_head(known)[0]
        rows = [(t - k - 1, t) for t in trained]
        of = [logits[i].log_softmax(-1)[ids_1T[0, t]] if i >= 0 else torch.tensor(0.0) for i, t in rows]
        values.append(torch.stack(of))
        agrees.append(torch.tensor([i >= 0 and bool(logits[i].argmax() == main_likeliest[t - 1]) for i, t in rows]))
    return torch.stack(values), torch.stack(agrees)


def test_rows_of_a_module_by_hand() -> None:
    # rows    p0 p1 p2 | a0 a1 | b0 b1 | q0
    layout = Layout((3, 2, 2, 1), (-1, 0, 0, -1))
    assert previous_rows(layout).tolist() == [0, 0, 1, 2, 3, 2, 5, 0]  # b0 follows p2, as a0 does
    rows, first = module_rows(layout, 1)
    assert rows.tolist() == [1, 2, 3, 4, 5, 6] and first.lengths == (2, 2, 2, 0)
    assert first.position_ids_T.tolist() == [0, 1, 2, 3, 2, 3]
    rows, fourth = module_rows(layout, 4)  # the prompt has no row left: a1 and b1 start sequences of their own
    assert rows.tolist() == [4, 6] and fourth.lengths == (0, 1, 1, 0)
    assert fourth.position_ids_T.tolist() == [0, 0]
    rows, none = module_rows(Layout((1,), (-1,)), 1)  # nobody reads it, but every rank must take part
    assert rows.tolist() == [0] and none.lengths == (1,)


def test_packed_modules_are_those_of_transformers_one_sequence_at_a_time(folder: Path) -> None:
    ours, found = answer(folder)
    theirs, _, expected = reference(folder)
    sequence_N = micro_batch(trees()).sequence_N
    for sequence, (values_Kn, agrees_Kn) in enumerate(expected):
        torch.testing.assert_close(found.mtp_logprobs_KN[:, sequence_N == sequence], values_Kn, rtol=0, atol=1e-5)
        assert found.accepted_KN[:, sequence_N == sequence].equal(agrees_Kn)
    found.mtp_logprobs_KN.sum().backward()
    sum(values_Kn.sum() for values_Kn, _ in expected).backward()  # type: ignore[union-attr]
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for name, parameter in ours.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-4, msg=name)
    assert {"lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"} <= gradients.keys()


def test_what_is_detached_moves_nothing_of_the_main_model(folder: Path) -> None:
    alone, logprobs_N = answer(folder, mtp=False)
    logprobs_N.sum().backward()
    with_modules, found = answer(folder, detached=True)
    (found.logprobs_N.sum() + found.mtp_logprobs_KN.sum()).backward()
    joint, of_joint = answer(folder)
    (of_joint.logprobs_N.sum() + of_joint.mtp_logprobs_KN.sum()).backward()
    assert found.logprobs_N.equal(logprobs_N)
    assert found.mtp_logprobs_KN.equal(of_joint.mtp_logprobs_KN)
    gradients, moved = dict(with_modules.named_parameters()), dict(joint.named_parameters())
    for name, parameter in alone.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, gradients[name].grad), name
    assert not torch.equal(alone.lm_head.weight.grad, moved["lm_head.weight"].grad)


def test_detached_modules_learn(folder: Path) -> None:
    causal_lm, layers = load_with_mtp(folder, DEPTH)
    mtp = Mtp(causal_lm, layers, detached=True)
    row = micro_batch([Tree(ids(9, 0), root_mask=[0] + [1] * 8)])
    token_ids_T, source_N, target_N = map(torch.from_numpy, (row.token_ids_T, row.source_N, row.target_N))
    found = LogprobModel(causal_lm, mtp=mtp)(token_ids_T, Layout(row.lengths, row.parents), source_N, target_N)
    found.mtp_logprobs_KN.sum().backward()
    own = {name for name, p in mtp.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {f"layers.{k}.{name}.weight" for k in range(DEPTH) for name in ("eh_proj", "enorm", "hnorm")} <= own
    assert all(parameter.grad is None for parameter in causal_lm.parameters())


def test_names_are_those_of_deepseek_v3(folder: Path) -> None:
    causal_lm, layers = load_with_mtp(folder, DEPTH)
    held = load_file(folder / "model.safetensors")
    expected = {
        f"model.layers.{layer}.{part.format(expert)}.weight"
        for layer in (LAYERS, LAYERS + 1)
        for part in BLOCK + MODULE
        for expert in range(4)
    } | {f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (LAYERS, LAYERS + 1)}
    assert {name for name in held if name.startswith(("model.layers.2.", "model.layers.3."))} == expected
    with mtp_as_layers(Mtp(causal_lm, layers, detached=True), causal_lm):
        assert set(checkpoint_tensors(causal_lm, causal_lm.state_dict())) == set(held)
    assert len(causal_lm.model.layers) == LAYERS


def test_split_mtp_a_checkpoint_loads_as_before(folder: Path) -> None:
    model = load_model(folder, "float32")
    assert model.config.num_nextn_predict_layers == 0  # so that what is saved promises none
    assert len(model.model.layers) == LAYERS
    assert mtp_depth(folder) == DEPTH
    shapes = checkpoint_shapes(folder)  # what a sync must send
    assert "model.layers.1.input_layernorm.weight" in shapes
    assert not any(name.startswith(("model.layers.2.", "model.layers.3.")) for name in shapes)
    assert new_score_model(folder, "float32", 0).config.num_nextn_predict_layers == 0


def test_fresh_modules_leave_the_fresh_model_as_it_was(folder: Path, tmp_path: Path) -> None:
    sizes = json.loads((folder.parent / "sizes.json").read_text())
    models = []
    for depth in (0, 1):
        (tmp_path / f"{depth}.json").write_text(json.dumps(sizes | {"num_nextn_predict_layers": depth}))
        models.append(create_model(str(tmp_path / f"{depth}.json"), 0, tmp_path / f"model-{depth}"))
    without, with_one = (load_file(model / "model.safetensors") for model in models)
    assert [mtp_depth(model) for model in models] == [0, 1]
    assert without.keys() < with_one.keys()
    assert all(torch.equal(tensor, with_one[name]) for name, tensor in without.items())
    assert with_one["model.layers.2.eh_proj.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(with_one["model.layers.2.shared_head.head.weight"], with_one["lm_head.weight"])


def test_modules_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mtp\.depth=1.*has 2 modules"):
        load_with_mtp(folder, 1)
    with pytest.raises(ValueError, match=r"DeepSeek-V3.*llama"):
        load_with_mtp(small_causal_lm("llama", tmp_path / "llama"), 1)
    without = small_causal_lm("deepseek_v3", tmp_path / "without")
    with pytest.raises(ValueError, match=r"mtp_weight=0\.01"):
        detached_mtp(0.01, without)
    assert detached_mtp(0.0, without) is None
    asked = detached_mtp(0.01, folder)
    assert asked is not None and (asked.depth, asked.detached) == (DEPTH, True)


def test_a_checkpoint_with_a_damaged_module_is_refused(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.3.hnorm.weight"]
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"missing_keys.*layers\.3\.hnorm"):
        load_with_mtp(tmp_path, DEPTH)


def test_the_loss_by_hand() -> None:
    half, quarter = math.log(0.5), math.log(0.25)
    output = mtp_loss(
        logprobs_KN=torch.tensor([[half, quarter], [0.0, half]]),  # module 2 knows nothing of the first token
        accepted_KN=torch.tensor([[True, True], [False, True]]),
        weights_N=torch.tensor([1.0, 2.0]),
        denominator=4.0,
    )
    # (1 + 2 * 2) / 4 and (0 + 2 * 1) / 4 times log 2, their mean
    assert output.loss.item() == pytest.approx((5 + 2) / 4 / 2 * math.log(2))
    assert {name: value.item() for name, value in output.sums.items()} == {
        "loss/mtp_mean": pytest.approx((3 + 1) / 2 * math.log(2)),
        "mtp/acceptance_1": 2,
        "mtp/acceptance_2": 1,
    }


def test_the_loss_joins_the_objective_with_its_weights_on_tokens() -> None:
    columns = {"advantages": [1.0, 1.0], "weights": [0.5, 0.0], "rollout_logprobs": [-1.0, -1.0]}
    row = micro_batch([Tree([3, 4, 5], [Branch([6, 7], columns)])])
    answer = MtpLogprobs(torch.tensor([-1.0, -2.0]), torch.tensor([[-3.0, -4.0]]), torch.tensor([[True, False]]))
    objective = ObjectiveConfig(kl_coef=0)
    alone = batch_loss(objective, row, answer.logprobs_N, 2.0)
    joined = batch_loss(objective, row, answer, 2.0, 0.1)
    assert (joined.loss - alone.loss).item() == pytest.approx(0.1 * 0.5 * 3 / 2)  # the second token has no weight
    assert joined.sums.keys() - alone.sums.keys() == {"loss/mtp_mean", "mtp/acceptance_1"}
    supervised = batch_loss(None, row, answer, 2.0, 0.3)
    assert supervised.loss.item() == pytest.approx((1 + 2) / 2 + 0.3 * (3 + 4) / 2)
