"""Engines that need a process of their own: without a mend, over the latent cache, on a dense model.

Each is compared with transformers fresh and after a sync.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.rollout import tiny

pytestmark = pytest.mark.engine

SCRIPT = """
import json, sys
from pathlib import Path
from configs.sampling import SamplingConfig
from rollout import engine as door
from tests.rollout import tiny

make, without, root = getattr(tiny, sys.argv[1]), sys.argv[2], Path(sys.argv[3])
if without:
    setattr(door, without, lambda *_: None)
first, second = make(0), make(1)
engine = door.Engine(tiny.save(first, root / "first"), tiny.CONFIG, "float32", seed=0)
sampling = SamplingConfig(max_tokens=24)
fresh = tiny.rollout_gap(first, list(engine.generate(tiny.PROMPTS, sampling, 4, 1)))
engine.load_weights(tiny.buckets(tiny.weights(tiny.save(second, root / "second"))), version=1)
synced = tiny.rollout_gap(second, list(engine.generate(tiny.PROMPTS, sampling, 4, 1)))
print(json.dumps([fresh, synced]))
"""

VARIANTS = {
    "no rotary mend": ("moe", "_mend_rotary_kernel", {}),
    "no reload mend": ("moe", "_mend_expert_reload", {}),
    "no head mend": ("llama", "_mend_tied_head", {}),
    "latent cache": ("moe", "", {"VLLM_MLA_DISABLE": "0"}),
    "dense": ("llama", "", {}),
}

Gaps = dict[str, list[tuple[float, float]]]


@pytest.fixture(scope="module")
def gaps(tmp_path_factory: pytest.TempPathFactory) -> Gaps:
    """Of every variant, the gap (mean, largest) fresh and after a sync."""
    folders = [tmp_path_factory.mktemp("variant") for _ in VARIANTS]
    with ThreadPoolExecutor(2) as threads:
        return dict(zip(VARIANTS, threads.map(measure, VARIANTS.values(), folders), strict=True))


def measure(variant: tuple[str, str, dict[str, str]], folder: Path) -> list[tuple[float, float]]:
    make, without, environment = variant
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, make, without, str(folder)],
        env=os.environ | environment,
        cwd=tiny.ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return [tuple(gap) for gap in json.loads(result.stdout.splitlines()[-1])]


def test_without_the_rotary_mend_positions_are_wrong(gaps: Gaps) -> None:
    fresh, synced = gaps["no rotary mend"]
    assert fresh[0] > 1e-3
    assert synced[0] > 1e-3


def test_without_the_reload_mend_experts_are_scrambled(gaps: Gaps) -> None:
    fresh, synced = gaps["no reload mend"]
    assert tiny.within_bounds(fresh)
    assert synced[0] > 1e-3


def test_without_the_head_mend_a_tied_head_is_stale(gaps: Gaps) -> None:
    fresh, synced = gaps["no head mend"]
    assert tiny.within_bounds(fresh)
    assert synced[0] > 1e-3


@pytest.mark.parametrize("variant", ["latent cache", "dense"])
def test_mended_it_agrees(gaps: Gaps, variant: str) -> None:
    """Over the latent cache too, whose absorbed matrices are made from the weights on every load."""
    assert all(tiny.within_bounds(gap) for gap in gaps[variant])
