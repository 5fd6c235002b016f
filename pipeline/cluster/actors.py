"""The machines of a cluster, and the actors that a stage starts on them, by kind."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

ActorKind = Literal["rank", "engine", "judge"]


@dataclass(frozen=True, slots=True)
class ActorGroup:
    """Actors of one kind that a stage starts.

    gpus: GPUs of one of them, on a cluster with GPUs.
    threads: CPU threads of all of them, without GPUs; 0 takes every core.
    setting: the setting to lower where they don't fit.
    gpus_setting: the setting that spreads one actor over several GPUs; empty for none.
    spans_nodes: those GPUs may be of several machines.
    label, checkpoint, dtype: of a judge, its reward's label, its model, and the model's precision.
    fp8: parts of a judge's engine in FP8. max_length: its longest input in tokens; None for the model's own.
    suite: the suite that a judge judges in; empty for the stage's own rewards.
    kv_cache_gib: GiB of KV cache of one actor on each of its devices, and the setting of it.
    """

    kind: ActorKind
    count: int
    gpus: float
    threads: int
    setting: str
    gpus_setting: str = ""
    spans_nodes: bool = False
    label: str = ""
    checkpoint: str = ""
    dtype: str = ""
    fp8: tuple[Literal["weights", "kv_cache"], ...] = ()
    max_length: int | None = None
    suite: str = ""
    kv_cache_gib: float | Literal["auto"] = 0.0
    kv_cache_setting: str = ""

    @property
    def noun(self) -> str:
        return f"'{self.label}' judge" if self.kind == "judge" else {"rank": "training rank"}.get(self.kind, self.kind)

    def __str__(self) -> str:
        return f"{self.count} {self.noun}{'s' * (self.count > 1)}"


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster. The free amounts are those that no actor has claimed; memory is in bytes.

    device_memory: usable bytes of each GPU, where they are known. node_id: Ray's, since machines may share a name.
    """

    name: str
    cpus: float
    gpus: float
    free_cpus: float
    free_gpus: float
    memory: float = float("inf")
    device_memory: float = float("inf")
    node_id: str = ""

    @property
    def key(self) -> str:
        return self.node_id or self.name

    def __str__(self) -> str:
        if self.gpus:
            return f"{self.name} ({self.gpus:g} GPUs, {self.free_gpus:g} free)"
        return f"{self.name} ({self.cpus:g} cores, {self.free_cpus:g} unclaimed)"


def describe_nodes(nodes: Sequence[Node]) -> str:
    """Describe the nodes with their GPUs, or else their cores; of many the first four."""
    more = f" and {len(nodes) - 4} more" if len(nodes) > 4 else ""
    return ", ".join(map(str, nodes[:4])) + more
