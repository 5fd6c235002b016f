"""FP8 against hand-worked tiles, FP64, torchao and `transformers`' own reader, and in training."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers import (
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    PreTrainedModel,
)

from configs.data import SumsSource
from pipeline.data.sums import draw_sums
from pipeline.models.attention import Layout
from pipeline.models.fp8 import (
    BLOCK,
    E4M3,
    SIDE,
    TILE,
    Quantised,
    dequantise,
    hopper_matmul,
    quantise,
    reference_matmul,
)
from pipeline.models.fp8_layers import fp8_experts, fp8_linear, use_fp8, use_fp8_in_sharded_experts
from pipeline.models.logprobs import LogprobModel
from pipeline.weights.export import export_checkpoint
from tests.pipeline import fp8_ranks
from tests.pipeline.rank_processes import run_ranks
from tests.pipeline.small_models import small_causal_lm, small_config


def test_a_tile_by_hand() -> None:
    """Two tiles a row. The first's largest is 448, so it is stored as it is, on E4M3's grid: three bits behind the
    leading one. The second's largest is 7: its numbers are stored 64-fold. A tile of zeros stays zeros."""
    x_MK = torch.zeros(2, 256)
    x_MK[0, :4] = torch.tensor([448.0, 17.0, -3.3, 2**-9])
    x_MK[0, 128:131] = torch.tensor([7.0, 1.0, -0.1])
    x = quantise(x_MK, TILE)
    assert x.scale.shape == (2, 2) and x.scale[0].tolist() == [1.0, 1 / 64]
    assert x.data_MK[0, :4].tolist() == [448.0, 16.0, -3.25, 2**-9]
    assert x.data_MK[0, 128:131].tolist() == [448.0, 64.0, -6.5]  # 0.1 is stored as 6.4, between 6 and 6.5
    assert not dequantise(x)[1].any() and x.scale[1].isfinite().all()


def test_scales_that_are_powers_of_two_are_rounded_up() -> None:
    """Largest 7 x 1.01: 1/64 would not hold it, so it is 1/32; the largest of exactly 7 keeps 1/64."""
    x = quantise(torch.tensor([[7.0] + [0.0] * 127 + [7.07] + [0.0] * 127]), TILE, power_of_two=True)
    assert x.scale.tolist() == [[1 / 64, 1 / 32]]
    assert x.data_MK[0, [0, 128]].tolist() == [448.0, 224.0]


