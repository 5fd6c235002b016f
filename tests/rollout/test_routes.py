"""Routes of a real engine on a tiny DeepSeek-V3 against the routers of `transformers`; its cache is so small that it
preempts, and its prompts begin alike, so that blocks are shared within groups and between them."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.sampling import SamplingConfig
from pipeline.data.trees import Branch, MicroBatch, Tree, micro_batch
from pipeline.models.attention import Layout
from pipeline.models.logprobs import LogprobModel, keep_only
from rollout.engine import RolloutEngine
from rollout.types import Group
from tests.rollout import tiny

pytestmark = pytest.mark.engine

SAMPLING = SamplingConfig(max_tokens=70, ignore_eos=True)
SYSTEM = [1, 3, *range(40, 110)]
PROMPTS = [[*SYSTEM, *range(5 + 11 * i, 12 + 13 * i)] for i in range(3)]
CONFIG = tiny.CONFIG.model_copy(update={"kv_cache_gib": 8 / 1024})
MODELS = [tiny.moe(0), tiny.moe(1)]
NUM_LAYERS, TOP_K = 3, 2  # the first of four layers is dense


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> RolloutEngine:
    return RolloutEngine(
        tiny.save(MODELS[0], tmp_path_factory.mktemp("model")),
        CONFIG,
        "float32",
        seed=0,
        with_routes=True,
        with_kept=True,
    )


def generate(engine: RolloutEngine, num_completions: int = 4) -> list[Group]:
    return sorted(engine.generate(PROMPTS, SAMPLING, num_completions, seed=1), key=lambda group: group.index)


def expected(model: torch.nn.Module, token_ids: list[int]) -> np.ndarray:
    """[T, L, K] the experts that transformers' routers send each token to, in ascending order."""
    chosen: list[np.ndarray] = []
    handles = [
        module.register_forward_hook(lambda _module, arguments, _output: chosen.append(arguments[1].numpy()))
        for name, module in model.named_modules()
        if name.endswith("mlp.experts")
    ]
    with torch.no_grad():
        model(torch.tensor([token_ids]))
    for handle in handles:
        handle.remove()
    return np.sort(np.stack(chosen, axis=1), axis=-1)


def assert_as_expected(model: torch.nn.Module, groups: list[Group]) -> None:
    for group in groups:
        assert group.routed_experts is not None
        for completion in group.completions:
            routes_TLK = completion.routed_experts
            assert routes_TLK is not None
            assert routes_TLK.shape == (len(completion.token_ids), NUM_LAYERS, TOP_K)
            assert routes_TLK.dtype == np.int16
            assert (routes_TLK[-1] == -1).all(), "the last token was never read"
            known = np.concatenate([group.routed_experts, routes_TLK[:-1]])
            np.testing.assert_array_equal(
                np.sort(known, axis=-1), expected(model, group.prompt_ids + completion.token_ids[:-1])
            )


