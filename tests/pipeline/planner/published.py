"""What others publish and this project measured, and what the planner predicts of the same work."""

from collections.abc import Iterator
from dataclasses import dataclass

from configs.train import OffloadConfig
from pipeline.planner.architecture import Architecture, architecture_of
from pipeline.planner.cost import (
    Work,
    exchange_seconds,
    forward_seconds,
    generate_seconds,
    network_rate,
    sync_seconds,
    train_seconds,
)
from pipeline.planner.devices import GIB, cluster_of
from pipeline.planner.memory import RolloutLayout, TrainLayout

GIVEN = 100
"""Tokens of a prompt where none are published."""


@dataclass(frozen=True)
class Case:
    """A published or measured figure; `fitted` says whether a constant was fitted to it."""

    name: str
    unit: str
    published: float
    predicted: float
    fitted: bool = False

    @property
    def error(self) -> float:
        """Share by which the prediction is above what was published."""
        return self.predicted / self.published - 1


def tflops(
    model: str,
    cluster: str,
    length: int,
    expert_parallel: int,
    *,
    recompute: bool,
    bubble: float = 0,
    hidden: bool = False,
) -> float:
    """Model TFLOP/s a device of a forward and backward pass, recomputation not counted, as publishers count.

    hidden: whether the all-to-all runs beside computing, as Megatron's recipes have it.
    """
    known, machines = architecture_of(model), cluster_of(cluster)
    layout = TrainLayout(machines.count, 1, expert_parallel, length, recompute)
    passes = 4 if recompute else 3
    seconds = passes * forward_seconds(known, 1, length / 2, machines.device)
    seconds += 0 if hidden else (passes - 1) * exchange_seconds(known, 1, layout, machines)
    return 3 * (2 * known.active + length / 2 * known.attention_flops) / seconds * (1 - bubble) / 1e12


def trained(model: str, cluster: str, length: int, expert_parallel: int, bubble: float = 0) -> float:
    """TFLOP/s as Megatron's recipes reach them: nothing recomputed, the all-to-all beside computing."""
    return tflops(model, cluster, length, expert_parallel, recompute=False, bubble=bubble, hidden=True)


def mfu(model: str, cluster: str, length: int, bubble: float = 0) -> float:
    """Share of an H20's FLOP/s as verl's recipes reach it: everything recomputed, experts over 8 devices."""
    return tflops(model, cluster, length, 8, recompute=True, bubble=bubble) / 148


def step(
    model: str,
    cluster: str,
    work: Work,
    tensor_parallel: int,
    expert_parallel: int,
    *,
    recompute: bool,
    bubble: float,
    offload: bool = False,
) -> dict[str, float]:
    """Seconds by phase of a step as Megatron's users run it: ranks keep their weights, and a sync is a collective that
    brings all weights to every device."""
    known, machines = architecture_of(model), cluster_of(cluster)
    train = TrainLayout(
        machines.count, 1, expert_parallel, work.longest, recompute, OffloadConfig() if offload else None
    )
    engines = RolloutLayout(machines.count // tensor_parallel, tensor_parallel, 100 * GIB, 1024)
    phases = {"generate": generate_seconds(known, work, engines, machines.device)[0]}
    phases |= train_seconds(known, work, train, machines, bubble=bubble)
    return phases | {"sync": 2 * known.total / network_rate(machines, machines.count)}


def nemo(model: str, cluster: str, sequences: int, mean: int, longest: int, tp: int, ep: int, bubble: float) -> float:
    """Seconds of one of NeMo RL's published steps (on policy, a reference, log-probabilities of the policy's own)."""
    work = Work(sequences // 16, 16, GIVEN, mean - GIVEN, longest - GIVEN, longest, scored=2)
    return sum(step(model, cluster, work, tp, ep, recompute=longest < 4096, bubble=bubble).values())


VERL = Work(96, 8, GIVEN, 1960, 9632, 11680, scored=2, updates=3)
V3, Q235, Q30 = "deepseek-ai/DeepSeek-V3", "Qwen/Qwen3-235B-A22B", "Qwen/Qwen3-30B-A3B"


def verl() -> dict[str, float]:
    return step(V3, "96xH20", VERL, 32, 8, recompute=True, bubble=11 / 57, offload=True)


BENCH = Work(8, 8, 48, 128, 128, 192, scored=1)
HERE = cluster_of("1xcpu")


def here() -> dict[str, float]:
    """Seconds by phase of `alignyard bench grpo-step`."""
    known = architecture_of("moe_25m", "float32")
    layout = TrainLayout(1, 0, 1, 4400, False)
    phases = train_seconds(known, BENCH, layout, HERE)
    phases["train"] += phases.pop("update")
    generated = on_cpu(known, BENCH, 64)
    return phases | {"generate": generated, "sync": sync_seconds(known, layout, HERE)}


def on_cpu(known: Architecture, work: Work, at_once: int) -> float:
    return generate_seconds(known, work, RolloutLayout(1, 1, GIB, at_once), HERE.device)[0]


def rows() -> Iterator[Case]:
    """Every figure, those that a constant was fitted to marked."""
    bubble = 11 / 57
    yield Case("Qwen3-30B-A3B trained on H100, Megatron", "TFLOP/s", 240.5, trained(Q30, "16xH100", 4096, 8), True)
    yield Case("Qwen3-30B-A3B trained on 8 H20, verl", "MFU", 0.40, mfu(Q30, "8xH20", 4096), True)
    yield Case("the same on 16 H20", "MFU", 0.37, mfu(Q30, "16xH20", 4096))
    yield Case("the same on 32 H20", "MFU", 0.31, mfu(Q30, "32xH20", 4096))
    yield Case("Qwen3-235B-A22B trained on H100, Megatron", "TFLOP/s", 302, trained(Q235, "256xH100", 4096, 32, 0.1))
    yield Case("DeepSeek-V3 trained on 96 H20, verl", "MFU", 0.19, mfu(V3, "96xH20", 2060, bubble))
    yield Case("Qwen3-30B-A3B step, 32 H100, NeMo RL", "s", 192, nemo(Q30, "32xH100", 2048, 3203, 4096, 2, 8, 0), True)
    yield Case("Qwen3-235B-A22B step, 128 H100", "s", 395, nemo(Q235, "128xH100", 512, 5698, 8192, 16, 16, 7 / 71))
    yield Case("Qwen3-235B-A22B step, 256 H100", "s", 312, nemo(Q235, "256xH100", 512, 5713, 8192, 16, 16, 7 / 39))
    yield Case("DeepSeek-V3 step, 256 H100", "s", 134, nemo(V3, "256xH100", 512, 701, 1536, 32, 16, 15 / 47))
    yield Case("DeepSeek-V3 step, 512 H100", "s", 111, nemo(V3, "512xH100", 512, 697, 1536, 32, 16, 15 / 31))
    yield Case("DeepSeek-V3 rollout, 96 H20, verl", "s", 1050, verl()["generate"])
    yield Case("DeepSeek-V3 step, 96 H20, verl", "s", 1700, sum(verl().values()))
    yield Case("bench grpo-step, generate", "s", 2.73, here()["generate"])
    yield Case("bench grpo-step, reference", "s", 1.45, here()["reference"])
    yield Case("bench grpo-step, train", "s", 4.49, here()["train"])
    yield Case("bench grpo-step, sync", "s", 0.31, here()["sync"])
    smollm2 = architecture_of("HuggingFaceTB/SmolLM2-135M-Instruct", "float32")
    yield Case("SmolLM2-135M, 8,192 tokens by vLLM, the same CPU", "s", 44, on_cpu(smollm2, BENCH, 64))
