"""Checks of single operations against a plain float32 reference."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from pipeline.models.attention import Layout, packed_attention
from pipeline.models.experts import sorted_experts
from pipeline.models.fp8 import BLOCK, TILE, Quantised, dequantise, matmul, quantise
from tests.gpu.check import Skip

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
GIB = 2**30


def error(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected tensor."""
    return float((value.float() - expected.float()).norm() / expected.float().norm())


def assert_close(name: str, value: Tensor, expected: Tensor, bound: float) -> float:
    gap = error(value, expected)
    assert gap <= bound, f"{name} differs by {gap:.1e} of its norm, at most {bound:.0e} is allowed"
    return gap


def device(_: Path) -> str:
    if not ON_GPU:
        raise Skip("no device in CPU mode")
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    x = torch.ones(512, 512, device=DEVICE, dtype=DTYPE)
    assert float((x @ x)[0, 0]) == 512.0, "the device multiplies wrongly"
    assert free > 0.8 * total, f"only {free / GIB:.1f} of {total / GIB:.1f} GiB are free: another process uses the GPU"
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return (
        f"{properties.name}, {properties.major}.{properties.minor}, {total / GIB:.0f} GiB; torch {torch.__version__}, "
        f"CUDA {torch.version.cuda}, NCCL {nccl}, cuDNN {torch.backends.cudnn.version()}"
    )


def histogram(_: Path) -> str:
    """`transformers` counts the tokens of its experts by histc, which is on torch's list of indeterminate kernels."""
    torch.use_deterministic_algorithms(True)
    ids = torch.arange(4096, device=DEVICE) % 7
    counts = torch.histc(ids.int() if ON_GPU else ids.float(), bins=8, min=0, max=7)
    expected = torch.bincount(ids.cpu(), minlength=8)
    assert torch.equal(counts.cpu().long(), expected), f"histc counts {counts.tolist()}, not {expected.tolist()}"
    return f"histc of {'int32' if ON_GPU else 'float32'} runs under determinism"


def attention(_: Path) -> str:
    """Completions see their prompt through a kernel without a dense mask or repeated heads."""
    heads, kv_heads, width = (16, 4, 128) if ON_GPU else (4, 2, 16)
    prompt, own = (3072, (2048, 2047, 1536)) if ON_GPU else (24, (16, 15, 12))
    layout = Layout((prompt, *own), (-1, *(0 for _ in own)))
    generator = torch.Generator(DEVICE).manual_seed(0)
    size = sum(layout.lengths)
    query, key, value = (
        torch.randn(1, n, size, width, device=DEVICE, dtype=DTYPE, generator=generator).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    )
    gradient = torch.randn(1, size, heads, width, device=DEVICE, dtype=DTYPE, generator=generator)

    def run() -> Tensor:
        out = packed_attention(nn.Module(), query, key, value, None, scaling=width**-0.5, layout=layout)[0]
        out.backward(gradient)
        return out

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out, peak = measured(run)
    kernels = sorted({event.name for event in profile.events() if "attention" in event.name or "attn" in event.name})
    expected = reference_attention(query, key, value, layout)
    bound = 1e-2 if ON_GPU else 1e-5
    gap = assert_close("the output", out, expected, bound)
    grads = torch.autograd.grad(expected, (query, key, value), gradient.float())
    for name, tensor, grad in zip(("query", "key", "value"), (query, key, value), grads, strict=True):
        assert tensor.grad is not None
        assert_close(f"the gradient of the {name}", tensor.grad, grad, 2 * bound)
    if ON_GPU:
        scores = 4 * heads * own[0] * (prompt + own[0])
        slow = [name for name in kernels if "math" in name or "efficient" in name]
        assert kernels and not slow, f"a kernel that reads a dense mask was taken: {kernels}"
        assert peak < scores / 2, f"{peak / GIB:.2f} GiB were needed, the scores would be {scores / GIB:.2f} GiB"
    return f"error {gap:.0e}, peak {peak / GIB:.2f} GiB, by {', '.join(kernels)}"


