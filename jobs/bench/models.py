"""Measures our parts of a model beside the plain ones: experts, log-probabilities, and the reference of FP8.

Each ratio is one of medians within one run, both sides measured in turns.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from jobs.bench.measure import medians, seconds_in_turns
from pipeline.models.attention import Layout
from pipeline.models.experts import SORTED
from pipeline.models.fp8 import BLOCK, TILE, dequantise, matmul, quantise
from pipeline.models.fp8_layers import FP8, fp8_linear
from pipeline.models.logprobs import LogprobModel
from pipeline.models.norms import use_lean_norms
from pipeline.train.memory import resident
from pipeline.weights.architecture import architecture_file
from rollout.process import num_threads

MICRO_BATCHES = (2048, 4096, 8192)
"""Tokens of a micro-batch: from the demo's to a trainer's default."""
VOCABULARY, HEAD_WIDTH, NUM_TOKENS, LENGTH = 129_280, 128, 4096, 64
"""DeepSeek-V3's vocabulary, a width at which the head's product does not dominate the softmax, and the tokens of the
measurement in sequences of LENGTH."""
PRODUCT_SIZES = (2048, 1024, 4096)
"""Rows, columns and summed width of the measured product; 4096 is the paper's case."""


def moe(repeats: int) -> dict[str, float]:
    """Times the 25M-parameter model (16 experts, top-4) and one layer's experts, forward and backward, with all cores.

    Each is measured with `transformers`' own experts and with ours. Beside the experts, for each of MICRO_BATCHES,
    their six matrix products alone are the bound for any implementation.
    """
    model: Any = _model("moe_25m")
    default, threads = model.config._experts_implementation, num_threads(0)
    figures: dict[str, float] = {}
    for num_tokens in MICRO_BATCHES:
        routed = _routed(model, num_tokens)
        work = [*_experts(model, routed, default, SORTED), _products(model, routed.index_TK)]
        plain, sorted_, bound = _median_seconds(repeats * 3, *work, threads=threads)
        figures |= {
            f"experts_{num_tokens}_plain_seconds": plain,
            f"experts_{num_tokens}_seconds": sorted_,
            f"experts_{num_tokens}_speedup": plain / sorted_,
            f"experts_{num_tokens}_speedup_bound": plain / bound,
        }
    token_ids = torch.randint(3, 259, (MICRO_BATCHES[-1] // LENGTH, LENGTH))
    whole = [
        partial(_backward, model, name, lambda: model(token_ids, use_cache=False).logits) for name in (default, SORTED)
    ]
    plain, with_sorted = _median_seconds(repeats, *whole, threads=threads)
    use_lean_norms(model)
    (with_norms,) = _median_seconds(repeats, whole[1], threads=threads)
    return figures | {
        "model_plain_seconds": plain,
        "model_seconds": with_sorted,
        "model_speedup": plain / with_sorted,
        "model_speedup_with_norms": plain / with_norms,
    }


def logprobs(repeats: int) -> dict[str, float]:
    """Compares log-probabilities of NUM_TOKENS tokens over VOCABULARY, computed in chunks and at once.

    Forward and backward: seconds, and the peak memory that each adds to a process of its own.
    """
    chunked, naive = _Head(), _Head()
    chunked_seconds, naive_seconds = _median_seconds(repeats, chunked.in_chunks, naive.at_once)
    del chunked, naive
    chunked_mib, naive_mib = _peak_mib("in_chunks"), _peak_mib("at_once")
    return {
        "naive_seconds": naive_seconds,
        "chunked_seconds": chunked_seconds,
        "chunked_over_naive": chunked_seconds / naive_seconds,
        "naive_peak_mib": naive_mib,
        "chunked_peak_mib": chunked_mib,
        "chunked_peak_over_naive": chunked_mib / naive_mib,
    }


def fp8(repeats: int) -> dict[str, float]:
    """Measures the error and the cost of FP8.

    The error is that of one product against FP64 (relative, by norm), with the part that summing adds. The costs are
    forward and backward of a linear map and of a layer's experts, relative to this machine's own precision.
    """
    rows, columns, width = PRODUCT_SIZES
    x_MK, weight_NK = torch.randn(rows, width), torch.randn(columns, width).requires_grad_()
    with torch.no_grad():
        exact_MN = x_MK.double() @ weight_NK.double().T
        x, weight = quantise(x_MK, TILE), quantise(weight_NK, BLOCK)
        product_MN = matmul(x, weight).double()
        of_operands_MN = dequantise(x).double() @ dequantise(weight).double().T
    figures = {
        "error": _relative(product_MN, exact_MN),
        "error_of_summing": _relative(product_MN, of_operands_MN),
        "error_of_bfloat16": _relative((x_MK.bfloat16() @ weight_NK.bfloat16().T).double(), exact_MN),
    }
    plain, in_fp8 = _median_seconds(
        repeats, lambda: linear(x_MK, weight_NK).sum().backward(), lambda: fp8_linear(x_MK, weight_NK).sum().backward()
    )
    model: Any = _model("moe_25m")
    experts_plain, experts_fp8 = _median_seconds(
        repeats, *_experts(model, _routed(model, MICRO_BATCHES[0]), SORTED, FP8)
    )
    return figures | {"linear_cost": in_fp8 / plain, "experts_cost": experts_fp8 / experts_plain}


class _Head:
    """A model of little but its head, and NUM_TOKENS tokens in sequences of LENGTH as its input."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        sizes: Any = {"hidden_size": HEAD_WIDTH, "intermediate_size": HEAD_WIDTH, "vocab_size": VOCABULARY}
        config = LlamaConfig(**sizes, num_attention_heads=2, num_hidden_layers=1)
        self.causal_lm = AutoModelForCausalLM.from_config(config)
        self.token_ids = torch.randint(3, VOCABULARY, (NUM_TOKENS // LENGTH, LENGTH))

    def in_chunks(self) -> None:
        layout = Layout((LENGTH,) * (NUM_TOKENS // LENGTH), (-1,) * (NUM_TOKENS // LENGTH))
        token_ids_T = self.token_ids.flatten()
        LogprobModel(self.causal_lm)(
            token_ids_T, layout, torch.arange(NUM_TOKENS), token_ids_T.roll(-1)
        ).sum().backward()

    def at_once(self) -> None:
        targets = self.token_ids.flatten().roll(-1).view_as(self.token_ids)
        logprobs = self.causal_lm(self.token_ids, use_cache=False).logits.float().log_softmax(-1)
        logprobs.gather(2, targets.unsqueeze(2)).sum().backward()


def _peak_mib(method: str) -> float:
    """Memory that one forward and backward pass adds to the peak of a fresh process, in MiB."""
    program = f"from jobs.bench.models import print_peak; print_peak('{method}')"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=600)
    return float(output.stdout.split()[-1])


def print_peak(method: str) -> None:
    """Measures a method of _Head in this process, for `_peak_mib`."""
    head = _Head()
    before = resident("VmRSS")
    getattr(head, method)()
    sys.stdout.write(f"{(resident('VmHWM') - before) / 2**20}\n")


def _model(architecture: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(architecture_file(architecture)))


class _Routed(NamedTuple):
    """Hidden states with the experts and weights that a gate chose for them."""

    x_TD: Tensor
    index_TK: Tensor
    weight_TK: Tensor


def _routed(model: Any, num_tokens: int) -> _Routed:
    """Random hidden states, routed by the gate of the first layer that has one."""
    x_TD = torch.randn(num_tokens, model.config.hidden_size, requires_grad=True)
    with torch.no_grad():
        _, weight_TK, index_TK = model.base_model.layers[1].mlp.gate(x_TD)
    return _Routed(x_TD, index_TK, weight_TK)


def _experts(model: Any, routed: _Routed, *names: str) -> list[Callable[[], None]]:
    """The layer's experts on the routed tokens, in each of the named implementations."""
    experts = model.base_model.layers[1].mlp.experts
    return [partial(_backward, model, name, lambda: experts(*routed)) for name in names]


def _products(model: Any, index_TK: Tensor) -> Callable[[], None]:
    """The matrix products of forward and backward alone, each expert's on as many rows as it has tokens."""
    experts = model.base_model.layers[1].mlp.experts
    counts = torch.bincount(index_TK.flatten(), minlength=len(experts.down_proj)).tolist()
    gate_up_EFD, down_EDI = experts.gate_up_proj.detach(), experts.down_proj.detach()
    (_, width_F, width_D), width_I = gate_up_EFD.shape, down_EDI.shape[2]
    rows = [(torch.randn(n, width_D), torch.randn(n, width_F), torch.randn(n, width_I)) for n in counts]

    def multiply() -> None:
        for (x_nD, x_nF, x_nI), gate_up_FD, down_DI in zip(rows, gate_up_EFD, down_EDI, strict=True):
            for a, b in ((x_nD, gate_up_FD.T), (x_nI, down_DI.T), (x_nD, down_DI), (x_nF, gate_up_FD)):
                torch.mm(a, b)
            torch.mm(x_nD.T, x_nI)
            torch.mm(x_nF.T, x_nD)

    return multiply


def _backward(model: PreTrainedModel, experts: str, forward: Callable[[], Tensor]) -> None:
    model.set_experts_implementation(experts)
    forward().sum().backward()


def _median_seconds(repeats: int, *alternatives: Callable[[], None], threads: int = 1) -> list[float]:
    """Medians of `seconds_in_turns`; with one thread of CPU seconds, which other load hardly affects."""
    before, clock = torch.get_num_threads(), time.process_time if threads == 1 else time.perf_counter
    torch.set_num_threads(threads)
    series = seconds_in_turns(repeats, *alternatives, clock=clock)
    torch.set_num_threads(before)
    return medians(series)


def _relative(value: Tensor, exact: Tensor) -> float:
    return ((value - exact).norm() / exact.norm()).item()
