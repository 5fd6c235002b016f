"""Bounds of a sync's proof, and who may connect, with stand-ins for trainer and engine."""

from functools import partial
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from configs.sampling import SyncConfig
from pipeline.data.trees import Tree
from pipeline.errors import RunStopped
from pipeline.grpo.sync import (
    MARGINS,
    Gap,
    connect,
    expect,
    halves,
    measured_rounding,
    probe_sequences,
    prove,
    refuse_mismatch,
    scaled_margins,
    sync_weights,
)
from rollout.device import DeviceState

MEASURED = SyncConfig()
GIVEN = SyncConfig(max_mean_gap=1e-5, max_gap=1e-4)
PROBE = probe_sequences(264, max_model_len=64)


class Off:
    """An engine that says of the first `sequences` of the whole probe one token by 0.4 nats less."""

    def __init__(self, sequences: int) -> None:
        self._off = PROBE[:sequences]

    def prompt_logprobs(self, sequences: list[list[int]]) -> list[list[np.ndarray]]:
        return [[np.array([-1.0, -1.4 if ids in self._off else -1.0]) for ids in sequences]]


class Sure:
    """A policy that gives every token e^-1, give or take `rounding`."""

    def __init__(self, rounding: float) -> None:
        self._rounding = rounding

    def sequence_logprobs(self, trees: list[Tree]) -> list[np.ndarray]:
        return [np.array([-1.0, -1.0]) for _ in trees]

    def perturbed_sequence_logprobs(self, trees: list[Tree]) -> list[np.ndarray]:
        return [np.array([-1.0 - self._rounding, -1.0]) for _ in trees]


def test_a_tie_on_one_half_of_the_probe_proves_nothing_against_an_engine() -> None:
    policy: Any = Sure(1e-7)
    tied, wrong = Off(1), Off(len(PROBE))
    for config in (GIVEN, MEASURED):
        figures = prove(map(partial(expect, policy, config), halves(PROBE)), tied, config, version=1)  # type: ignore[arg-type]
        assert figures["sync/gap_mean"] == figures["sync/gap_max"] == 0
        with pytest.raises(RunStopped, match=r"both halves.*4\.00e-01 at most"):
            prove(map(partial(expect, policy, config), halves(PROBE)), wrong, config, version=1)  # type: ignore[arg-type]


def test_bounds_are_the_given_ones_or_follow_the_policys_own_rounding() -> None:
    coarse: Any = Sure(0.08)  # 16 times its rounding at most, 6 times in the mean
    engine: Any = Off(len(PROBE))
    figures = prove(map(partial(expect, coarse, MEASURED), halves(PROBE)), engine, MEASURED, version=1)
    assert figures["sync/bound_max"] == pytest.approx(1.28) and figures["sync/bound_mean"] == pytest.approx(0.24)
    given = SyncConfig(max_mean_gap=1.0)
    assert prove(map(partial(expect, coarse, given), halves(PROBE)), engine, given, version=1)["sync/bound_mean"] == 1.0
    with pytest.raises(RunStopped, match=r"max_gap=1\.0e-04\)"):
        narrow = SyncConfig(max_gap=1e-4)
        prove(map(partial(expect, coarse, narrow), halves(PROBE)), engine, narrow, version=1)


class Apart:
    """An engine that gives the first token of each sequence `gap` nats less than `Sure`."""

    def __init__(self, gap: float) -> None:
        self._gap = gap

    def prompt_logprobs(self, sequences: list[list[int]]) -> list[list[np.ndarray]]:
        return [[np.array([-1.0 - self._gap, -1.0]) for _ in sequences]]


def test_the_gap_of_the_first_sync_is_the_scale_of_later_ones() -> None:
    policy: Any = Sure(0.1)

    def figures(gap: float, margins: Gap = MARGINS) -> dict[str, float]:
        engine: Any = Apart(gap)
        return prove(
            [expect(policy, MEASURED, half, margins) for half in halves(PROBE)],
            engine,
            MEASURED,
            version=1,
            margins=margins,
        )

    margins = scaled_margins(figures(0.05))
    assert margins == pytest.approx((1.5, 16))  # three times half of the rounding
    assert figures(0.14, margins)["sync/bound_mean"] == pytest.approx(0.075)
    assert figures(0.2)["sync/gap_mean"] == pytest.approx(0.1)  # the default margins allow it
    with pytest.raises(RunStopped, match=r"1\.00e-01 nats .*max_mean_gap=7\.5e-02, 1\.5 times"):
        figures(0.2, margins)
    assert scaled_margins(figures(1e-9)) == (0.5, 16)
    assert scaled_margins(figures(0.5)) == (6, 16)