def reference_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
    """Attention segment by segment in float32, with all scores written out. [1, T, H, D]."""
    repeats = query.shape[1] // key.shape[1]
    q, k, v = (x.float()[0] for x in (query, key, value))
    k, v = (x.repeat_interleave(repeats, 0) for x in (k, v))
    pieces = [x.split(layout.lengths, dim=1) for x in (q, k, v)]
    outputs = []
    for segment, parent in enumerate(layout.parents):
        seen = [segment] if parent == -1 else [parent, segment]
        q_HLD, (k_HSD, v_HSD) = pieces[0][segment], (torch.cat([x[s] for s in seen], 1) for x in pieces[1:])
        own, total = q_HLD.shape[1], k_HSD.shape[1]
        visible = torch.ones(own, total, dtype=torch.bool, device=q.device).tril(total - own)
        scores = (q_HLD @ k_HSD.mT * q.shape[-1] ** -0.5).masked_fill(~visible, float("-inf"))
        outputs.append(scores.softmax(-1) @ v_HSD)
    return torch.cat(outputs, dim=1).transpose(0, 1).unsqueeze(0)


def experts(_: Path) -> str:
    """A layer's experts, forward and backward, by the grouped products of the device."""
    config = Qwen3MoeConfig(hidden_size=256, moe_intermediate_size=128, num_experts=8, num_experts_per_tok=2)
    torch.manual_seed(0)
    layer: Any = Qwen3MoeExperts(config).to(DEVICE, DTYPE)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.05)
    hidden = torch.randn(500, 256, device=DEVICE, dtype=DTYPE, requires_grad=True)
    index = torch.randint(0, 7, (500, 2), device=DEVICE)  # the last expert gets no token
    weights = torch.rand(500, 2, device=DEVICE, dtype=torch.float32)
    out = sorted_experts(layer, hidden, index, weights)
    out.float().square().sum().backward()
    inputs = [x.detach().float().requires_grad_() for x in (hidden, layer.gate_up_proj, layer.down_proj)]
    x, gate_up, down = inputs
    expected = torch.zeros(500, 256, device=DEVICE)
    for expert in range(8):
        token, place = torch.where(index == expert)
        gate, up = (x[token] @ gate_up[expert].T).chunk(2, -1)
        product = (nn.functional.silu(gate) * up) @ down[expert].T
        expected = expected.index_add(0, token, product * weights[token, place, None])
    expected.square().sum().backward()
    bound = 2e-2 if ON_GPU else 1e-5
    gap = assert_close("the output", out, expected, bound)
    for name, grad, own in zip(
        ("input", "gate_up_proj", "down_proj"), inputs, (hidden, layer.gate_up_proj, layer.down_proj), strict=True
    ):
        assert grad.grad is not None
        assert_close(f"the gradient of {name}", own.grad, grad.grad, 2 * bound)
    return f"error {gap:.0e} with 8 experts, one of them idle"


def fp8_products(_: Path) -> str:
    """Products by the device's FP8 kernel, against the exact product of the dequantised matrices."""
    capability = torch.cuda.get_device_capability() if ON_GPU else None
    if ON_GPU and capability != (9, 0):
        raise Skip(f"compute capability {capability} has no kernel here, so the reference is used; Hopper is (9, 0)")
    torch.manual_seed(0)
    gaps = []
    for rows, columns, inner, tile in ((300, 384, 512, BLOCK), (128, 200, 640, TILE), (1, 128, 128, BLOCK)):
        a = quantise(torch.randn(rows, inner, device=DEVICE), TILE)
        b: Quantised = quantise(torch.randn(columns, inner, device=DEVICE), tile)
        expected = dequantise(a).double() @ dequantise(b).double().T
        gaps.append(assert_close(f"{rows} x {columns} x {inner}", matmul(a, b), expected, 5e-3))
    return f"errors {', '.join(f'{gap:.0e}' for gap in gaps)}"


def measured(run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """Run, and return the result and the bytes that it needed on the device beside what was there before."""
    if not ON_GPU:
        return run(), 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before
