"""Our experts and norms against those of `transformers`, and their gradients against finite differences."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM as Auto
from transformers import DeepseekV3Config, LlamaConfig, MixtralConfig, PreTrainedConfig, PreTrainedModel, Qwen3MoeConfig

from pipeline.models.experts import SORTED, _Experts, skip_dropped
from pipeline.models.fp8_layers import FP8
from pipeline.models.norms import _Norm, use_lean_norms
from tests.pipeline.small_models import SMALLEST

CONFIGS = {
    "deepseek_v3": DeepseekV3Config.from_json_file("configs/models/tiny.json"),
    "qwen3_moe": Qwen3MoeConfig(**SMALLEST, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=2),
    "mixtral": MixtralConfig(**SMALLEST, num_local_experts=4),
    "llama": LlamaConfig(**SMALLEST),
}


def model_of(config: PreTrainedConfig) -> PreTrainedModel:
    config.vocab_size = 97
    torch.manual_seed(0)
    model = Auto.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def logits_and_gradients(model: PreTrainedModel, num_tokens: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    model.zero_grad()
    logits = model(torch.randint(3, 97, (1, num_tokens)), use_cache=False).logits
    (logits * torch.randn_like(logits)).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("num_tokens", [1, 50])
@pytest.mark.parametrize("name", CONFIGS)
def test_models_compute_what_transformers_computes(name: str, num_tokens: int) -> None:
    """With one token most experts see none; their gradient is zero, and whatever else there is agrees."""
    model = model_of(CONFIGS[name])
    if name != "llama":
        model.set_experts_implementation("eager")
    expected, expected_gradients = logits_and_gradients(model, num_tokens)
    model.set_experts_implementation(SORTED)
    use_lean_norms(model)
    logits, gradients = logits_and_gradients(model, num_tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[parameter], rtol=1e-4, atol=1e-4, msg=parameter)
    again = logits_and_gradients(model, num_tokens)
    assert torch.equal(again[0], logits) and all(torch.equal(again[1][name], gradients[name]) for name in gradients)


@pytest.mark.parametrize("name", CONFIGS)
def test_they_are_in_use(name: str) -> None:
    model = model_of(CONFIGS[name])
    model.set_experts_implementation(SORTED)
    use_lean_norms(model)
    seen = set()

    def look(node: torch.autograd.graph.Node) -> None:
        if node not in seen:
            seen.add(node)
            for following, _ in node.next_functions:
                if following is not None:
                    look(following)

    look(model.base_model(torch.tensor([[5, 6, 7]]), use_cache=False).last_hidden_state.grad_fn)
    functions = [type(node).__name__ for node in seen]
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    experts = [module for module in model.modules() if type(module).__name__.endswith("Experts")]
    assert functions.count("_NormBackward") == len(norms) > 0
    assert functions.count("_ExpertsBackward") == len(experts)
    assert (len(experts) > 0) == (name != "llama")


def test_experts_in_another_precision_are_left_to_transformers() -> None:
    model = model_of(CONFIGS["qwen3_moe"]).bfloat16()
    expected, _ = logits_and_gradients(model, 20)
    model.set_experts_implementation(SORTED)
    use_lean_norms(model)
    assert torch.equal(logits_and_gradients(model, 20)[0], expected)


@pytest.mark.parametrize("last", [0, 4], ids=["every pair", "with dropped pairs"])
def test_gradients_of_experts_are_those_of_finite_differences(last: int) -> None:
    """Five tokens, of which none goes to expert 2 and two go to one expert alone; the fifth may lose both of its
    pairs."""
    torch.manual_seed(0)
    index_TK = torch.tensor([[0, 1], [1, 3], [3, last], [1, 0], [4, 4] if last else [3, 1]])
    shapes = [(5, 4), (5, 2), (4, 6, 4), (4, 4, 3)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *tensors: _Experts.apply(*tensors, index_TK), inputs)


@pytest.mark.parametrize("form", ["float32", "bfloat16", "fp8"])
def test_dropped_pairs_are_not_computed(form: str) -> None:
    """Pairs without an expert give the output and the gradients of pairs of weight 0, by half as many operations."""
    model = model_of(CONFIGS["deepseek_v3"])
    model.set_experts_implementation(FP8 if form == "fp8" else SORTED)
    skip_dropped(model)
    experts = model.model.layers[1].mlp.experts.to(torch.bfloat16 if form == "bfloat16" else torch.float32)
    # Kernels for another number of rows may sum in another order, so bfloat16 may round another way.
    rtol, atol = (2**-7, 1e-3) if form == "bfloat16" else (1e-5, 1e-5)
    x_TD = torch.randn(64, model.config.hidden_size, dtype=experts.down_proj.dtype)
    index_TK = torch.rand(64, 8).argsort(dim=1)[:, :4]
    weights_TK = torch.rand(64, 4).masked_fill(torch.arange(4) >= 2, 0.0)

    def compute(index_TK: torch.Tensor) -> tuple[list[torch.Tensor], int]:
        inputs = [tensor.detach().requires_grad_() for tensor in (x_TD, weights_TK)]
        experts.zero_grad()
        with FlopCounterMode(display=False) as counter:
            out = experts(inputs[0], index_TK, inputs[1])
            out.square().sum().backward()
        gradients = [inputs[0].grad, inputs[1].grad[:, :2], *(p.grad.clone() for p in experts.parameters())]
        return [out.detach(), *gradients], counter.get_total_flops()

    expected, whole = compute(index_TK)
    found, flops = compute(index_TK.masked_fill(weights_TK == 0, 8))
    for one, other in zip(found, expected, strict=True):
        assert other.any()
        if form == "fp8" and one.dim() == 3:  # the tokens of a weight's gradient are cut into other tiles
            assert (one - other).norm() < 0.03 * other.norm()
        else:
            torch.testing.assert_close(one, other, rtol=rtol, atol=atol)
    if form != "bfloat16":  # transformers' grouped product counts its rows by offsets
        assert flops == whole / 2


def test_gradients_of_norms_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (5,))]
    assert torch.autograd.gradcheck(lambda x, weight_D: _Norm.apply(x, weight_D, 1e-3), inputs)


def test_a_norm_of_another_kind_stays_as_it_is() -> None:
    class PlusOneRMSNorm(torch.nn.Module):
        """Gemma's: the weight is what is added to one."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(8))
            self.variance_epsilon = 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.rms_norm(x, (8,), 1 + self.weight, self.variance_epsilon)

    norm = PlusOneRMSNorm()
    use_lean_norms(norm)
    assert "forward" not in vars(norm)
