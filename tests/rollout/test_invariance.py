"""A completion on the CPU depends on its own seed and prompt, not on the batch: the changes of rollout.invariance to
vLLM, one by one. Whole engines: test_engine.py and test_pool.py."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm import _custom_ops as vllm_ops
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.worker.gpu.sample.states import SamplingStates

from rollout import invariance
from rollout.seeds import prompt_seeds

pytestmark = pytest.mark.engine


@pytest.fixture(autouse=True, scope="module")
def _patched() -> None:
    invariance.make_batch_invariant()


def request(seed: int, num_tokens: int) -> Any:
    return SimpleNamespace(sampling_params=SamplingParams(seed=seed), output_token_ids=[0] * num_tokens)


def test_seeds_depend_on_the_place_alone() -> None:
    whole = prompt_seeds(7, range(9))
    assert [prompt_seeds(7, range(9)[part::3]) for part in range(3)] == [whole[part::3] for part in range(3)]
    assert len({*whole, *prompt_seeds(8, range(9))}) == 18
    assert prompt_seeds(7, []) == []


def test_the_runner_for_gpus_takes_the_same_seeds() -> None:
    """vLLM's Model Runner V2 keeps a request's seed as int64; without one it draws from numpy's global generator."""
    states: Any = SamplingStates.__new__(SamplingStates)
    states.vocab_size = 264
    states.num_logprobs, states.seeds_set = np.zeros(8, np.int32), np.zeros(8, bool)
    for name, dtype in {"temperature": "f4", "top_p": "f4", "top_k": "i4", "min_p": "f4", "seeds": "i8"}.items():
        setattr(states, name, SimpleNamespace(np=np.zeros(8, dtype)))
    largest = 2**62 - 1
    params = SamplingParams(n=8, seed=largest)
    parent = ParentRequest(cast(Any, SimpleNamespace(request_id="0", external_req_id="0", params=params)))
    for index in range(8):
        SamplingStates.add_request(states, index, parent.get_child_info(index)[1])
    assert states.seeds.np.tolist() == [largest + index for index in range(8)]
    assert states.seeds_set.all()


def test_noise_is_uniform_over_groups_and_places() -> None:
    """The seeds of a group are consecutive, and so are places: a noise that only shifted would favour tokens."""
    sources = [invariance.RequestSeed(request(seed, place)) for seed in range(1000, 1100) for place in range(200)]
    logits = torch.zeros(len(sources), 20)
    sampled = torch.ops._C.fused_gumbel_argmax(logits, invariance.row_seeds(sources)).view(100, 200)
    expected = len(sources) / 400
    for before, after in (
        (sampled[:, :-1], sampled[:, 1:]),
        (sampled[:-1], sampled[1:]),
        (sampled[:-1, :-1], sampled[1:, 1:]),
    ):
        pairs = before * 20 + after
        counts = torch.bincount(pairs.flatten(), minlength=400) * (len(sources) / pairs.numel())
        chi_square = ((counts - expected) ** 2 / expected).sum().item()
        assert 300 < chi_square < 500  # mean 399, deviation 28


def test_a_part_of_a_prompt_uses_no_noise_up() -> None:
    source = invariance.RequestSeed(request(5, 3))
    before = invariance.row_seeds([source])
    source.set_offset(source.get_offset() - 4)  # vLLM, after the discarded token of an unfinished prompt
    assert torch.equal(invariance.row_seeds([source]), before)


def test_a_request_without_a_seed_shares_a_batch_with_seeded_ones() -> None:
    """As under `vllm serve`: its noise is random, theirs is not."""
    source = invariance.RequestSeed(request(5, 3))
    first, second, third = (invariance.row_seeds([None, source, None]) for _ in range(3))
    assert first[1] == second[1] == third[1] == invariance.row_seeds([source])[0]
    assert len({*first[::2].tolist(), *second[::2].tolist(), *third[::2].tolist()}) == 6


def router(**settings: Any) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    routes = CPURouter(top_k=2, global_num_experts=12, **settings)
    return lambda scores: routes._compute_routing(scores, scores, None)


def linear(num_inputs: int) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    weight = torch.randn(48, num_inputs, generator=torch.Generator().manual_seed(1))
    handler = vllm_ops.create_onednn_mm(weight.t(), 32)
    return lambda rows: (vllm_ops.onednn_mm(handler, rows, None),)


@pytest.mark.parametrize(
    ("function", "width"),
    [
        (router(use_grouped_topk=True, num_expert_group=2, topk_group=1, scoring_func="sigmoid"), 12),
        (router(renormalize=False), 12),
        (linear(128), 128),
        (linear(1536), 1536),
    ],
    ids=["router, sigmoid", "router, softmax", "product of 128", "product of 1536"],
)
def test_a_row_depends_on_itself_alone(
    function: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], width: int
) -> None:
    rows = torch.randn(100, width, generator=torch.Generator().manual_seed(2))
    whole = function(rows)
    for first in (0, 33):
        for number in range(1, 34):
            part = slice(first, first + number)
            assert all(torch.equal(a, b[part]) for a, b in zip(function(rows[part]), whole, strict=True)), part
