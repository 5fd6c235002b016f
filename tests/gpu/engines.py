"""Checks of a vLLM engine, alone and together with a training rank, on one GPU."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from configs.sampling import RolloutConfig, SamplingConfig
from rollout.device import DeviceState
from rollout.weights import to_buckets
from tests.gpu.check import Skip
from tests.gpu.kernels import GIB, ON_GPU
from tests.gpu.training import model

KV_CACHE_GIB = 4.0 if ON_GPU else 0.125
PROMPTS = [[1, 3, *range(20 + 7 * i, 40 + 9 * i)] for i in range(4)]
STEP = """
type: grpo
model: {{path: {folder}/policy, dtype: bfloat16}}
prompts: {{source: {{type: sums, size: 64}}, max_prompt_length: 32}}
rewards: [{{name: "{folder}/spread.py:spread"}}]
steps: 3
prompts_per_step: 4
group_size: 4
sampling: {{max_tokens: 24}}
optimizer: {{learning_rate: 1e-4}}
trainer: {{zero_stage: 2}}
rollout: {{max_model_len: 64, kv_cache_gib: {kv_cache_gib}}}
objective: {{kl_coef: 0.01}}
checkpoint: {{every_steps: 2}}
"""


def used_bytes() -> int:
    """Bytes of the device that any process uses."""
    if not ON_GPU:
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


@contextmanager
def neighbour(share: float) -> Iterator[None]:
    """Another process that holds this share of the device, as a training rank would."""
    program = (
        f"import torch; size = int({share} * torch.cuda.mem_get_info()[1]); "
        "held = torch.empty(size, dtype=torch.uint8, device='cuda'); print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "held", "the neighbour could not take its memory"
        yield
    finally:
        process.kill()
        process.wait()


def start(folder: Path, path: Path, **rollout: Any) -> Any:
    from rollout.engine import RolloutEngine  # sets vLLM up

    config = RolloutConfig(max_model_len=160, max_num_seqs=16, kv_cache_gib=KV_CACHE_GIB, **rollout)
    os.environ["VLLM_CACHE_ROOT"] = str(folder / "cache")
    return RolloutEngine(path, config, "bfloat16", seed=0)


def gap_to_transformers(engine: Any, path: Path) -> float:
    """Mean |difference| of sampled tokens' log-probabilities, in nats, to a float32 model of transformers."""
    causal_lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    gaps = []
    for group in engine.generate(PROMPTS, SamplingConfig(max_tokens=24), 4, 0):
        for completion in group.completions:
            ids = torch.tensor(group.prompt_ids + list(completion.token_ids))
            with torch.no_grad():
                logits = causal_lm(ids[None]).logits[0, :-1].log_softmax(-1)
            expected = logits.gather(1, ids[1:, None])[len(group.prompt_ids) - 1 :, 0].numpy()
            gaps.append(np.abs(np.asarray(completion.logprobs) - expected))
    return float(np.concatenate(gaps).mean())


def engine(folder: Path) -> str:
    """An engine starts beside a process that holds a third of the device, gives its memory back, and comes back with
    the weights that it is sent."""
    path = model(folder / "policy")
    if not ON_GPU:
        return _engine(folder, path)
    with neighbour(0.33):
        return _engine(folder, path)


def _engine(folder: Path, path: Path) -> str:
    before = used_bytes()
    own = start(folder, path)
    fresh = gap_to_transformers(own, path)
    awake = used_bytes() - before
    own.to(DeviceState.ASLEEP)
    asleep = used_bytes() - before
    own.to(DeviceState.WEIGHTS)
    own.load_weights(to_buckets(load_file(path / "model.safetensors").items(), 16), version=1)
    own.to(DeviceState.AWAKE)
    synced = gap_to_transformers(own, path)
    assert fresh < 0.05, f"a fresh engine differs from transformers by {fresh:.3f} nats a token"
    assert synced < 1.5 * fresh + 1e-3, f"{fresh:.1e} nats from transformers before sleep, {synced:.1e} after a sync"
    if ON_GPU:
        freed = awake - asleep
        assert freed > 0.9 * KV_CACHE_GIB * GIB, f"sleep gave back {freed / GIB:.2f} of {awake / GIB:.2f} GiB"
    return f"{awake / GIB:.1f} GiB awake, {asleep / GIB:.1f} asleep; gap {fresh:.1e} fresh, {synced:.1e} after a sync"


def grpo(folder: Path) -> str:
    """Three steps of GRPO as a user runs them: rank and engine on one device, in turns, with a checkpoint to resume."""
    model(folder / "policy")
    (folder / "spread.py").write_text("def spread(task, completion):\n    return len(completion) % 7 / 6\n")
    config = folder / "step.yaml"
    config.write_text(STEP.format(folder=folder, kv_cache_gib=KV_CACHE_GIB))
    command = [sys.executable, "-m", "jobs.cli", "grpo", str(config), "--output", str(folder / "run")]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, f"alignyard grpo ended with {done.returncode}: {done.stdout[-1500:]}"
    steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    gaps = [step["sync/gap_mean"] for step in steps if "sync/gap_mean" in step]
    assert len(gaps) >= 3 and np.isfinite(gaps).all(), f"metrics of the syncs: {gaps}"
    AutoModelForCausalLM.from_pretrained(folder / "run" / "hf")
    seconds = steps[-1].get("sync/transfer_seconds", float("nan"))
    return f"sync gaps {', '.join(f'{gap:.1e}' for gap in gaps)}; transfer {seconds:.2f} s"


def engine_fp8(folder: Path) -> str:
    if not ON_GPU or torch.cuda.get_device_capability() != (9, 0):
        raise Skip("needs Hopper, compute capability (9, 0)")
    path = model(folder / "policy")
    own = start(folder, path, fp8=["weights", "kv_cache"])
    gap = gap_to_transformers(own, path)
    assert gap < 0.2, f"an engine in FP8 differs from float32 by {gap:.3f} nats a token"
    return f"gap {gap:.1e} nats a token"


def routes(folder: Path) -> str:
    """vLLM returns the experts of each token; the tests against the routers of `transformers` run on the device."""
    if not ON_GPU:
        raise Skip("the CPU captures routes in another way; pytest tests/rollout/test_routes.py runs it")
    command = [sys.executable, "-m", "pytest", "-q", "tests/rollout/test_routes.py", "-k", "not preempted"]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, done.stdout[-1500:]
    return done.stdout.strip().splitlines()[-1]
