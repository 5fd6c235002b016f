"""Sync weights from the trainer to the engines, and prove that the engines compute with the trained weights.

Four checks, each for faults that the earlier ones can't detect:

1. A checksum of each tensor detects damage in transit.
2. The set of names, each expected exactly once, detects missing and extra tensors.
3. Log-probabilities of fixed sequences, the probe, under trainer and engine detect a stale expert, a wrong layout, or a
   matrix absorbed before the update.
4. The same comparison on every token that is sampled next detects faults in parts that the probe doesn't reach.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import NamedTuple

import numpy as np

from configs.sampling import SyncConfig
from pipeline.data.trees import Floats, Tree
from pipeline.errors import RunStopped
from pipeline.train.worker import TrainingRanks
from rollout.device import DeviceState
from rollout.pool import RolloutPool
from rollout.types import SyncError

PROBE_SEQUENCES, PROBE_LENGTH = 16, 64
BUCKET_MIB = 128


class Gap(NamedTuple):
    """Absolute difference of two programs' log-probabilities in nats: mean over tokens, and largest."""

    mean: float
    largest: float


MARGINS = Gap(6.0, 16.0)
"""Default bounds, in multiples of the difference that rounding alone makes: on the mean, and on the worst token, which
varies more. The measurements are in docs/numerics.md."""
START_MARGIN = 3.0
"""In bfloat16 the mean is held to this multiple of the first sync's gap, in units of rounding. While the demo's models
trained, this gap rose by 1.6 at most; that of the worst token changed twentyfold."""
ROUNDING_STEPS = 10
"""Syncs for which one measurement of the policy's rounding holds."""


