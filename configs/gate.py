"""Gates: rules on evaluation figures that decide if a checkpoint is promoted."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.base import Settings
from configs.evaluation import NamedSuites, fit_suites
from configs.model import ModelConfig
from configs.rewards import RewardPoolConfig
from configs.sampling import RolloutConfig, SamplingConfig


class ImproveRule(Settings):
    """The candidate is better than the parent by more than `margin`."""

    type: Literal["improve"]
    """Selects this rule."""
    figure: str
    """`SUITE/FIGURE`, as an evaluation names it: `sums/pass@1_greedy`."""
    margin: float = Field(default=0.0, ge=0)
    """Smallest improvement required."""


class HoldRule(Settings):
    """The candidate is worse than the parent by at most `tolerance`, the accepted cost of alignment elsewhere."""

    type: Literal["hold"]
    """Selects this rule."""
    figure: str
    """`SUITE/FIGURE`, as an evaluation names it."""
    tolerance: float = Field(ge=0)
    """Largest loss allowed."""


class ThresholdRule(Settings):
    """The candidate's figure is at least `at_least`, or at most `at_most`; the parent's plays no part."""

    type: Literal["threshold"]
    """Selects this rule."""
    figure: str
    """`SUITE/FIGURE`, as an evaluation names it."""
    at_least: float | None = None
    """Smallest figure allowed. Exactly one of `at_least` and `at_most` is set."""
    at_most: float | None = None
    """Largest figure allowed."""

    @model_validator(mode="after")
    def _one_bound(self) -> "ThresholdRule":
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("set exactly one of 'at_least' and 'at_most'")
        return self


Rule = Annotated[ImproveRule | HoldRule | ThresholdRule, Field(discriminator="type")]


class GateConfig(Settings):
    """A gate: evaluates candidate and parent on the same suites and decides by rules on their figures.

    Each rule holds, fails, or is undecided where its interval allows both. One failed rule fails the gate; otherwise
    one undecided rule leaves it undecided; otherwise the candidate is promoted.
    """

    type: Literal["gate"]
    """Selects this stage."""
    candidate: ModelConfig
    """Checkpoint to promote."""
    parent: ModelConfig
    """Checkpoint to compare it with."""
    suites: NamedSuites = Field(min_length=1)
    """Suites by name, or a shipped list of them, as in a stage of type `eval`."""
    rules: list[Rule] = Field(min_length=1)
    """Rules that must hold. The first one's figure also selects the best checkpoint within a stage."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Confidence of the intervals that the rules use."""
    on_failure: Literal["stop", "roll_back"] = "stop"
    """Action of a failed gate. `stop`: the recipe ends here. `roll_back`: the next stage starts from the best
    checkpoint that the candidate's stage kept (its `validation`) if that one passes, otherwise from the parent."""
    on_undecided: Literal["ask", "stop", "promote", "roll_back"] = "ask"
    """Action of an undecided gate. `ask`: the recipe waits for `alignyard gate decide`."""
    sampling: SamplingConfig
    """Sampling of the completions; greedy ones take only max_tokens from here."""
    rollout: RolloutConfig
    """The vLLM engines."""
    reward_pool: RewardPoolConfig = Field(default_factory=RewardPoolConfig)
    """Processes that judge."""
    seed: int = Field(default=0, ge=0)
    """Seed of sampling and of the bootstrap."""

    @model_validator(mode="after")
    def _sound(self) -> "GateConfig":
        fit_suites(self.suites, self.sampling, self.rollout)
        return self

    @model_validator(mode="after")
    def _known_suites(self) -> "GateConfig":
        for index, rule in enumerate(self.rules):
            suite, slash, _ = rule.figure.partition("/")
            if not slash or suite not in self.suites:
                raise ValueError(
                    f"rules.{index}.figure='{rule.figure}': write SUITE/FIGURE with one of the suites "
                    f"{sorted(self.suites)}"
                )
        return self
