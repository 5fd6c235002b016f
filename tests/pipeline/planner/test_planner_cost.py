from dataclasses import replace
from math import exp

import pytest

from configs.train import OffloadConfig
from pipeline.planner.cost import Work, ending_rate, generate_seconds, longest_of, train_seconds
from pipeline.planner.devices import GIB, cluster_of
from pipeline.planner.memory import RolloutLayout, TrainLayout
from tests.pipeline.planner.published import V3, architecture_of, rows

WORK = Work(64, 16, 100, 1000, 4000, 4100)


def test_the_errors_are_as_docs_say() -> None:
    errors = {case.name: (case.error, case.fitted) for case in rows()}
    assert all(abs(error) < 0.02 for error, fitted in errors.values() if fitted)
    held_out = {name: error for name, (error, fitted) in errors.items() if not fitted}
    far = {name for name, error in held_out.items() if abs(error) > 0.5}
    assert far == {
        "DeepSeek-V3 trained on 96 H20, verl",
        "DeepSeek-V3 rollout, 96 H20, verl",
        "DeepSeek-V3 step, 96 H20, verl",
        "bench grpo-step, generate",
    }


def test_completions_end_at_the_rate_that_gives_their_mean() -> None:
    rate = ending_rate(1000, 4000)
    assert (1 - exp(-rate * 4000)) / rate == pytest.approx(1000)
    assert ending_rate(4000, 4000) == 0
    assert longest_of(1, 0.01, 4000) == 100
    assert longest_of(10_000, rate, 4000) == longest_of(5, 0.0, 4000) == 4000


def test_a_rollout_waits_for_its_longest() -> None:
    model, device = architecture_of(V3), cluster_of("32xH200").device
    layout = RolloutLayout(1, 32, 50 * GIB, 2048)
    seconds, tail = generate_seconds(model, WORK, layout, device)
    even, none = generate_seconds(model, replace(WORK, mean_tokens=4000), layout, device)
    assert 0 < tail < seconds < even
    assert none == pytest.approx(0, abs=0.1 * even)
    crowded, _ = generate_seconds(model, WORK, replace(layout, kv_cache=2 * GIB), device)
    assert crowded > 1.5 * seconds  # completions in waves


def test_more_ranks_are_quicker_and_recomputing_costs() -> None:
    model = architecture_of(V3)
    layout = TrainLayout(64, 1, 8, 4100, False)

    def train(layout: TrainLayout) -> float:
        return train_seconds(model, WORK, layout, cluster_of(f"{layout.ranks}xH100"))["train"]

    assert train(replace(layout, ranks=128)) < train(layout) < train(replace(layout, gradient_checkpointing=True))
    assert train(replace(layout, expert_parallel=32)) > train(layout)  # experts on other machines


def test_what_is_offloaded_comes_slowly() -> None:
    model, cluster = architecture_of(V3), cluster_of("64xH100")
    layout = TrainLayout(64, 3, 8, 4100, False)

    def seconds(offload: OffloadConfig | None) -> dict[str, float]:
        return train_seconds(model, WORK, replace(layout, offload=offload), cluster)

    resident, host, both = (seconds(offload) for offload in (None, OffloadConfig(), OffloadConfig(parameters=True)))
    nvme = seconds(OffloadConfig(parameters=True, nvme="/nvme"))
    assert resident["update"] < host["update"] == both["update"] < nvme["update"]
    assert resident["train"] == host["train"] <= both["train"] < nvme["train"]


@pytest.mark.parametrize("text", ["H20", "0xH20", "96xB999", "96 H20"])
def test_a_cluster_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"--cluster {text}: "):
        cluster_of(text)
