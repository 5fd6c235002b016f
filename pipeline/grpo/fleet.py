"""The handles that a step of GRPO drives: policy, engines, judges and checkpoints."""

from dataclasses import dataclass

from configs.grpo import GRPOConfig
from pipeline.grpo.sync import sync_weights
from pipeline.train.checkpoints import Checkpoints
from pipeline.train.worker import Policy
from rewards.pool import RewardPool
from rollout.pool import RolloutPool


@dataclass(frozen=True)
class Fleet:
    """The handles of a GRPO stage."""

    policy: Policy
    rollout: RolloutPool
    rewards: RewardPool
    checkpoints: Checkpoints
    config: GRPOConfig
    probe: list[list[int]]

    def sync_weights(self, version: int) -> dict[str, float]:
        """Send the policy to the engines as `version` and prove that it arrived (pipeline.grpo.sync)."""
        with self.policy.awake(), self.rollout.awake():
            return sync_weights(self.policy, self.rollout, self.config.sync, probe=self.probe, version=version)