def test_a_block_has_one_scale_and_what_is_left_at_the_edge_has_its_own() -> None:
    weight_NK = torch.full((130, 200), 0.5)
    weight_NK[127, 127], weight_NK[129, 199] = 448.0, 56.0
    weight = quantise(weight_NK, BLOCK)
    expected = torch.tensor([[1.0, 0.5 / 448], [0.5 / 448, 56 / 448]])
    torch.testing.assert_close(weight.scale, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(dequantise(weight), weight_NK, rtol=1e-6, atol=0)  # all on the grid
    assert torch.equal(dequantise(weight.transposed), dequantise(weight).T)


def test_a_number_is_off_by_a_sixteenth_at_most() -> None:
    """E4M3 keeps three bits; an outlier spoils its own tile only."""
    x_MK = torch.rand(64, 256) + 0.5
    x_MK[:, 0] = 1e6
    error_MK = (dequantise(quantise(x_MK, TILE)) / x_MK - 1).abs()
    assert error_MK[:, 128:].max() <= 1 / 16 < error_MK[:, 1:128].max()


def test_cut_anew_along_the_other_side_powers_of_two_lose_nothing() -> None:
    torch.manual_seed(0)
    x_MK = torch.randn(256, 256)
    for power_of_two in (True, False):
        once = dequantise(quantise(x_MK, TILE, power_of_two=power_of_two))
        twice = dequantise(quantise(once.T, TILE, power_of_two=power_of_two)).T
        normal = once.abs() > 2**-6 * once.abs().max()  # not near the end of E4M3's range
        assert torch.equal(once[normal], twice[normal]) == power_of_two


def checksums(x: Quantised) -> tuple[int, int]:
    return tuple(zlib.crc32(part.contiguous().view(torch.uint8).numpy().data) for part in (x.data_MK, x.scale))


def test_quantisers_are_those_of_torchao() -> None:
    """Checksums of what its 0.18.0 makes of the same numbers (prototype.blockwise_fp8_training.kernels:
    torch_blockwise_scale_act_quant_lhs, ..._weight_quant, and ..._act_quant_rhs, transposed). It is not installed for
    this: where it is, `transformers` imports it in every process, and it complains of what it can't load."""
    numbers = (torch.arange(256 * 384).view(256, 384) * 7919) % 10007 - 5003
    x_MK = torch.ldexp(numbers.float(), -(torch.arange(256) % 23)[:, None])
    assert checksums(quantise(x_MK, TILE)) == (0x0F22390E, 0xCAB399C8)
    assert checksums(quantise(x_MK, BLOCK)) == (0x329912CB, 0x4F1F2650)
    assert checksums(quantise(x_MK.T, TILE)) == (0xDA626F62, 0xEAE6A848)


def fourteen_bit_matmul(a: Quantised, b: Quantised, promoted_every: int) -> Tensor:
    """A product as the paper describes Hopper's tensor cores: 32 products at a time and the running sum are shifted to
    the largest exponent among them and cut to 14 bits behind the first; every `promoted_every` the sum moves to FP32.
    Scales are one."""
    a_MK, b_NK = a.data_MK.double(), b.data_MK.double()
    total_MN = sums_MN = torch.zeros(len(a_MK), len(b_NK), dtype=torch.float64)
    for start in range(0, a_MK.shape[1], 32):
        terms_32MN = a_MK.T[start : start + 32, :, None] * b_NK.T[start : start + 32, None, :]
        terms = torch.cat([terms_32MN, sums_MN[None]])
        step = torch.ldexp(torch.ones_like(sums_MN), torch.frexp(terms.abs().amax(0)).exponent - 15)
        sums_MN = ((terms / step).trunc() * step).sum(0)
        if (start + 32) % promoted_every == 0:
            total_MN, sums_MN = total_MN + sums_MN.float(), torch.zeros_like(sums_MN)
    return total_MN + sums_MN


def test_sums_keep_the_precision_that_promotion_is_for() -> None:
    """K = 4096, the paper's own case (3.3.2), which reports a largest relative error of nearly 2 % for 14 bits."""
    torch.manual_seed(0)
    a, b = (Quantised(torch.rand(24, 4096).to(E4M3), torch.ones(24, 32), TILE) for _ in range(2))
    exact_MN = a.data_MK.double() @ b.data_MK.double().T
    limited, promoted, ours = (
        (sums_MN / exact_MN - 1).abs().max().item()
        for sums_MN in (fourteen_bit_matmul(a, b, 4096), fourteen_bit_matmul(a, b, SIDE), reference_matmul(a, b))
    )
    assert 0.01 < limited < 0.05
    assert promoted < limited / 10
    assert ours < 1e-6


def test_a_product_is_as_good_as_its_operands() -> None:
    """The error against FP64 is that of rounding to three bits, 2.6 % of each factor's size (a uniform error of up to
    1/16 and its root mean square over a binade), whatever outliers the rows and blocks have."""
    torch.manual_seed(0)
    a_MK, b_NK = torch.randn(64, 1024), torch.randn(200, 1024)
    a_MK[3, 5], b_NK[7, 900] = 300.0, 50.0
    exact_MN = a_MK.double() @ b_NK.double().T
    for tile in (TILE, BLOCK):
        a, b = quantise(a_MK, TILE), quantise(b_NK, tile)
        product_MN = reference_matmul(a, b)
        assert (product_MN - exact_MN).norm() / exact_MN.norm() < 0.045
        of_operands = dequantise(a).double() @ dequantise(b).double().T
        assert (product_MN - of_operands).norm() / exact_MN.norm() < 1e-6


@pytest.mark.parametrize("tile", [TILE, BLOCK])
@pytest.mark.parametrize("shape", [(100, 576, 200), (48, 48, 64), (300, 128, 1024)])
def test_the_kernel_is_called_as_it_wants_to_be(shape: tuple[int, int, int], tile: tuple[int, int]) -> None:
    """torch checks shapes and strides of its Hopper product without one."""
    rows, columns, width = shape

    def on_meta(x: Quantised) -> Quantised:
        return Quantised(x.data_MK.to("meta"), x.scale.to("meta"), x.tile)

    a, b = quantise(torch.randn(rows, width), TILE), quantise(torch.randn(columns, width), tile)
    transposed = quantise(torch.randn(width, columns), BLOCK).transposed
    for factor in (b, transposed):
        for dtype in (torch.bfloat16, torch.float32):
            product = hopper_matmul(on_meta(a), on_meta(factor), dtype)
            assert product.shape == (rows, columns) and product.dtype == dtype


def relative(value: Tensor | None, expected: Tensor | None) -> float:
    assert value is not None and expected is not None
    return ((value - expected).norm() / expected.norm()).item()


def test_a_linear_map_and_its_gradients() -> None:
    """Each of the three products is off by the rounding of its two factors, and nothing is biased."""
    torch.manual_seed(0)
    results = []
    x, weight = torch.randn(2, 100, 192), torch.randn(130, 192)
    seed = torch.randn(2, 100, 130)
    for product in (fp8_linear, linear):
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        out = product(*inputs)
        (out * seed).sum().backward()
        results.append([out, inputs[0].grad, inputs[1].grad])
    for value, expected in zip(*results, strict=True):
        assert 0.01 < relative(value, expected) < 0.05
        assert abs((value * expected).sum() / expected.square().sum() - 1) < 0.005


def a_layer(num_experts: int) -> SimpleNamespace:
    torch.manual_seed(0)
    usual = {"has_gate": True, "is_concatenated": True, "has_bias": False, "is_transposed": False}
    layer = SimpleNamespace(**usual, _is_expert_parallel=False, act_fn=torch.nn.SiLU())
    layer.gate_up_proj = torch.nn.Parameter(torch.randn(num_experts, 2 * 96, 64) / 8)
    layer.down_proj = torch.nn.Parameter(torch.randn(num_experts, 64, 96) / 8)
    return layer


def test_experts_and_their_gradients() -> None:
    """Against each expert applied to its tokens one by one, in float64. One expert sees no token."""
    layer = a_layer(num_experts=5)
    hidden_TD, index_TK = torch.randn(50, 64), torch.randint(0, 4, (50, 2))
    weight_TK, seed_TD = torch.rand(50, 2), torch.randn(50, 64)
    inputs = [hidden_TD.clone().requires_grad_(), weight_TK.clone().requires_grad_()]
    out_TD = fp8_experts(layer, inputs[0], index_TK, inputs[1])  # pyright: ignore[reportArgumentType]
    (out_TD * seed_TD).sum().backward()

    exact = [each.detach().double().requires_grad_() for each in (*inputs, layer.gate_up_proj, layer.down_proj)]
    gate_TKI, up_TKI = torch.einsum("td,tkfd->tkf", exact[0], exact[2][index_TK]).chunk(2, dim=2)
    answer_TKD = torch.einsum("tki,tkdi->tkd", silu(gate_TKI) * up_TKI, exact[3][index_TK])
    expected_TD = (answer_TKD * exact[1].unsqueeze(2)).sum(1)
    (expected_TD * seed_TD).sum().backward()
    assert relative(out_TD, expected_TD) < 0.07
    gradients = (*(each.grad for each in inputs), layer.gate_up_proj.grad, layer.down_proj.grad)
    for gradient, reference in zip(gradients, exact, strict=True):
        assert relative(gradient, reference.grad) < 0.1
    assert not layer.gate_up_proj.grad[4].any() and not layer.down_proj.grad[4].any()


def test_gradients_of_weights_in_bfloat16_stay_float32() -> None:
    """Wgrad sums in float32, and is not rounded to the weight's type on its way into a gradient in float32."""
    layer, linear = a_layer(num_experts=3), torch.nn.Parameter(torch.randn(48, 64))
    parameters = [linear, layer.gate_up_proj, layer.down_proj]
    for parameter in parameters:
        parameter.data = parameter.data.bfloat16()
        parameter.grad_dtype = torch.float32
    x_TD = torch.randn(40, 64).bfloat16()
    experts_TD = fp8_experts(layer, x_TD, torch.arange(40).view(40, 1) % 3, torch.ones(40, 1))  # pyright: ignore
    (fp8_linear(x_TD, linear).float().square().sum() + experts_TD.float().square().sum()).backward()
    for parameter in parameters:
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        assert not torch.equal(parameter.grad, parameter.grad.bfloat16().float())


def test_sharded_experts_are_those_of_one_process() -> None:
    """AutoEP's module holds gate and up apart, and pads its rows."""
    experts = pytest.importorskip("deepspeed.moe.ep_experts").GroupedExperts(64, 96, 3, use_grouped_mm=False)
    layer = a_layer(num_experts=3)
    index_TK = torch.tensor([[0]] * 5 + [[2]] * 3)
    with torch.no_grad():
        experts.w1.copy_(layer.gate_up_proj[:, :96])
        experts.w3.copy_(layer.gate_up_proj[:, 96:])
        experts.w2.copy_(layer.down_proj)
    use_fp8_in_sharded_experts(experts)
    x_SD = torch.randn(8, 64)
    padded = experts(torch.cat([x_SD, torch.zeros(4, 64)]), torch.tensor([5, 0, 3]))
    expected = fp8_experts(layer, x_SD, index_TK, torch.ones(8, 1))  # pyright: ignore[reportArgumentType]
    assert torch.equal(padded[:8], expected) and not padded[8:].any()


def test_only_the_layers_products_change() -> None:
    model = AutoModelForCausalLM.from_config(small_config("deepseek_v3"))
    LogprobModel(model, fp8=True)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name for name, module in linears.items() if "forward" not in vars(module)} == {"lm_head"}
    assert model.config._experts_implementation == "alignyard_fp8"