def test_an_earlier_rounding_bounds_the_first_half_of_the_probe() -> None:
    """Where the policy's rounding has grown, the second half measures it anew, and the sync is proven."""
    policy: Any = Sure(0.1)

    def figures(gap: float) -> dict[str, float]:
        first, second = halves(PROBE)
        expected = [expect(policy, MEASURED, first, MARGINS, Gap(0.005, 0.01)), expect(policy, MEASURED, second)]
        engine: Any = Apart(gap)
        return prove(expected, engine, MEASURED, version=1)

    proven_at_once, proven_later = figures(0.05), figures(0.5)
    assert measured_rounding(proven_at_once) == (0.005, 0.01) and proven_at_once["sync/bound_mean"] == 0.03
    assert measured_rounding(proven_later) == pytest.approx((0.05, 0.1))
    assert proven_later["sync/bound_mean"] == pytest.approx(0.3)
    with pytest.raises(RunStopped, match="not proven"):
        figures(0.7)
    given: Any = Off(0)
    assert measured_rounding(prove([expect(policy, GIVEN, PROBE)], given, GIVEN, version=1)) is None


def test_half_of_the_probe_is_the_runs_own_text() -> None:
    text = list(range(7)) * 100
    sequences = probe_sequences(264, max_model_len=64, text=text)
    assert [token for ids in sequences[1::2] for token in ids] == text[: 8 * 63]
    assert sequences[::2] == PROBE[::2]
    few = probe_sequences(264, max_model_len=64, text=text[:100])
    assert [a == b for a, b in zip(few, PROBE, strict=True)] == [True, False] + [True] * 14


def test_a_policy_that_is_no_number_proves_nothing() -> None:
    policy: Any = Sure(float("nan"))
    engine: Any = Off(0)
    with pytest.raises(RunStopped, match="not proven"):
        prove(map(partial(expect, policy, MEASURED), halves(PROBE)), engine, MEASURED, version=1)


def test_a_gap_on_sampled_tokens_stops_the_run() -> None:
    """The difference of a single sequence, as from a router's tie, is allowed."""

    def check(mean: float, of_one_sequence: float) -> None:
        metrics = {"mismatch/abs_mean": mean, "mismatch/sequence_max": of_one_sequence}
        refuse_mismatch(metrics, 1000, 1e-5, step=3)

    check(9e-6, 0.0)
    check(0.46 / 1000 + 9e-6, 0.46)
    for mean, of_one_sequence in ((2e-5, 0.0), (0.46 / 1000 + 2e-5, 0.46), (float("nan"), 0.0)):
        with pytest.raises(RunStopped, match=r"step 3.*sampled tokens"):
            check(mean, of_one_sequence)


def test_engines_on_some_of_the_ranks_gpus_are_refused() -> None:
    ranks, engines = Mock(devices=["GPU-1", "GPU-2"], has_groups=False), Mock(devices=[["GPU-2", "GPU-3"]])
    with pytest.raises(ValueError, match=r"2 GPUs, of which 1 have .*num_engines x .*placement: separate"):
        connect(ranks, engines)
    engines.devices = [["GPU-2"], ["GPU-1"]]
    connect(ranks, engines)  # shared memory needs no groups


class Recorder:
    """A policy or engines of one device that record the moves and what happens between them."""

    def __init__(self, log: list[str], name: str, **answers: Any) -> None:
        self._log, self._name = log, name
        self.devices: list[Any] = [[]] if name == "engines" else []
        self.has_groups, self.held_bytes = True, 0
        self.__dict__ |= answers

    def to(self, state: DeviceState) -> dict[str, float]:
        self._log.append(f"{self._name} {state.value}")
        return {}

    def weight_buckets(self, *_: Any) -> list[Any]:
        return []

    def load_weights(self, *_: Any) -> Any:
        self._log.append("sent")
        return self


def test_the_second_half_is_computed_after_a_second_transfer_and_only_if_needed() -> None:
    sure = Sure(1e-7)
    for off, times in ((0, 1), (1, 2)):
        log: list[str] = []
        policy: Any = Recorder(
            log,
            "ranks",
            sequence_logprobs=sure.sequence_logprobs,
            perturbed_sequence_logprobs=sure.perturbed_sequence_logprobs,
        )
        engines: Any = Recorder(log, "engines", prompt_logprobs=Off(off).prompt_logprobs)
        sync_weights(policy, engines, MEASURED, probe=PROBE, version=1)
        once = ["engines asleep", "ranks weights", "engines weights", "sent", "ranks asleep", "engines awake"]
        assert log == once * times
