"""Engines that need a process of their own: without a patch, over the latent cache, on a dense model, past the window
that a model was first trained with.

Each is compared with transformers fresh and after a sync.
"""

import pytest

from tests.rollout import tiny
from tests.rollout.variants import Gaps, gaps_of

pytestmark = pytest.mark.engine

SCRIPT = """
from configs.sampling import SamplingConfig
from rollout import cpu, engine as door
from tests.rollout import tiny

def measure(make, without, root):
    patch = cpu.pack_output_head
    if without:
        setattr(cpu, without, lambda *_: None)
    first, second = getattr(tiny, make)(0), getattr(tiny, make)(1)
    engine = door.RolloutEngine(tiny.save(first, root / "first"), tiny.CONFIG, "float32", seed=0)
    sampling = SamplingConfig(max_tokens=24)
    fresh = tiny.rollout_gap(first, list(engine.generate(tiny.PROMPTS, sampling, 4, 1)))
    engine.load_weights(tiny.buckets(tiny.weights(tiny.save(second, root / "second"))), version=1)
    synced = tiny.rollout_gap(second, list(engine.generate(tiny.PROMPTS, sampling, 4, 1)))
    gaps = [fresh, synced]
    if without == "pack_output_head":  # the same engine goes on with it
        cpu.pack_output_head = patch
        engine.load_weights(tiny.buckets(tiny.weights(root / "second")), version=2)
        gaps.append(tiny.rollout_gap(second, list(engine.generate(tiny.PROMPTS, sampling, 4, 1))))
    return gaps
"""

VARIANTS = {
    "no rotary patch": ("moe", "_patch_rotary_kernel", {}),
    "no reload patch": ("moe", "_patch_expert_reload", {}),
    "no head patch": ("llama", "pack_output_head", {}),
    "latent cache": ("moe", "", {"VLLM_MLA_DISABLE": "0"}),
    "yarn": ("yarn", "", {}),
    "deepseek_v2": ("v2", "", {}),
}


@pytest.fixture(scope="module")
def gaps(tmp_path_factory: pytest.TempPathFactory) -> Gaps:
    """Gaps (mean, largest) of every variant, fresh and after a sync; without the head's patch also after another sync
    with it."""
    return gaps_of(SCRIPT, VARIANTS, tmp_path_factory.mktemp("variants"))


def test_without_the_rotary_patch_positions_are_wrong(gaps: Gaps) -> None:
    fresh, synced = gaps["no rotary patch"]
    assert fresh[0] > 1e-3
    assert synced[0] > 1e-3


def test_without_the_reload_patch_experts_are_scrambled(gaps: Gaps) -> None:
    fresh, synced = gaps["no reload patch"]
    assert tiny.within_bounds(fresh)
    assert synced[0] > 1e-3


def test_without_the_head_patch_a_tied_head_is_stale(gaps: Gaps) -> None:
    """With the patch a dense model agrees, fresh and synced."""
    fresh, synced, mended = gaps["no head patch"]
    assert tiny.within_bounds(fresh)
    assert synced[0] > 1e-3
    assert tiny.within_bounds(mended)


@pytest.mark.parametrize("variant", ["latent cache", "yarn", "deepseek_v2"])
def test_mended_it_agrees(gaps: Gaps, variant: str) -> None:
    """Over the latent cache too, whose absorbed matrices are made from the weights on every load; under YaRN, at
    positions up to three times the window that it stretches; and DeepSeek-V2, whose gates take a softmax."""
    assert all(tiny.within_bounds(gap) for gap in gaps[variant])