def counted(engine: RolloutEngine, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Counts the requests that the engine has preempted since."""
    core: Any = engine._llm.llm_engine.engine_core
    scheduler = core.engine_core.scheduler
    count = [0]
    preempt = scheduler._preempt_request

    def counting(*args: object, **kwargs: object) -> None:
        count[0] += 1
        preempt(*args, **kwargs)

    monkeypatch.setattr(scheduler, "_preempt_request", counting)
    return lambda: count[0]


def test_kept_tokens_are_those_of_top_k_and_top_p(engine: RolloutEngine) -> None:
    """Through preemptions: by a sort of transformers' logits, but where rounding decides on the last one; and the
    engine's log-probabilities are those of the kept tokens alone."""
    sampling = SamplingConfig(max_tokens=70, ignore_eos=True, temperature=0.7, top_k=6, top_p=0.9)
    groups = list(engine.generate(PROMPTS, sampling, 4, seed=1))
    differing = 0
    for group in groups:
        for completion in group.completions:
            kept = completion.kept_tokens
            assert kept is not None and len(kept.counts) == len(completion.token_ids) == 70
            with torch.no_grad():
                logits_TV = MODELS[0](torch.tensor([group.prompt_ids + completion.token_ids])).logits[0, -71:-1] / 0.7
            kept_TK = torch.from_numpy(kept.padded())
            keep_only(logits := logits_TV.clone(), kept_TK)
            own_T = logits.log_softmax(1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            assert (own_T - torch.tensor(completion.logprobs)).abs().max() < tiny.MAX_BOUND / 0.7
            differing += sum(
                set(row[row >= 0].tolist()) != nucleus(logits_V, 6, 0.9)
                for row, logits_V in zip(kept_TK, logits_TV, strict=True)
            )
    assert differing <= 4, "of 840 tokens"
    assert all(completion.kept_tokens is None for group in generate(engine) for completion in group.completions)


def nucleus(logits_V: torch.Tensor, top_k: int, top_p: float) -> set[int]:
    """The likeliest top_k tokens, and of these as many of the likeliest as have top_p of their probability together."""
    values_K, tokens_K = logits_V.topk(top_k)
    before_K = values_K.softmax(0).cumsum(0) - values_K.softmax(0)
    return set(tokens_K[before_K < top_p].tolist())


def test_routes_are_those_of_the_routers_though_requests_are_preempted(
    engine: RolloutEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    preemptions = counted(engine, monkeypatch)
    assert_as_expected(MODELS[0], generate(engine))
    assert preemptions() > 0


def test_a_single_completion_and_what_follows_a_probe(engine: RolloutEngine) -> None:
    engine.prompt_logprobs(PROMPTS)
    assert_as_expected(MODELS[0], generate(engine, num_completions=1))


def test_a_stream_that_was_left_leaves_nothing_behind(engine: RolloutEngine) -> None:
    stream: Any = engine.generate(PROMPTS, SAMPLING, 4, seed=2)
    next(stream)
    stream.close()
    assert_as_expected(MODELS[0], generate(engine))


def test_replayed_in_training_the_routes_are_the_rollouts_and_the_gap_is_smaller(engine: RolloutEngine) -> None:
    row = micro_batch(
        [
            Tree(
                group.prompt_ids,
                [Branch(c.token_ids, {"rollout_logprobs": c.logprobs}, c.routed_experts) for c in group.completions],
                root_experts=group.routed_experts,
            )
            for group in generate(engine)
        ]
    )
    assert row.experts_TLK is not None
    same, other = (LogprobModel(copy.deepcopy(MODELS[0])) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for gate in other.routers.gates:  # a trainer whose gates see something a little different
        gate.module.weight.data += 0.002 * torch.randn(gate.module.weight.shape, generator=generator)
    assert gap(same, row, replayed=True) < tiny.MEAN_BOUND
    own = gap(other, row, replayed=False)
    known_TL = (row.experts_TLK >= 0).all(axis=-1)
    free_TLK, theirs_TLK = (np.sort(x, axis=-1) for x in (other.routers.chosen_TLK.numpy(), row.experts_TLK))
    assert (free_TLK != theirs_TLK)[known_TL].any()
    assert gap(other, row, replayed=True) < 0.5 * own
    np.testing.assert_array_equal(other.routers.chosen_TLK.numpy()[known_TL], row.experts_TLK[known_TL])


@torch.no_grad()
def gap(model: LogprobModel, row: MicroBatch, *, replayed: bool) -> float:
    """Mean |trainer - engine| log-probability over the sampled tokens."""
    arrays = (row.token_ids_T, row.source_N, row.target_N, row.experts_TLK if replayed else None)
    ids_T, source_N, target_N, experts_TLK = (None if x is None else torch.from_numpy(x) for x in arrays)
    values_N = model(ids_T, Layout(row.lengths, row.parents), source_N, target_N, experts_TLK).numpy()
    return float(np.abs(values_N - row.columns["rollout_logprobs"]).mean())


def test_after_a_sync_the_new_routers_are_heard(engine: RolloutEngine, tmp_path: Path) -> None:
    weights = tiny.weights(tiny.save(MODELS[1], tmp_path))
    engine.load_weights(tiny.buckets(weights), version=1)
    assert_as_expected(MODELS[1], generate(engine))
