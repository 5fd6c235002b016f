"""Simulates GRPO steps on 8 to 1,024 devices, in turns and with a lag, beside what others have published.

Seconds of decoding, training and syncs are the planner's (docs/planner.md); the waiting of engines and ranks for each
other is simulated (pipeline.planner.simulation).
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial

from jobs.bench.measure import print_table
from pipeline.planner.architecture import architecture_of
from pipeline.planner.cost import decode_seconds, ending_rate, forward_seconds, sync_seconds
from pipeline.planner.devices import GIB, cluster_of
from pipeline.planner.memory import RolloutLayout, TrainLayout
from pipeline.planner.simulation import SimulatedFleet, Workload, simulate

_MODEL, _DEVICE = "Qwen/Qwen3-8B", "H20"
_COMPLETIONS, _PROMPT_TOKENS, _MAX_TOKENS, _ROOM = 8192, 200, 28672, 256
_MEAN_TOKENS = (2000, 8000)
"""The mean length of the published runs is not known, so several are simulated."""
_FORMS = ("in turns", "lag 1", "lag 4", "in turns, slow engines", "lag 1, slow engines")
_RANK_SHARES = (0.25, 0.5, 0.75)
_PASSES = 5
"""Forward passes that a trained token costs: four with gradient checkpointing, and one for the ratio."""
_FAILURE_SECONDS, _RESTART_SECONDS = 50_000 * 3600.0, 600.0
"""Mean time between failures of a device: 419 in 54 days of 16,384 GPUs (Llama 3, arXiv:2407.21783 section 3.3.4)."""
_PUBLISHED = {32: 2.66, 64: 1.92, 128: 2.35}
"""Speed of verl's fully asynchronous recipe over its colocated one by devices: Qwen2.5-Math-7B on H20, up to 28k tokens
(docs/advance/fully_async.md)."""


def simulation(steps: int) -> dict[str, float]:
    """Simulates `steps` steps of an 8B model with 8,192 completions on 8 to 1,024 H20.

    Prints the seconds of a step: colocated in turns, and with a lag on that of three splits of the devices on which a
    lag of 1 is fastest, with and without slow engines.
    """
    figures: dict[str, float] = {}
    rows: list[list[str]] = []
    for mean in _MEAN_TOKENS:
        for count in (8 << power for power in range(8)):
            seconds = _forms(count, mean, steps)
            figures |= {f"{mean} tokens/{count} devices/{form}": value for form, value in seconds.items()}
            ratio = seconds["in turns"] / seconds["lag 1"]
            published = f"{_PUBLISHED[count]:.2f}" if count in _PUBLISHED else ""
            rows.append(
                [str(mean), str(count), *(f"{value:.0f}" for value in seconds.values()), f"{ratio:.2f}", published]
            )
    header = ["mean tokens", "devices", *_FORMS, "in turns / lag 1", "published"]
    print_table(header, rows)
    return figures


def _forms(count: int, mean: int, steps: int) -> dict[str, float]:
    """Return the seconds of a step by form. One engine in eight decodes at 0.7 of the speed where some are slow."""
    work = workload(count, mean, lengths(mean, _MAX_TOKENS))
    fails = partial(replace, failure_seconds=_FAILURE_SECONDS, restart_seconds=_RESTART_SECONDS)
    turns = fails(SimulatedFleet(count, count))
    splits = [SimulatedFleet(count - int(share * count), int(share * count), max_lag=1) for share in _RANK_SHARES]
    best = fails(min(splits, key=lambda split: simulate(work, split, steps).step_seconds))
    slow = partial(replace, slow_share=0.125, slow_speed=0.7)
    fleets = (turns, best, replace(best, max_lag=4), slow(turns), slow(best))
    return dict(zip(_FORMS, (simulate(work, fleet, steps).step_seconds for fleet in fleets), strict=True))


def lengths(mean: int, longest: int) -> Sequence[int]:
    """Return 4,096 lengths of completions that end at a constant rate, as the planner assumes, cut at `longest`."""
    rate, rng = ending_rate(mean, longest), random.Random(0)
    return [max(1, min(longest, round(rng.expovariate(rate)))) for _ in range(4096)]


def workload(count: int, mean: int, of_completions: Sequence[int]) -> Workload:
    """Return the work of a step on `count` devices with the planner's seconds."""
    model, machines = architecture_of(_MODEL), cluster_of(f"{count}x{_DEVICE}")
    layout, context = RolloutLayout(count, 1, 60 * GIB, _ROOM), _PROMPT_TOKENS + mean / 2
    forward = forward_seconds(model, 1, context, machines.device)

    @cache
    def seconds_per_token(held: int) -> float:
        return decode_seconds(model, held, context, layout, machines.device)

    return Workload(
        of_completions,
        _COMPLETIONS,
        _ROOM,
        seconds_per_token,
        train_seconds=_PASSES * forward,
        sync_seconds=sync_seconds(model, TrainLayout(count, 1, 1, 32768, True), machines),
        prefill_seconds=forward,
    )
