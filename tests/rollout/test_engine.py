"""One real engine on a tiny DeepSeek-V3, against transformers: sampling, weight syncs and refusals."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.sampling import SamplingConfig
from pipeline.models.tokenizer import BYTE_SPECIAL_TOKENS
from rollout import engine as door
from rollout.device import DeviceError, DeviceState
from rollout.engine import RolloutEngine
from rollout.queue import GenerationQueue
from rollout.types import Completion, Group, SyncError
from rollout.weights import to_buckets
from tests.rollout import tiny
from tests.rollout.tiny import CONFIG, PROMPTS

pytestmark = pytest.mark.engine

SAMPLING = SamplingConfig(max_tokens=24)
GREEDY = SamplingConfig(max_tokens=8, temperature=0)
EXPERT = "model.layers.2.mlp.experts.5.down_proj.weight"

ENDS = (2, 5, 7)
"""The tokenizer's own, generation_config's and a chat template's."""

MODELS = {"first": tiny.moe(0), "second": tiny.moe(1)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: tiny.save(model, root / name) for name, model in MODELS.items()}


@pytest.fixture(scope="module")
def module_engine(folders: dict[str, Path]) -> RolloutEngine:
    file = folders["first"] / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [2, 5]}))
    return RolloutEngine(folders["first"], CONFIG, "float32", seed=0, stop_token_ids=[7])


@pytest.fixture
def engine(module_engine: RolloutEngine, folders: dict[str, Path]) -> Iterator[RolloutEngine]:
    """The module's engine; a test that teaches it other weights finds the first ones again afterwards."""
    yield module_engine
    if module_engine.policy_version != 0:
        module_engine.load_weights(tiny.buckets(tiny.weights(folders["first"])), version=0)


def generate(
    engine: RolloutEngine, seed: int, sampling: SamplingConfig = SAMPLING, num_completions: int = 4
) -> list[Group]:
    groups = list(engine.generate(PROMPTS, sampling, num_completions, seed))
    return sorted(groups, key=lambda group: group.index)


def completions(groups: list[Group]) -> list[Completion]:
    return [completion for group in groups for completion in group.completions]


def test_agrees_with_transformers_fresh(engine: RolloutEngine) -> None:
    assert tiny.within_bounds(tiny.rollout_gap(MODELS["first"], generate(engine, 1)))
    assert tiny.within_bounds(tiny.prompt_gap(MODELS["first"], engine.prompt_logprobs(PROMPTS)))


def test_logprobs_are_those_of_the_distribution_that_was_sampled_from(engine: RolloutEngine) -> None:
    """At temperature 0.7, by transformers' logits divided by it; prompts are scored at temperature 1."""
    for group in generate(engine, 1, SamplingConfig(max_tokens=24, temperature=0.7)):
        for completion in group.completions:
            gaps = tiny.logprobs(MODELS["first"], group.prompt_ids + completion.token_ids, temperature=0.7)
            gaps = gaps[-len(completion.token_ids) :] - torch.tensor(completion.logprobs)
            assert gaps.abs().max() < tiny.MAX_BOUND / 0.7
    assert tiny.within_bounds(tiny.prompt_gap(MODELS["first"], engine.prompt_logprobs(PROMPTS)))


