"""The workers of a stage that samples from its own policy as one object, with the phases of a step: training ranks and
rollout engines, and for GRPO judges.

Ranks and engines take turns on their devices, once a step: the engines sleep while the ranks train, both hold only
weights while these are sent, and the ranks sleep while the engines sample and validate.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from configs.distill import DistillConfig
from configs.grpo import GRPOConfig
from pipeline.grpo.batches import TrainingBatch
from pipeline.grpo.draws import Draws
from pipeline.grpo.reference import refresh_reference
from pipeline.grpo.sync import (
    MARGINS,
    ROUNDING_STEPS,
    Gap,
    measured_rounding,
    refuse_mismatch,
    scaled_margins,
    sync_weights,
)
from pipeline.objectives.control import NO_COEFFICIENTS, Coefficients, adapted_entropy_coef, adapted_kl_coef
from pipeline.reports.stopwatch import Stopwatch
from pipeline.train.checkpoints import Checkpoints
from pipeline.train.worker import RankBatch, TrainingRanks
from rewards.pool.workers import RewardPool
from rollout.actors import EngineLost
from rollout.device import DeviceState
from rollout.pool import RolloutPool


@dataclass(frozen=True)
class PreparedBatch:
    """A batch that the training ranks hold, with every column that its loss reads."""

    held: RankBatch
    denominator: float


_ConfigT = TypeVar("_ConfigT", GRPOConfig, DistillConfig)


@dataclass(kw_only=True)
class OnPolicyFleet(Generic[_ConfigT]):
    """Handles of the ranks and engines of a stage.

    probe: fixed sequences whose log-probabilities prove a weight sync.
    watch: seconds of each phase.
    margins: bounds of a sync in units of the policy's rounding. In bfloat16 the first sync of the stage sets them.
    rounding: the policy's, measured at the first sync and at every tenth step.
    """

    policy: TrainingRanks
    rollout: RolloutPool
    checkpoints: Checkpoints
    config: _ConfigT
    probe: list[list[int]]
    watch: Stopwatch = field(default_factory=Stopwatch)
    margins: Gap = MARGINS
    rounding: Gap | None = None
    _version: int = 0
    """Step of the last sync, whose weights a replaced engine gets."""
    _busy: list[float] = field(default_factory=list[float])
    """Seconds in which the ranks, and each engine, were at work until the last lap."""
    _mismatch_bound: float = 0.0
    """The last sync's bound on the mean |trainer - engine| log-probability, in nats."""

    def resume(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Take margins and rounding over from the metrics of the steps before."""
        if rows and "sync/margin_mean" in rows[-1]:
            self.margins = MARGINS._replace(mean=rows[-1]["sync/margin_mean"])
        if rows:
            self.rounding = measured_rounding(rows[-1])

    def steps(self) -> Iterator[int]:
        """Sync the restored policy to the engines, then yield the number of each remaining step."""
        self.rollout.before_replacing, self.rollout.restore = self.policy.refuse_lost_node, self._restore
        self.sync_weights(self.checkpoints.step)
        self.lap()
        yield from range(self.checkpoints.step + 1, self.config.steps + 1)

    def give_devices_to_ranks(self) -> dict[str, float]:
        """Let the engines sleep, which discards their weights, and wake the ranks; return metrics of the moves.

        Nothing moves where engines have devices of their own.
        """
        if not self._colocated:
            return {}
        with self.watch("train"):
            return self._with_engines(lambda: self.rollout.to(DeviceState.ASLEEP)) | self.policy.to(DeviceState.AWAKE)

    def refuse_mismatch(self, metrics: Mapping[str, float], num_tokens: int, temperature: float = 1.0) -> None:
        """Raise RunStopped if trainer and engines differ on the sampled tokens of an update, of which these are the
        metrics and the number, by more than the last sync allowed."""
        # The probe is scored at temperature 1; a lower one enlarges differences of logits.
        bound = self._mismatch_bound / min(temperature, 1.0)
        refuse_mismatch(metrics, num_tokens, bound, step=self.checkpoints.step + 1)

    def sync_weights(self, step: int) -> dict[str, float]:
        """Sync the policy after `step` to the engines, which then are awake (pipeline.grpo.sync); return metrics."""
        with self.watch("sync"):
            metrics = self._with_engines(lambda: self._send(step))
        self.rounding = measured_rounding(metrics)
        if self.config.model.dtype == "bfloat16" and self.config.sync.max_mean_gap is None:
            if self.margins is MARGINS:
                self.margins = scaled_margins(metrics)
            metrics["sync/margin_mean"] = self.margins.mean
        self._mismatch_bound = metrics["sync/bound_mean"]
        return metrics

    def lap(self) -> dict[str, float]:
        """Return the seconds of each phase since the last call and, where engines and ranks have devices of their own,
        the seconds in which these were idle: the ranks, the engines in the mean, and the engine that was idle longest.
        """
        seconds = self.watch.lap()
        if not self._colocated:
            busy = [self.policy.busy_seconds, *self.rollout.decoding_seconds]
            before, self._busy = self._busy or [0.0] * len(busy), busy
            ranks, *engines = (seconds["time/step_seconds"] - now + old for now, old in zip(busy, before, strict=True))
            seconds["idle/ranks_seconds"] = max(ranks, 0.0)
            seconds["idle/engines_seconds"] = max(sum(engines) / len(engines), 0.0)
            seconds["idle/engines_max_seconds"] = max(*engines, 0.0)
        return seconds

    def _send(self, step: int) -> dict[str, float]:
        self._version = step
        with self.rollout.reserved():
            return sync_weights(
                self.policy,
                self.rollout,
                self.config.sync,
                probe=self.probe,
                version=step,
                colocated=self._colocated,
                margins=self.margins,
                rounding=self.rounding if step % ROUNDING_STEPS else None,
            )

    def _with_engines(self, call: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Call, and where an engine is lost, replace it and call again. Raises RolloutError where too many are lost."""
        while True:
            try:
                return call()
            except EngineLost:
                self.rollout.replace_lost()
                self.policy.has_groups = False  # the lost engine was in them

    def _restore(self) -> None:
        """Send the engines the weights of the last sync again, after one was replaced, and prove it."""
        self.policy.has_groups = False
        self._with_engines(lambda: self._send(self._version))

    @property
    def _colocated(self) -> bool:
        return self.config.placement == "colocated"


@dataclass(kw_only=True)
class Fleet(OnPolicyFleet[GRPOConfig]):
    """Handles of a GRPO stage's workers.

    folder: of the stage.
    coefficients: those of the next step.
    draws: prompts that engines and judges work on.
    """

    rewards: RewardPool
    folder: Path
    coefficients: Coefficients = NO_COEFFICIENTS
    draws: Draws = field(init=False)

    def __post_init__(self) -> None:
        self.draws = Draws(self.config, self.rollout, self.rewards)
        if self.config.rollout.max_lag:
            self.policy.meanwhile = self.rollout.work_until
            self.rollout.on_report = self.draws.judge_finished

    def resume(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Take margins, rounding and coefficients over from the metrics of the steps before."""
        objective = self.config.objective
        self.coefficients = Coefficients(
            objective.kl_coef if objective.kl_target is not None else None, objective.entropy_coef
        )
        if rows:
            kl, entropy = (rows[-1].get(f"loss/{name}_coef") for name in Coefficients._fields)
            self.coefficients = Coefficients(kl, self.coefficients.entropy if entropy is None else entropy)
            self.adapt_coefficients(rows[-1])
        super().resume(rows)

    def prepare(self, batch: TrainingBatch) -> PreparedBatch:
        """Send a batch to the ranks and add the log-probabilities that its loss reads: the reference's for the KL
        term, and the policy's before the first update for the ratio (eq. 32 of DeepSeek-V2).

        With a single update per batch, the update's own forward pass gives the ratio's denominator.
        """
        held = self.policy.shard(batch.trees)
        with self.watch("reference"):
            if self.config.objective.kl_coef > 0:
                self.policy.add_logprobs(held, reference=True)
            if self.config.routing_replay == "policy":
                self.policy.add_routes(held)
            elif self.config.updates_per_batch > 1:
                self.policy.add_logprobs(held, reference=False)
        return PreparedBatch(held, batch.denominator)

    def update(self, batch: PreparedBatch) -> dict[str, float]:
        """Do one optimizer step. Raises RunStopped if trainer and engines differ on the sampled tokens by more than the
        last sync allowed."""
        with self.watch("train"):
            metrics = self.policy.update(batch.held, batch.denominator)
        self.refuse_mismatch(metrics, batch.held.num_values, self.config.sampling.temperature)
        return metrics

    def adapt_coefficients(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Adapt the coefficients that have a target to the `metrics` of a step; return those that this step had."""
        objective, before = self.config.objective, self.coefficients
        figures: dict[str, float] = {}
        if before.kl is not None and objective.kl_target is not None:
            kl = adapted_kl_coef(before.kl, divergence=metrics["loss/kl_mean"], target=objective.kl_target)
            self.coefficients = self.coefficients._replace(kl=kl)
            figures["loss/kl_coef"] = before.kl
        if objective.entropy_target is not None:
            entropy = metrics["rollout/entropy_mean"]
            entropy = adapted_entropy_coef(before.entropy, entropy=entropy, target=objective.entropy_target)
            self.coefficients = self.coefficients._replace(entropy=entropy)
            figures["loss/entropy_coef"] = before.entropy
        return figures

    def refresh_reference(self, step: int) -> None:
        """Let the reference become the policy after `step`, if that is due and another step follows."""
        every_steps = self.config.objective.reference_every_steps
        if every_steps and step % every_steps == 0 and step < self.config.steps:
            with self.watch("reference"):
                refresh_reference(self.policy, self.folder, step, every_steps, pending=self.checkpoints.pending)
