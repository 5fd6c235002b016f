"""Weights from trainer to engines, and the proof that the engines use the weights that were trained.

Four checks, each for faults that the ones before it can't see:

1. A checksum of each tensor finds damage in transit.
2. The names of the tensors, each expected exactly once, show missing and extra ones.
3. Log-probabilities of fixed sequences under trainer and engine, the probe, show a stale expert, a wrong layout, or a
   matrix absorbed before the update.
4. The same comparison on every token that is then sampled shows faults in parts that the probe doesn't reach.
"""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from configs.sampling import SyncConfig
from pipeline.data.trees import Floats, Tree
from pipeline.errors import RunStopped
from pipeline.train.worker import TrainingRanks
from rollout.pool import RolloutPool
from rollout.types import SyncError

PROBE_SEQUENCES, PROBE_LENGTH = 16, 64
BUCKET_MIB = 128
MEAN_MARGIN, LARGEST_MARGIN = 6.0, 16.0
"""Trainer and engine may differ by these multiples of the policy's own rounding, in the mean and on the worst token.
The second is wider since one token is one draw. The figures are in docs/numerics.md."""


class Gap(NamedTuple):
    """How far two programs' log-probabilities are apart, in nats: a token's in the mean, and at most."""

    mean: float
    largest: float


def probe_sequences(vocab_size: int, *, max_model_len: int) -> list[list[int]]:
    """Sixteen fixed random sequences of 64 tokens, or as many tokens as leave the engine room for one more; the second
    half is asked where the first did not agree. Random rather than real, so that the router sends them to more of its
    experts."""
    length = min(PROBE_LENGTH, max_model_len - 1)
    stream = np.random.Philox(key=0).random_raw(PROBE_SEQUENCES * length) % vocab_size
    return stream.astype(np.int64).reshape(PROBE_SEQUENCES, length).tolist()


def sync_weights(
    policy: TrainingRanks, rollout: RolloutPool, config: SyncConfig, *, probe: list[list[int]], version: int
) -> dict[str, float]:
    """Send the policy to every engine as `version`, prove it, and return `sync/...` metrics.

    Raises RunStopped when a tensor arrived damaged or not at all, or when trainer and engine disagree on the probe by
    more than the bounds.
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
    policy: TrainingRanks, rollout: RolloutPool, config: SyncConfig, *, probe: list[list[int]], version: int
) -> dict[str, float]:
    """Raise RunStopped unless every engine speaks as the policy does, within the bounds, on the first half of the probe
    or else on the second; return the gaps and their bounds.

    Where two experts tie, a router's choice may fall either way, and a token differs by much, on one sequence of
    thousands. Weights that an engine does not hold differ on both halves.
    """
    gap = bound = Gap(float("nan"), float("nan"))
    for half in (probe[: len(probe) // 2], probe[len(probe) // 2 :]):
        trees = [Tree(ids, root_mask=[0] + [1] * (len(ids) - 1)) for ids in half]
        trained = policy.sequence_logprobs(trees)
        gap = _gap(trained, rollout.prompt_logprobs(half))
        bound = _bound(policy, config, trees, trained)
        if gap.mean <= bound.mean and gap.largest <= bound.largest:  # a NaN is not within anything
            return {
                "sync/gap_mean": gap.mean,
                "sync/gap_max": gap.largest,
                "sync/bound_mean": bound.mean,
                "sync/bound_max": bound.largest,
            }
    of_mean, of_max = _origin(config.max_mean_gap, MEAN_MARGIN), _origin(config.max_gap, LARGEST_MARGIN)
    raise RunStopped(
        f"sync of version {version} is not proven: trainer and engine differ on both halves of the probe, the last "
        f"by {gap.mean:.2e} nats a token in the mean (bound sync.max_mean_gap={bound.mean:.1e}{of_mean}) and "
        f"{gap.largest:.2e} at most (bound sync.max_gap={bound.largest:.1e}{of_max}). The engine does not hold the "
        "weights that were trained, or it computes more coarsely than model.dtype says and needs wider bounds; the run "
        "can be resumed once the cause is found"
    )


def refuse_mismatch(metrics: Mapping[str, float], num_tokens: int, max_mean_gap: float, *, step: int) -> None:
    """Raise RunStopped when the `num_tokens` tokens that one update of `step` learnt from mean something else to the
    trainer than to the engine that sampled them, by more than the last sync allowed.

    The probe can't reach what only real text reaches; this can, since it is over every sampled token. The sequence that
    is furthest off is left out: a router's tie may fall either way, and then one token differs by tenths of a nat and
    the rest of its sequence reads it.
    """
    gap = metrics["mismatch/abs_mean"] - metrics["mismatch/sequence_max"] / num_tokens
    if not gap <= max_mean_gap:
        raise RunStopped(
            f"step {step}: engine and trainer differ on the sampled tokens by {gap:.2e} nats in the mean (bound "
            f"sync.max_mean_gap={max_mean_gap:.1e}) even without the sequence that is furthest off, though the "
            "last sync's probe agreed. A part of the policy that only these tokens use differs; the run can be resumed "
            "once the cause is found"
        )


def _gap(trained: list[Floats], spoken: Sequence[Sequence[Floats | list[float]]]) -> Gap:
    """Mean and largest |trainer - engine| log-probability, of the engine that is furthest off."""
    gaps_N = [np.abs(np.concatenate(of_engine) - np.concatenate(trained)) for of_engine in spoken]
    return Gap(max(float(gap_N.mean()) for gap_N in gaps_N), max(float(gap_N.max()) for gap_N in gaps_N))


def _bound(policy: TrainingRanks, config: SyncConfig, trees: list[Tree], trained: list[Floats]) -> Gap:
    """The configured bounds; in the place of one that is None, a multiple of the policy's own rounding."""
    mean, largest = config.max_mean_gap, config.max_gap
    if mean is not None and largest is not None:
        return Gap(mean, largest)
    rounding = _gap(trained, [policy.perturbed_sequence_logprobs(trees)])
    return Gap(mean or MEAN_MARGIN * rounding.mean, largest or LARGEST_MARGIN * rounding.largest)


def _origin(configured: float | None, margin: float) -> str:
    return f", {margin:g} times the model's own rounding" if configured is None else ""