@pytest.mark.parametrize(
    ("config", "remedy"),
    [
        (GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=64), "no effect"),
        (
            GptOssConfig(
                num_hidden_layers=1,
                hidden_size=32,
                intermediate_size=32,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
                num_local_experts=2,
                num_experts_per_tok=1,
                vocab_size=64,
            ),
            "not of the usual form",
        ),
    ],
)
def test_models_that_it_is_not_for_are_refused(config, remedy: str) -> None:
    with pytest.raises(ValueError, match=f"trainer.fp8.*{remedy}.*false"):
        use_fp8(AutoModelForCausalLM.from_config(config))


def test_an_exported_checkpoint_holds_the_blocks_of_each_weight(tmp_path: Path) -> None:
    checkpoint = small_causal_lm("deepseek_v3", tmp_path / "model")
    export_checkpoint(checkpoint, tmp_path / "fp8", "fp8")
    stored, plain = (load_file(folder / "model.safetensors") for folder in (tmp_path / "fp8", checkpoint))
    scales = {name.removesuffix("_scale_inv") for name in stored if name.endswith("_scale_inv")}
    assert stored.keys() == plain.keys() | {f"{name}_scale_inv" for name in scales}
    kept = ("norm.weight", "embed_tokens.weight", "lm_head.weight", "gate.weight", "correction_bias")
    assert {name for name in plain if name not in scales} == {name for name in plain if name.endswith(kept)}
    assert stored["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (5, 1)  # of 576 x 128
    for name, weight in plain.items():
        if name in scales:
            reread = dequantise(Quantised(stored[name], stored[f"{name}_scale_inv"], BLOCK))
            assert torch.equal(reread, dequantise(quantise(weight, BLOCK)))
        else:
            assert torch.equal(stored[name], weight)


def test_transformers_reads_an_exported_checkpoint_as_its_blocks_say(tmp_path: Path) -> None:
    """Its own reader wants widths of whole blocks."""
    sizes = {"hidden_size": 256, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    plain = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=64))
    plain.save_pretrained(tmp_path / "model")
    export_checkpoint(tmp_path / "model", tmp_path / "fp8", "fp8")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8", quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.float32
    )
    for name, value in model.named_parameters():
        weight = plain.get_parameter(name)
        expected = dequantise(quantise(weight, BLOCK)) if name.endswith("_proj.weight") else weight
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)


