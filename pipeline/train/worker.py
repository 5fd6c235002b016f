"""Training ranks as Ray actors, and the handle that drives them together.

An actor only forwards calls to its TrainEngine. The handle shards a batch over the ranks, reduces their results, and
raises RankLost when a rank dies, RunStopped when it times out.
"""

import math
import os
import time
from collections import ChainMap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import ray

from pipeline.data.trees import Floats, MicroBatch, PackedRow, Tree, micro_batch, shard, values_in_order
from pipeline.errors import RunStopped
from pipeline.train.calls import RankCalls
from pipeline.train.spec import PEAK, BatchSums, TrainSpec
from rollout.device import DeviceState, Move
from rollout.process import compute_environment, free_port, network_environment, num_threads, start_environment
from rollout.types import CompletionColumns, GroupAddress, Routes, Transport


class TrainActor:
    """One training rank, a process with a TrainEngine."""

    def address(self) -> tuple[str, str, int]:
        """Return this node's id in Ray, its address, and a free port for the ranks' process group."""
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), free_port()

    def build(self, spec: TrainSpec, environment: dict[str, str], sharers: int) -> str:
        """Join the process group that `environment` describes, and build the engine of one of `sharers` ranks on this
        node, and return its device's name. Threads and interfaces are this node's."""
        threads = num_threads(spec.trainer.threads, sharers=sharers)
        os.environ.update(compute_environment(threads) | network_environment(ray.util.get_node_ip_address()))
        os.environ.update(environment)
        from pipeline.train.student import StudentEngine, TrainEngine  # torch and DeepSpeed belong in this process only
        from rollout.device_memory import device_name

        self.engine = StudentEngine(spec) if spec.teachers else TrainEngine(spec)
        self.batches: dict[int, list[MicroBatch]] = {}
        return device_name(self.engine.device)

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the engine by name."""
        return getattr(self.engine, method)(*args)

    def hold(self, number: int, rows: list[PackedRow], names: list[bytes], *stored: CompletionColumns | Routes) -> None:
        """Lay out `rows`, and hold the micro-batches as batch `number`. names: of the references in their trees, which
        led to `stored`."""
        by_name = dict(zip(names, stored, strict=True))
        self.batches[number] = [row.micro_batch(by_name) for row in rows]

    def call_on(self, number: int, method: str, *args: Any) -> Any:
        """Call a method of the engine by name on the batch `number`, which stays here."""
        return getattr(self.engine, method)(self.batches[number], *args)

    def use(self, number: int, method: str, *args: Any) -> Any:
        """Call a method of the engine by name on the batch `number`, which is then dropped."""
        return getattr(self.engine, method)(self.batches.pop(number), *args)

    def add_column(self, number: int, method: str, name: str) -> None:
        """Add the log-probabilities of the engine's `method` to the batch `number` as the column `name`."""
        rows = self.batches[number]
        columns = getattr(self.engine, method)(rows)
        self.batches[number] = [row.with_column(name, values_N) for row, values_N in zip(rows, columns, strict=True)]

    def add_routes(self, number: int, method: str) -> None:
        """Add the column `policy_logprobs` of the engine's `method` to the batch `number`, and the routes behind it."""
        rows = self.batches[number]
        results = getattr(self.engine, method)(rows)
        self.batches[number] = [
            replace(row.with_column("policy_logprobs", values_N), experts_TLK=experts_TLK)
            for row, (values_N, experts_TLK) in zip(rows, results, strict=True)
        ]

    def expert_load(self) -> dict[str, list[int]]:
        """Tokens routed to each expert in the last step, by the name of its layer's gate."""
        return self.engine.balancer.load

    def next_bucket(self) -> tuple[int | None, Any]:
        """Put the next bucket of a sync into the object store (see WeightSender)."""
        return self.engine.sender.next()

    def call_sender(self, method: str, *args: Any) -> None:
        """Call a method of the engine's WeightSender by name."""
        getattr(self.engine.sender, method)(*args)


@dataclass(frozen=True)
class RankBatch:
    """A batch that the ranks hold: its number, its tokens without repeated prompts, and its trained tokens or scored
    answers."""

    number: int
    num_tokens: int
    num_values: int


