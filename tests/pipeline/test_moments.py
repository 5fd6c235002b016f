"""AdamW with moments in bfloat16: what is kept, what is computed, and the same on any layout of ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from configs.train import OptimizerConfig
from pipeline.train import moments
from pipeline.train.moments import BF16MomentsAdamW
from pipeline.weights.fresh import create_model
from tests.pipeline import moments_ranks
from tests.pipeline.rank_processes import run_ranks

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


def descend(optimizer_class: type[torch.optim.AdamW], steps: int) -> tuple[list[Tensor], dict[str, Tensor]]:
    """A least-squares fit: the weight after each step, and the optimizer's state of it at the end."""
    torch.manual_seed(0)
    weight, inputs, targets = nn.Parameter(torch.randn(5, 7)), torch.randn(40, 7), torch.randn(40, 5)
    optimizer = optimizer_class([weight], **OPTIONS, fused=True)  # type: ignore[arg-type]
    trace = []
    for _ in range(steps):
        optimizer.zero_grad()
        (inputs @ weight.T - targets).square().mean().backward()
        optimizer.step()
        trace.append(weight.detach().clone())
    return trace, optimizer.state[weight]


def test_it_is_adamw_but_for_the_rounding_of_what_it_keeps() -> None:
    trace, state = descend(BF16MomentsAdamW, 30)
    expected, exact = descend(torch.optim.AdamW, 30)
    assert torch.equal(trace[0], expected[0])  # only from the second step on is anything read back
    assert not torch.equal(trace[1], expected[1])
    moved = (expected[-1] - expected[0]).abs().max()
    assert (trace[-1] - expected[-1]).abs().max() < 0.02 * moved
    assert state["step"] == exact["step"] == 30
    for moment in ("exp_avg", "exp_avg_sq"):
        assert state[moment].dtype == torch.bfloat16
        torch.testing.assert_close(state[moment].float(), exact[moment], rtol=0.05, atol=1e-4)


def test_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = descend(BF16MomentsAdamW, 5)
    monkeypatch.setattr(moments, "_CHUNK_ELEMENTS", 4)
    assert all(map(torch.equal, whole, descend(BF16MomentsAdamW, 5)[0]))


def left_of(beta: float) -> Tensor:
    """The share of the second moments of gradients between 1 and 2 that 1000 steps of gradients of 0 leave."""
    weight = nn.Parameter(torch.zeros(100))
    optimizer = BF16MomentsAdamW([weight], lr=1e-3, betas=(0.9, beta))
    for grads in (torch.linspace(1, 2, 100), *[torch.zeros(100)] * 1000):
        weight.grad = grads
        optimizer.step()
    return optimizer.state[weight]["exp_avg_sq"] / ((1 - beta) * torch.linspace(1, 2, 100) ** 2)


def test_a_beta_too_near_to_one_is_refused_since_nothing_would_move() -> None:
    assert left_of(0.999).min() > 0.99  # not 0.999^1000 = 0.37
    assert left_of(1 - 2**-8).max() < 0.03
    OptimizerConfig(learning_rate=1e-3, moments="bfloat16", betas=[0.9, 0.99])
    with pytest.raises(ValueError, match=r"moments='bfloat16' .*betas=\[0\.9, 0\.999\]"):
        OptimizerConfig(learning_rate=1e-3, moments="bfloat16", betas=[0.9, 0.999])


@pytest.mark.ranks
def test_every_zero_stage_keeps_them_in_bfloat16_and_resumes_exactly(tmp_path: Path) -> None:
    """The ranks themselves assert both. Moments are rounded element by element, so the stages agree, and wherever the
    weights lie."""
    model = create_model("tiny", 0, tmp_path / "tiny")
    run_ranks(moments_ranks.main, 2, tmp_path, model, tmp_path / "trace.npz")
    trace = dict(np.load(tmp_path / "trace.npz"))
    for stage in ("0", "2", "3", "offloaded"):
        np.testing.assert_allclose(trace[stage], trace["1"], atol=2e-5)
    moved = np.abs(trace["float32"] - trace["start"]).max()
    assert 0 < np.abs(trace["1"] - trace["float32"]).max() < 0.1 * moved