def test_agrees_with_transformers_after_a_sync(engine: RolloutEngine, folders: dict[str, Path]) -> None:
    before = generate(engine, 1)
    sent = tiny.buckets(tiny.weights(folders["second"]))
    manifest = engine.load_weights(sent, version=3)
    assert manifest == [record for bucket in sent for record in bucket.records]
    after = generate(engine, 1)
    assert {completion.policy_version for completion in completions(after)} == {3}
    assert tiny.within_bounds(tiny.rollout_gap(MODELS["second"], after))
    assert tiny.within_bounds(tiny.prompt_gap(MODELS["second"], engine.prompt_logprobs(PROMPTS)))
    assert tiny.rollout_gap(MODELS["first"], after)[0] > 0.1, "the two models must differ for this to prove anything"
    engine.load_weights(tiny.buckets(tiny.weights(folders["first"])), version=0)
    assert generate(engine, 1) == before


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_one_stale_expert_shows(engine: RolloutEngine, folders: dict[str, Path], layer: int) -> None:
    """The stale expert is one that the probe's tokens reach; others change no log-probability."""
    tokens = tiny.tokens_per_expert(MODELS["second"], layer)
    rarest = min(tokens, key=tokens.__getitem__)
    name = f"model.layers.{layer}.mlp.experts.{rarest}.down_proj.weight"
    first, second = tiny.weights(folders["first"]), tiny.weights(folders["second"])
    engine.load_weights(tiny.buckets(second | {name: first[name]}), version=1)
    mean, largest = tiny.prompt_gap(MODELS["second"], engine.prompt_logprobs(PROMPTS))
    assert mean > 10 * tiny.MEAN_BOUND
    assert largest > 10 * tiny.MAX_BOUND


def test_a_sync_that_fails_names_the_tensor_and_nothing_is_generated_until_one_succeeds(
    engine: RolloutEngine, folders: dict[str, Path]
) -> None:
    before = engine.prompt_logprobs(PROMPTS)
    first, second = tiny.weights(folders["first"]), tiny.weights(folders["second"])
    without = {name: tensor for name, tensor in second.items() if name != EXPERT}
    with pytest.raises(SyncError, match=f"1 of {len(second)} tensors .*'{EXPERT}'"):
        engine.load_weights(tiny.buckets(without), version=1)
    with pytest.raises(DeviceError, match="partly old"):
        engine.prompt_logprobs(PROMPTS)
    damaged = tiny.buckets({name: tensor.clone() for name, tensor in second.items()})
    damaged[-1].payloads[-1][0] ^= 1
    with pytest.raises(SyncError, match=f"'{damaged[-1].records[-1].name}': checksum"):
        engine.load_weights(damaged, version=1)
    with pytest.raises(DeviceError, match="partly old"):
        generate(engine, 1)
    doubled = tiny.buckets(second)
    with pytest.raises(SyncError, match=f"'{doubled[0].records[0].name}' was sent twice"):
        engine.load_weights([doubled[0], *doubled], version=1)
    assert engine.policy_version == 0
    engine.load_weights(tiny.buckets(first), version=0)
    assert engine.prompt_logprobs(PROMPTS) == before


def test_a_worker_holds_two_buckets_at_most(engine: RolloutEngine, folders: dict[str, Path]) -> None:
    """Whatever the model's size: vLLM keeps a bucket only until the modules of its tensors are loaded."""
    weights = tiny.weights(folders["first"])
    bucket_bytes = max(experts_bytes(weights), max(tensor.nbytes for tensor in weights.values()))
    assert sum(tensor.nbytes for tensor in weights.values()) > 4 * bucket_bytes
    engine.begin_sync()
    for bucket in to_buckets(((name, tensor.clone()) for name, tensor in weights.items()), bucket_bytes / 2**20):
        engine.receiver.receive([bucket])
        del bucket
    assert 0 < engine.end_sync(version=0).held_bytes <= 2 * bucket_bytes


def experts_bytes(weights: dict[str, torch.Tensor]) -> int:
    """Bytes of the experts of a layer, the largest module that vLLM loads at once."""
    return sum(tensor.nbytes for name, tensor in weights.items() if ".layers.1.mlp.experts." in name)


def test_the_same_seed_says_the_same_to_the_bit(engine: RolloutEngine) -> None:
    first = generate(engine, 7)
    other = generate(engine, 8, SamplingConfig(max_tokens=40, top_p=0.9, temperature=0.7), num_completions=3)
    engine.prompt_logprobs(PROMPTS[:1])
    torch.manual_seed(123)
    assert generate(engine, 7) == first
    assert generate(engine, 9) != first
    assert other != first