def probe_sequences(vocab_size: int, *, max_model_len: int, text: Iterable[int] = ()) -> list[list[int]]:
    """Generate sixteen fixed sequences of 64 tokens, or of max_model_len - 1. The second half is a retry for the first.

    Every second one is of `text`, the tokens of the run's prompts one after the other, as long as they last. The others
    are random, which reaches more experts, but is so unlikely that rounding shows more.
    """
    length = min(PROBE_LENGTH, max_model_len - 1)
    stream = np.random.Philox(key=0).random_raw(PROBE_SEQUENCES * length) % vocab_size
    sequences = stream.astype(np.int64).reshape(PROBE_SEQUENCES, length).tolist()
    tokens = list(islice(text, PROBE_SEQUENCES // 2 * length))
    for number in range(len(tokens) // length):
        sequences[2 * number + 1] = tokens[number * length : (number + 1) * length]
    return sequences


def scaled_margins(first: Mapping[str, float]) -> Gap:
    """Return the margins for all syncs after the `first`, of which these are the figures under MARGINS: for the mean
    START_MARGIN times its gap in units of rounding, from a half to the default."""
    gap = MARGINS.mean * first["sync/gap_mean"] / first["sync/bound_mean"]
    return MARGINS._replace(mean=min(MARGINS.mean, max(0.5, START_MARGIN * gap)))


def measured_rounding(metrics: Mapping[str, float]) -> Gap | None:
    """Return the policy's rounding from a step's or sync's metrics, None where none was needed."""
    if "sync/rounding_mean" not in metrics:
        return None
    return Gap(metrics["sync/rounding_mean"], metrics["sync/rounding_max"])


class Expected(NamedTuple):
    """The trainer's side of the proof for half of the probe: its log-probabilities, the engines' largest gap, and the
    policy's rounding where a bound rests on it."""

    sequences: list[list[int]]
    logprobs: list[Floats]
    bound: Gap
    rounding: Gap | None


def connect(policy: TrainingRanks, rollout: RolloutPool) -> None:
    """Open groups in which ranks broadcast to the workers of all engines, once, if no engine shares a device with a
    rank.

    Raises ValueError if only some do: a rank and a worker on one GPU can't be in one group of NCCL's.
    """
    engine_devices, rank_devices = {*chain.from_iterable(rollout.devices)}, {*policy.devices}
    if policy.has_groups or engine_devices <= rank_devices:
        return
    if shared := engine_devices & rank_devices:
        raise ValueError(
            f"engines use {len(engine_devices)} GPUs, of which {len(shared)} have a training rank: set "
            "rollout.num_engines x rollout.tensor_parallel_size to trainer.num_ranks at most, or placement: separate"
        )
    addresses, calls = policy.open_groups(sum(map(len, rollout.devices)))
    rollout.connect(addresses)
    policy.await_groups(calls)


def sync_weights(
    policy: TrainingRanks,
    rollout: RolloutPool,
    config: SyncConfig,
    *,
    probe: list[list[int]],
    version: int,
    colocated: bool = True,
    margins: Gap = MARGINS,
    rounding: Gap | None = None,
) -> dict[str, float]:
    """Send the policy to every engine as `version`, prove the sync, and return `sync/...` and `device/...` metrics.

    colocated: the engines are asleep before and awake after, the ranks asleep. Meanwhile both hold their weights only:
    a device has room for two copies of them, and for a KV cache once the ranks have left. Otherwise all stay awake.
    margins: bounds in units of the policy's rounding, where `config` gives none.
    rounding: an earlier measurement of it, which saves a third of the proof. If the first half of the probe exceeds its
        bounds, and where it is None, the rounding is measured.

    Raises RunStopped for a tensor that is damaged, missing or sent twice, for a bucket that does not come in time, or
    if trainer and engine differ on the probe by more than the bounds. The engines then generate no more.
    """
    metrics: dict[str, float] = {}
    started = time.monotonic()
    expected = _sent_halves(policy, rollout, config, probe, version, margins, rounding, metrics, colocated=colocated)
    metrics |= prove(expected, rollout, config, version=version, margins=margins)
    moving = sum(value for name, value in metrics.items() if name.startswith("device/") and name.endswith("_seconds"))
    metrics["sync/proof_seconds"] = time.monotonic() - started - moving - metrics["sync/transfer_seconds"]
    return metrics


def _sent_halves(
    policy: TrainingRanks,
    rollout: RolloutPool,
    config: SyncConfig,
    probe: list[list[int]],
    version: int,
    margins: Gap,
    rounding: Gap | None,
    metrics: dict[str, float],
    *,
    colocated: bool,
) -> Iterator[Expected]:
    """Send the weights, then yield the trainer's side of the proof, for each half of the probe that is needed; add
    `metrics` of the transfer.

    The second half, needed once in thousands of syncs, sends again: beside the engines' KV cache there is no room for
    the ranks' weights.
    """
    for half, known in zip(halves(probe), (rounding, None), strict=True):
        if colocated:
            metrics |= rollout.to(DeviceState.ASLEEP) | policy.to(DeviceState.WEIGHTS) | rollout.to(DeviceState.WEIGHTS)
        started = time.monotonic()
        try:
            connect(policy, rollout)
            engine_devices = {*chain.from_iterable(rollout.devices)}
            received = rollout.load_weights(policy.weight_buckets(BUCKET_MIB, engine_devices), version)
        except SyncError as error:
            raise RunStopped(f"weights of version {version} did not reach an engine: {error}") from error
        metrics |= {
            "sync/rank_held_mib": policy.held_bytes / 2**20,
            "sync/worker_held_mib": received.held_bytes / 2**20,
            "sync/transfer_seconds": time.monotonic() - started,
        }
        expected = expect(policy, config, half, margins, known)
        if colocated:
            metrics |= policy.to(DeviceState.ASLEEP) | rollout.to(DeviceState.AWAKE)
        yield expected


def halves(probe: list[list[int]]) -> list[list[list[int]]]:
    """Return the two halves of the probe."""
    return [probe[: len(probe) // 2], probe[len(probe) // 2 :]]


def expect(
    policy: TrainingRanks,
    config: SyncConfig,
    sequences: list[list[int]],
    margins: Gap = MARGINS,
    rounding: Gap | None = None,
) -> Expected:
    """Compute the trainer's side of the proof on half of the probe; measure the `rounding` where it is needed and
    None. Raises RunStopped where the policy's own log-probabilities are not finite."""
    trees = [Tree(ids, root_mask=[0] + [1] * (len(ids) - 1)) for ids in sequences]
    logprobs = policy.sequence_logprobs(trees)
    if not all(np.isfinite(values_N).all() for values_N in logprobs):
        raise RunStopped(
            "the policy's log-probabilities are not finite after its update, so no engine gets them: lower the "
            "learning rate; the run resumes at its checkpoint"
        )
    mean, largest = config.max_mean_gap, config.max_gap
    if mean is not None and largest is not None:
        return Expected(sequences, logprobs, Gap(mean, largest), None)
    rounding = rounding or _gap(logprobs, [policy.perturbed_sequence_logprobs(trees)])
    bound = Gap(mean or margins.mean * rounding.mean, largest or margins.largest * rounding.largest)
    return Expected(sequences, logprobs, bound, rounding)


def prove(
    expected: Iterable[Expected], rollout: RolloutPool, config: SyncConfig, *, version: int, margins: Gap = MARGINS
) -> dict[str, float]:
    """Compare the log-probabilities of trainer and engines on the probe; return the gaps and their bounds.

    Raises RunStopped if both halves of the probe exceed the bounds. One half may, in one of thousands of sequences:
    where two experts tie, trainer and engine may route a token differently. Wrong weights differ on both halves.
    """
    gap = bound = Gap(float("nan"), float("nan"))
    for sequences, trainer_logprobs, bound, rounding in expected:
        gap = _gap(trainer_logprobs, rollout.prompt_logprobs(sequences))
        if gap.mean <= bound.mean and gap.largest <= bound.largest:  # false for a NaN
            figures = {"gap": gap, "bound": bound} | ({"rounding": rounding} if rounding else {})
            return {
                f"sync/{name}_{kind}": value
                for name, pair in figures.items()
                for kind, value in zip(("mean", "max"), pair, strict=True)
            }
    mean_origin, max_origin = _origin(config.max_mean_gap, margins.mean), _origin(config.max_gap, margins.largest)
    raise RunStopped(
        f"sync of version {version} is not proven: trainer and engine differ on both halves of the probe, the last "
        f"by {gap.mean:.2e} nats a token in the mean (bound sync.max_mean_gap={bound.mean:.1e}{mean_origin}) and "
        f"{gap.largest:.2e} at most (bound sync.max_gap={bound.largest:.1e}{max_origin}). The engine does not hold the "
        "weights that were trained, or it computes more coarsely than model.dtype says and needs wider bounds; the run "
        "can be resumed once the cause is found"
    )


def refuse_mismatch(metrics: Mapping[str, float], num_tokens: int, max_mean_gap: float, *, step: int) -> None:
    """Raise RunStopped if trainer and engine differ on the log-probabilities of the `num_tokens` sampled tokens of an
    update by more than the last sync allowed.

    These tokens reach parts of the policy that the probe may miss. The sequence that differs most is left out: where
    two experts tie, trainer and engine may route a token differently; it then differs by tenths of a nat, and so do the
    tokens after it. Where earlier weights sampled some tokens, the others are compared, if they are as many as those of
    half the probe.
    """
    gap = metrics["mismatch/abs_mean"] - metrics["mismatch/sequence_max"] / num_tokens
    if "mismatch/no_lag_rate" in metrics:
        rate = metrics["mismatch/no_lag_rate"]
        if rate * num_tokens < PROBE_SEQUENCES // 2 * PROBE_LENGTH:
            return
        gap = (metrics["mismatch/no_lag_abs_mean"] - metrics["mismatch/no_lag_sequence_max"] / num_tokens) / rate
    if not gap <= max_mean_gap:
        raise RunStopped(
            f"step {step}: engine and trainer differ on the sampled tokens by {gap:.2e} nats in the mean (bound "
            f"sync.max_mean_gap={max_mean_gap:.1e}) even without the sequence that is furthest off, though the "
            "last sync's probe agreed. A part of the policy that only these tokens use differs; the run can be resumed "
            "once the cause is found"
        )


def _gap(trainer_logprobs: list[Floats], engine_logprobs: Sequence[Sequence[Floats | list[float]]]) -> Gap:
    """Compute mean and largest |trainer - engine| log-probability, each for the engine that differs most."""
    gaps_N = [np.abs(np.concatenate(logprobs) - np.concatenate(trainer_logprobs)) for logprobs in engine_logprobs]
    return Gap(max(float(gap_N.mean()) for gap_N in gaps_N), max(float(gap_N.max()) for gap_N in gaps_N))


def _origin(configured: float | None, margin: float) -> str:
    return f", {margin:.2g} times the model's own rounding" if configured is None else ""
