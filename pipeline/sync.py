"""Weights from trainer to engines, and the proof that what speaks is what was trained.

Four nets, each catching what the one before can't: a checksum per tensor (the way), exactly the tensors the
engine started from and each once (the set), log-probabilities of fixed sequences under both (the meaning: a stale
expert, a wrong layout, a matrix absorbed before the update), and the same of every token that is then sampled.
"""

import time
from collections.abc import Mapping

import numpy as np

from configs.sampling import SyncConfig
from pipeline.batch import Tree
from pipeline.errors import RunStopped
from pipeline.train.worker import Policy
from rollout.pool import RolloutPool
from rollout.types import SyncError

PROBE_SEQUENCES, PROBE_LENGTH = 16, 64
BUCKET_MIB = 128


def probe_sequences(vocab_size: int, *, max_model_len: int) -> list[list[int]]:
    """Sixteen fixed random sequences of 64 tokens, or as many tokens as leave the engine room for one more; the second
    half is asked where the first did not agree. Random rather than real, so that the router sends them to more of its
    experts."""
    length = min(PROBE_LENGTH, max_model_len - 1)
    stream = np.random.Philox(key=0).random_raw(PROBE_SEQUENCES * length) % vocab_size
    return stream.astype(np.int64).reshape(PROBE_SEQUENCES, length).tolist()


def sync_weights(
    policy: Policy, rollout: RolloutPool, config: SyncConfig, *, probe: list[list[int]], version: int
) -> dict[str, float]:
    """Send the policy to every engine as `version`, prove it, and return `sync/...` metrics.

    Raises RunStopped when a tensor arrived damaged or not at all, or when trainer and engine disagree on the probe by
    more than the configured gaps.
    """
    started = time.monotonic()
    try:
        rollout.load_weights(policy.put_weights(BUCKET_MIB), version=version)
    except SyncError as error:
        raise RunStopped(f"weights of version {version} did not reach an engine: {error}") from error
    sent = time.monotonic()
    metrics = prove(policy, rollout, config, probe=probe, version=version)
    return metrics | {
        "sync/transfer_seconds": sent - started,
        "sync/proof_seconds": time.monotonic() - sent,
    }


def prove(
    policy: Policy, rollout: RolloutPool, config: SyncConfig, *, probe: list[list[int]], version: int
) -> dict[str, float]:
    """Raise RunStopped unless every engine speaks as the policy does, within the configured gaps, on the first half of
    the probe or else on the second.

    Where two experts tie, a router's choice may fall either way, and a token differs by much, on one sequence of
    thousands. Weights that an engine does not hold differ on both halves.
    """
    mean_gap = max_gap = float("nan")
    for half in (probe[: len(probe) // 2], probe[len(probe) // 2 :]):
        mean_gap, max_gap = probe_gap(policy, rollout, half)
        if mean_gap <= config.max_mean_gap and max_gap <= config.max_gap:  # a NaN is not within anything
            return {"sync/gap_mean": mean_gap, "sync/gap_max": max_gap}
    raise RunStopped(
        f"sync of version {version} is not proven: trainer and engine differ on both halves of the probe, the last "
        f"by {mean_gap:.2e} nats a token in the mean (bound sync.max_mean_gap={config.max_mean_gap:.0e}) and "
        f"{max_gap:.2e} at most (bound sync.max_gap={config.max_gap:.0e}). The engine does not hold the weights that "
        "were trained, or bfloat16 or rollout.fp8 need wider bounds; the run can be resumed once the cause is found"
    )


def check_spoken(metrics: Mapping[str, float], num_tokens: int, config: SyncConfig, *, step: int) -> None:
    """Raise RunStopped when the `num_tokens` tokens that one update of `step` learnt from mean something else to the
    trainer than to the engine that sampled them.

    The probe can't reach what only real text reaches; this can, since it is over every sampled token. The sequence that
    is furthest off is left out: a router's tie may fall either way, and then one token differs by tenths of a nat and
    the rest of its sequence reads it.
    """
    gap = metrics["mismatch/abs_mean"] - metrics["mismatch/sequence_max"] / num_tokens
    if not gap <= config.max_mean_gap:
        raise RunStopped(
            f"step {step}: engine and trainer differ on the sampled tokens by {gap:.2e} nats in the mean (bound "
            f"sync.max_mean_gap={config.max_mean_gap:.0e}) even without the sequence that is furthest off, though the "
            "last sync's probe agreed. A part of the policy that only these tokens use differs; the run can be resumed "
            "once the cause is found"
        )


def probe_gap(policy: Policy, rollout: RolloutPool, probe: list[list[int]]) -> tuple[float, float]:
    """Mean and largest |trainer - engine| log-probability over the probe, of the engine that is furthest off."""
    trained = np.concatenate(
        policy.sequence_logprobs([Tree(ids, root_mask=[0] + [1] * (len(ids) - 1)) for ids in probe])
    )
    gaps = [np.abs(np.concatenate(spoken) - trained) for spoken in rollout.prompt_logprobs(probe)]
    return max(float(gap.mean()) for gap in gaps), max(float(gap.max()) for gap in gaps)