@pytest.mark.parametrize("num_engines", [2, 3, 4])
def test_a_completion_is_the_same_on_any_split_of_the_prompts(engine: RolloutEngine, num_engines: int) -> None:
    """To the bit: the parts are decoded in other batches, the last rows alone."""
    whole = generate(engine, 7)
    queue = GenerationQueue(num_engines)
    ticket = queue.add(PROMPTS, SAMPLING, 4, seed=7)
    parts = [queue.take(number, 16) for number in range(num_engines)]
    assert all(parts) and not queue.take(0, 16)
    for number, requests in enumerate(parts):
        queue.receive(number, engine.advance(requests, 600.0))
    groups, is_last = queue.pop(ticket)
    assert is_last and sorted(groups, key=lambda group: group.index) == whole


def test_a_prompt_computed_in_parts_gives_the_same(engine: RolloutEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own generators raise here on the CPU, where they have no offset to rewind."""
    whole = generate(engine, 7)
    core: Any = engine._llm.llm_engine.engine_core
    monkeypatch.setattr(core.engine_core.scheduler, "max_num_scheduled_tokens", 16)
    assert generate(engine, 7) == whole


def test_answers_of_a_group_differ_unless_greedy(engine: RolloutEngine) -> None:
    for group in generate(engine, 2):
        assert len({tuple(completion.token_ids) for completion in group.completions}) == 4
    with pytest.raises(ValueError, match=r"num_completions=4 at sampling\.temperature=0"):
        generate(engine, 2, GREEDY)
    for group in generate(engine, 2, GREEDY, num_completions=1):
        ids_1T = torch.tensor([group.prompt_ids])
        with torch.no_grad():
            likeliest = MODELS["first"](ids_1T).logits[0, -1].argmax().item()
        assert group.completions[0].token_ids[0] == likeliest


def test_a_completion_ends_with_its_end_token_or_its_length(engine: RolloutEngine) -> None:
    sampled = completions(generate(engine, 3, SamplingConfig(max_tokens=100), num_completions=8))
    assert {completion.finish_reason for completion in sampled} == {"stop", "length"}
    for completion in sampled:
        assert len(completion.logprobs) == len(completion.token_ids)
        ends = [place for place, token in enumerate(completion.token_ids) if token in ENDS]
        if completion.finish_reason == "stop":
            assert ends == [len(completion.token_ids) - 1]
        else:
            assert not ends
            assert len(completion.token_ids) == 100
    last = {completion.token_ids[-1] for completion in sampled if completion.finish_reason == "stop"}
    assert last == set(ENDS), "the tokenizer's end, generation_config's and the chat template's"


def test_text_has_every_special_token_but_ends_and_padding(engine: RolloutEngine) -> None:
    for ignore_eos in (False, True):
        sampling = SamplingConfig(max_tokens=100, ignore_eos=ignore_eos)
        sampled = completions(generate(engine, 3, sampling, num_completions=8))
        for token, index in zip(BYTE_SPECIAL_TOKENS, range(8), strict=True):
            counted = sum(completion.token_ids.count(index) for completion in sampled)
            shown = sum(completion.text.count(token) for completion in sampled)
            assert shown == (0 if index in (0, *ENDS) else counted), token
            assert counted


def test_ignoring_the_end_token_gives_exactly_max_tokens(engine: RolloutEngine) -> None:
    sampled = completions(generate(engine, 3, SamplingConfig(max_tokens=100, ignore_eos=True), num_completions=8))
    assert {len(completion.token_ids) for completion in sampled} == {100}
    assert {completion.finish_reason for completion in sampled} == {"length"}
    assert any(2 in completion.token_ids for completion in sampled)


def test_a_group_is_yielded_before_the_last_is_finished(engine: RolloutEngine) -> None:
    whole = generate(engine, 4)
    stream = engine.generate(PROMPTS, SAMPLING, 4, 4)  # 16 completions, 8 at once
    first = next(stream)
    beside = engine.prompt_logprobs(PROMPTS)
    assert tiny.within_bounds(tiny.prompt_gap(MODELS["first"], beside))
    with pytest.raises(AssertionError, match="close the stream"):
        engine.continuation_logprobs(PROMPTS, [1] * 4)
    rest = list(stream)
    assert sorted([first, *rest], key=lambda group: group.index) == whole


def test_leaving_a_stream_early_ends_the_request(engine: RolloutEngine) -> None:
    whole = generate(engine, 4)
    stream = engine.generate(PROMPTS, SAMPLING, 4, 4)
    next(stream)
    stream.close()
    assert generate(engine, 4) == whole


def test_a_prompt_without_room_is_named(engine: RolloutEngine) -> None:
    fits = [1] * (CONFIG.max_model_len - SAMPLING.max_tokens)
    assert len(list(engine.generate([fits], SAMPLING, 1, 0))) == 1
    with pytest.raises(ValueError, match=r"prompt 1 has 137 tokens.*136"):
        engine.generate([fits, [*fits, 1]], SAMPLING, 1, 0)
    with pytest.raises(ValueError, match="prompt 0 has 0 tokens"):
        engine.generate([[]], SAMPLING, 1, 0)


def test_a_setting_or_a_vllm_that_cannot_be_served_is_named(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"no \*\.safetensors in"):
        RolloutEngine(folders["first"].parent, CONFIG, "float32", seed=0)
    monkeypatch.setattr(door.vllm, "__version__", "0.33.0")
    with pytest.raises(RuntimeError, match=r"vLLM 0\.33\.0 .* 0\.32\.0"):
        RolloutEngine(folders["first"], CONFIG, "float32", seed=0)
    monkeypatch.setattr(door.vllm, "__version__", "0.32.0+cpu")
    assert door.engine_arguments(folders["first"], CONFIG, "float32", 0)["attention_backend"] == "CPU_MLA"


def test_on_a_gpu_every_release_of_the_range_is_served_without_the_patches(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rollout.cpu", None)  # an import of it would raise
    monkeypatch.setattr(door.current_platform, "is_cpu", lambda: False)
    for version in ("0.32.0+cu129", "0.32.1"):
        monkeypatch.setattr(door.vllm, "__version__", version)
        assert door.engine_arguments(folders["first"], CONFIG, "bfloat16", 0)["enable_sleep_mode"]
    monkeypatch.setattr(door.vllm, "__version__", "0.31.0")
    with pytest.raises(RuntimeError, match="test-gpu"):
        door.engine_arguments(folders["first"], CONFIG, "bfloat16", 0)


def test_a_sleeping_engine_refuses_until_it_has_weights_again(engine: RolloutEngine, folders: dict[str, Path]) -> None:
    before = generate(engine, 5)
    engine.to(DeviceState.ASLEEP)
    for call in (lambda: engine.generate(PROMPTS, SAMPLING, 1, 0), lambda: engine.load_weights([], version=1)):
        with pytest.raises(DeviceError, match="rollout engine 0 is in state 'asleep'"):
            call()
    with pytest.raises(DeviceError, match="only from 'weights'"):
        engine.to(DeviceState.AWAKE)
    engine.to(DeviceState.WEIGHTS)
    with pytest.raises(DeviceError, match="load_weights"):
        engine.to(DeviceState.AWAKE)
    engine.load_weights(tiny.buckets(tiny.weights(folders["first"])), version=0)
    with pytest.raises(DeviceError, match="'prompt_logprobs' needs 'awake'"):
        engine.prompt_logprobs(PROMPTS)
    engine.to(DeviceState.AWAKE)
    assert generate(engine, 5) == before


def test_fp8_that_would_not_run_is_refused(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(*kept: str, dtype: str = "bfloat16") -> str:
        with pytest.raises(ValueError) as caught:
            door.engine_arguments(folders["first"], CONFIG.model_copy(update={"fp8": list(kept)}), dtype, 0)
        return str(caught.value)

    assert "not from float32" in refusal("weights", dtype="float32")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert "q_b_proj.weight' has 48" in refusal("weights")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    assert "'kv_cache' needs AVX-512" in refusal("kv_cache")