class TrainingRanks(RankCalls):
    """All training ranks of a stage. Every method raises RankLost when a rank dies, RunStopped when it times out.

    Example:
        ranks = TrainingRanks(spec, resources=[{"num_cpus": 1}])
        metrics = ranks.update(ranks.shard(trees), denominator=float(num_tokens))
        ranks.save_hf(Path("hf"))
        ranks.close()
    """

    actor: type = TrainActor

    def __init__(self, spec: TrainSpec, *, resources: Sequence[Mapping[str, Any]]) -> None:
        """Start the ranks, each with its Ray options in `resources`, and wait until all are ready."""
        self._spec = spec
        limit = spec.trainer.start_timeout_seconds
        self.has_groups = False  # with the engines' workers
        self.transport: Transport | None = None  # None: the one that placement allows
        self._numbers = count()  # of batches
        actor: Any = ray.remote(self.actor)
        runtime_env = {"env_vars": start_environment()}
        ranks = [actor.options(**options, runtime_env=runtime_env).remote() for options in resources]
        super().__init__(ranks, spec.trainer.timeout_seconds)
        addresses = self._get([rank.address.remote() for rank in self._ranks], "address", limit)
        self._nodes = nodes = [node for node, _, _ in addresses]
        _, host, port = addresses[0]
        group = {"WORLD_SIZE": str(len(nodes)), "LOCAL_RANK": "0", "MASTER_ADDR": host, "MASTER_PORT": str(port)}
        started = [
            rank.build.remote(spec, group | {"RANK": str(i)}, nodes.count(node))
            for i, (rank, node) in enumerate(zip(self._ranks, nodes, strict=True))
        ]
        self.devices: list[str] = self._get(started, "build", limit)  # names, by rank

    def to(self, state: DeviceState) -> dict[str, float]:
        """Keep on the devices the memory of `state` only. Returns `device/ranks_STATE_seconds` of the slowest rank and
        `device/ranks_STATE_gib` of the one that moved most; empty where nothing moved, as on CPUs."""
        moves: list[Move] = self._all("to", state)
        return Move(max(x.seconds for x in moves), max(x.num_bytes for x in moves)).metrics("ranks", state)

    def shard(self, trees: list[Tree]) -> RankBatch:
        """Pack trees into rows and send each rank its own, once; tokens of stored trees go from the node that sampled
        them. The ranks hold the batch until `forward_backward` or `evaluate` uses it up."""
        trainer, number = self._spec.trainer, next(self._numbers)
        ranks = shard(trees, num_ranks=trainer.num_ranks, micro_batch_tokens=trainer.micro_batch_tokens)
        calls = [rank.hold.remote(number, *_named(rows)) for rank, rows in zip(self._ranks, ranks, strict=True)]
        self._get(calls, "hold")
        rows = [row for of_rank in ranks for row in of_rank]
        return RankBatch(number, sum(row.num_new_tokens for row in rows), sum(row.num_values for row in rows))

    def update(self, batch: RankBatch, denominator: float) -> dict[str, float]:
        """Do one optimizer step on a batch, its loss divided by `denominator`; return metrics.

        Raises RunStopped when the gradient is not finite: the weights are lost, the last checkpoint is not.
        """
        started = time.monotonic()
        metrics = self.step(self.forward_backward(batch, denominator))
        return metrics | {"train/tokens_per_second": batch.num_tokens / (time.monotonic() - started)}

    def forward_backward(self, batch: RankBatch, denominator: float) -> list[BatchSums]:
        """Add the gradient of a batch to that of the next `step`; return each rank's sums."""
        return self._run("use", batch, "forward_backward", denominator)

    def step(self, sums: list[BatchSums]) -> dict[str, float]:
        """Do one optimizer step with the gradient so far, and return the metrics of its batches' `sums`. Raises
        RunStopped as `update` does."""
        step_metrics: list[dict[str, float]] = self._all("optim_step")
        fullest = max(step_metrics, key=lambda metrics: metrics.get(PEAK, 0.0))  # of memory, if it is known
        metrics = mean_metrics(sums) | {"loss/total": sum(part.loss for part in sums)} | fullest
        if not math.isfinite(metrics["train/grad_norm"]):
            raise RunStopped("the gradient is not finite: lower the learning rate; the run resumes at its checkpoint")
        return metrics

    def load_teacher(self, name: str) -> None:
        """Let the teacher `name` of the spec take the reference's place on every rank."""
        self._all("load_teacher", name)

    def teach(self, batch: RankBatch) -> None:
        """Keep the loaded teacher's last hidden states for a batch, of which `forward_backward` must follow."""
        self._run("call_on", batch, "teach")

    def add_logprobs(self, batch: RankBatch, *, reference: bool) -> None:
        """Add the column `ref_logprobs` of the frozen reference, or `policy_logprobs` of the present policy."""
        name, method = ("ref_logprobs", "reference_logprobs") if reference else ("policy_logprobs", "logprobs")
        self._run("add_column", batch, method, name)

    def refresh_reference(self) -> None:
        """Let the reference become the present policy."""
        self._all("refresh_reference")

    def add_routes(self, batch: RankBatch) -> None:
        """Add `policy_logprobs` of the present policy, and the routes behind them for training to replay."""
        self._run("add_routes", batch, "logprobs_and_experts")

    def evaluate(self, batch: RankBatch) -> dict[str, float]:
        """Compute `eval/nll_mean`, the mean negative log-likelihood of the trained tokens."""
        return mean_metrics(self._run("use", batch, "evaluate"))

    def expert_load(self) -> dict[str, list[int]]:
        """Tokens routed to each expert in the last step, by the name of its layer's gate; empty for a dense model."""
        return self._get([self._ranks[0].expert_load.remote()], "expert_load")[0]

    def scores(self, trees: list[Tree]) -> list[list[float]]:
        """Score each answer of scored trees with a reward model, in the order of `trees` and their branches."""
        return [values_N.tolist() for values_N in self._in_order(trees, "scores")]

    def answer_logprobs(self, trees: list[Tree]) -> list[list[Floats]]:
        """Compute the policy's log-probabilities of each answer of compared trees, in the order of `trees` and their
        branches."""
        ends = [np.cumsum([len(branch.token_ids) for branch in tree.branches])[:-1] for tree in trees]
        return [np.split(*pair) for pair in zip(self._in_order(trees, "logprobs"), ends, strict=True)]

    def _in_order(self, trees: list[Tree], method: str) -> list[Floats]:
        """Call a method on trees that are never cut, and return the values of each, in the order of `trees`."""
        padded = [*trees, *trees[:1] * (self._spec.trainer.num_ranks - len(trees))]  # every rank needs a tree
        results = self._run("use", self.shard(padded), method)
        return values_in_order(padded, results, self._spec.trainer.micro_batch_tokens)[: len(trees)]

    def sequence_logprobs(self, trees: list[Tree]) -> list[Floats]:
        """Log-probabilities of the trained tokens of each tree, in the order of `trees`. Every rank computes all."""
        return self._of_sequences(trees, "logprobs")

    def perturbed_sequence_logprobs(self, trees: list[Tree]) -> list[Floats]:
        """The same with the rounding of every layer perturbed, as by another program (see pipeline.models.rounding)."""
        return self._of_sequences(trees, "perturbed_logprobs")

    def _of_sequences(self, trees: list[Tree], method: str) -> list[Floats]:
        row = micro_batch(trees)
        values_N = self._each(method, [([row],)] * len(self._ranks))[0][0]
        return [values_N[row.sequence_N == sequence] for sequence in range(row.num_sequences)]

    def open_groups(self, num_workers: int) -> tuple[list[GroupAddress], list[Any]]:
        """Let each rank open a group with all `num_workers` workers of the engines. Returns the groups' addresses, and
        calls that end when the workers have joined."""
        places = self._get(
            [rank.address.remote() for rank in self._ranks], "address", self._spec.trainer.start_timeout_seconds
        )
        self.has_groups = True
        addresses = [GroupAddress(host, port, 1 + num_workers) for _, host, port in places]
        pairs = zip(self._ranks, addresses, strict=True)
        return addresses, [rank.call_sender.remote("open_group", address) for rank, address in pairs]

    def await_groups(self, calls: list[Any]) -> None:
        """Wait for the calls of `open_groups`."""
        self._get(calls, "open_group", self._spec.trainer.start_timeout_seconds)

    def weight_buckets(self, bucket_mib: float, engine_devices: Collection[str]) -> Iterator[list[Any]]:
        """Yield references to the weights in the object store: of each rank a bucket of about bucket_mib MiB (see
        pipeline.train.sender).

        While the caller loads what was yielded, the ranks prepare what follows, and no more. The list is cleared when
        the caller asks for the next. `held_bytes` is then the most that a rank held beside its own weights.
        """
        self.held_bytes = 0
        self._all("begin_sync", bucket_mib, engine_devices, self.transport)
        pending = self._ask_for_buckets()
        for number in count():
            name = f"bucket {number + 1} of the weights"
            held: list[int | None] = self._get([held for held, _ in pending], name)
            if None in held:
                break
            self.held_bytes = max(self.held_bytes, *(num_bytes or 0 for num_bytes in held))
            buckets = [bucket for _, bucket in pending]
            pending = self._ask_for_buckets()
            sent = [rank.call_sender.remote("broadcast", number) for rank in self._ranks] if self.has_groups else []
            yield buckets
            buckets.clear()  # frees them in the object store
            self._get(sent, name)
        self._get([rank.call_sender.remote("end") for rank in self._ranks], "end")

    def begin_save(self, folder: Path) -> None:
        """Let all ranks copy their training state to the host and write it into `folder`, beside what follows."""
        self._all("begin_save", folder)

    def end_save(self, patience: float | None) -> dict[str, str] | None:
        """Return the checksums of all files, by name; None where a rank still writes after `patience` seconds."""
        checksums = self._all("end_save", patience)
        return None if None in checksums else dict(ChainMap(*checksums))

    def load(self, folder: Path) -> None:
        """Load a training state. Raises ValueError if this layout can't read it."""
        self._all("load", folder)

    def save_hf(self, folder: Path) -> None:
        """Write a plain `transformers` checkpoint; `folder` appears complete or not at all."""
        self._all("save_hf", folder)

    def close(self) -> None:
        """Kill the ranks' processes."""
        for actor in self._ranks:
            ray.kill(actor)

    def _ask_for_buckets(self) -> list[Any]:
        return [rank.next_bucket.options(num_returns=2).remote() for rank in self._ranks]

    def _run(self, call: str, batch: RankBatch, method: str, *args: Any) -> list[Any]:
        """Make a `call` of every actor that runs a method of its engine on a batch."""
        calls = [getattr(rank, call).remote(batch.number, method, *args) for rank in self._ranks]
        return self._get(calls, method)


def mean_metrics(sums: list[BatchSums]) -> dict[str, float]:
    """Divide the ranks' sums by their number of tokens or comparisons, and add their maxima."""
    count = max(sum(part.count for part in sums), 1)
    names = {name for part in sums for name in part.sums}
    metrics = {name: sum(part.sums.get(name, 0.0) for part in sums) / count for name in sorted(names)}
    max_names = {name for part in sums for name in part.maxima}
    return metrics | {
        name: float(np.max([part.maxima[name] for part in sums if name in part.maxima])) for name in sorted(max_names)
    }


def _named(rows: list[PackedRow]) -> tuple[Any, ...]:
    """Return rows with names in the place of references, the names, and the references, which Ray then resolves."""
    references: dict[bytes, Any] = {}

    def name(reference: Any) -> bytes | None:
        if reference is None:
            return None
        references[reference.binary()] = reference
        return reference.binary()

    def named(tree: Tree) -> Tree:
        branches = [replace(branch, stored=name(branch.stored)) for branch in tree.branches]
        return replace(tree, branches=branches, root_stored=name(tree.root_stored))

    rows = [replace(row, trees=[named(tree) if tree.references() else tree for tree in row.trees]) for row in rows]
    return rows, list(references), *references.values()