@pytest.mark.ranks
def test_the_training_engine_multiplies_in_fp8(tmp_path: Path) -> None:
    run_ranks(fp8_ranks.main, 1, tmp_path, small_causal_lm("deepseek_v3", tmp_path / "model"))


def batches(seed: int) -> Iterator[tuple[Tensor, Layout, Tensor]]:
    """200 of 16 sums: token ids of the packed row, its layout, and where the tokens of the answers are."""
    rows = draw_sums(SumsSource(type="sums", size=200 * 16, seed=seed))
    texts = [([1, *(3 + b for b in r["prompt"].encode())], [*(3 + b for b in r["answer"].encode()), 2]) for r in rows]
    for start in range(0, len(texts), 16):
        pairs = texts[start : start + 16]
        ids_T = torch.tensor([token for prompt, answer in pairs for token in prompt + answer])
        trained_T = torch.tensor([bit for prompt, answer in pairs for bit in [0] * len(prompt) + [1] * len(answer)])
        lengths = tuple(len(prompt) + len(answer) for prompt, answer in pairs)
        yield ids_T, Layout(lengths, (-1,) * len(lengths)), trained_T.nonzero().squeeze(1)


class Learner:
    """A model that takes supervised steps at `rate` after a warm-up of 20, with float32 master weights."""

    def __init__(self, causal_lm: PreTrainedModel, rate: float, *, dtype: torch.dtype, fp8: bool = False) -> None:
        self.model = LogprobModel(causal_lm.to(dtype), fp8=fp8)  # pyright: ignore[reportArgumentType]
        self.masters = [parameter.detach().float().clone() for parameter in self.model.parameters()]
        self.optimizer = torch.optim.AdamW(self.masters, betas=(0.9, 0.95))
        self.rate, self.losses = rate, []

    def learn(self, ids_T: Tensor, layout: Layout, targets_N: Tensor) -> None:
        loss = -self.model(ids_T, layout, targets_N - 1, ids_T[targets_N]).mean()
        loss.backward()
        for master, parameter in zip(self.masters, self.model.parameters(), strict=True):
            master.grad, parameter.grad = None if parameter.grad is None else parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.param_groups[0]["lr"] = self.rate * min(1, (len(self.losses) + 1) / 20)
        self.optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(self.masters, self.model.parameters(), strict=True):
                parameter.copy_(master)
        self.losses.append(loss.item())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_training_in_fp8_loses_nothing(dtype: torch.dtype) -> None:
    """200 steps of SFT on a tiny mixture that knows how sums are done, in lockstep with the same without FP8: in
    bfloat16, as in the paper, and in float32. The relative error of the loss is below the paper's 0.25 % over the
    whole, where float32 begun 0.1 % away has 0.1 %. Smoothed it can't be held to that at every step: neither can
    bfloat16 beside float32, nor float32 itself (docs/numerics.md).
    """
    torch.manual_seed(0)
    first, *models = (AutoModelForCausalLM.from_config(small_config("deepseek_v3")) for _ in range(3))
    pretraining = Learner(first, 1e-3, dtype=torch.float32)
    for batch in batches(seed=1):
        pretraining.learn(*batch)
    for model in models:
        model.load_state_dict(first.state_dict())
    runs = [Learner(model, 1e-4, dtype=dtype, fp8=fp8) for model, fp8 in zip(models, (False, True), strict=True)]
    for batch in batches(seed=2):
        for run in runs:
            run.learn(*batch)
    plain, in_fp8 = (torch.tensor(run.losses) for run in runs)
    assert plain[-20:].mean() < 0.8 * plain[:20].mean()
    assert 1e-6 < abs(in_fp8.sum() / plain.sum() - 1) < 0.0025
    by_quarter = (in_fp8.view(4, 50).sum(1) / plain.view(4, 50).sum(1) - 1).abs()
    assert by_quarter.max() < 0.01
