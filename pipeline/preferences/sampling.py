"""Sampling of answers for a stage: its sources of prompts checked and read, its engines and judges started."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

from rich.console import Console
from transformers import PreTrainedTokenizerFast

from configs.data import PromptData
from configs.preferences import PreferencesConfig
from configs.rewards import RewardPoolConfig, RewardSpec
from configs.sample import SampleConfig
from pipeline.cluster.start import start_all, start_rewards, start_rollout
from pipeline.data.prompts import Prompts, judgeable
from pipeline.data.rows import source_files, tell
from pipeline.preferences.answers import Asked, Sampler, Speaker, distinct
from rewards.guard import inspect, refuse_idle
from rewards.pool import RewardPool


class SourceOfPrompts(Protocol):
    """What is asked in one domain, and who judges the answers."""

    @property
    def prompts(self) -> PromptData:
        """The prompts."""
        ...

    @property
    def reward(self) -> RewardSpec | None:
        """The reward."""
        ...


def check_sources(sources: Sequence[SourceOfPrompts], pool: RewardPoolConfig) -> None:
    """Raise ValueError for a source or reward that isn't there, and for workers that would have nothing to do."""
    for source in sources:
        source_files(source.prompts.source)
    inspected = [inspect([source.reward], pool) for source in sources if source.reward is not None]
    refuse_idle(pool, [name for pools in inspected for name in pools.values()])


def ask(
    sources: Mapping[str, SourceOfPrompts],
    pool: RewardPoolConfig,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    folder: Path,
) -> dict[str, Asked]:
    """What is asked of every source by its name; bad rows, and those that could not be judged, are told and kept."""
    asked: dict[str, Asked] = {}
    for name, source in sources.items():
        if source.reward is None:
            prompts = Prompts.load(source.prompts, tokenizer, seed)
        else:
            prompts = judgeable(source.prompts, [source.reward], pool, tokenizer, seed)
        tell(prompts.bad_rows, folder / f"{name}.bad_rows.jsonl", lambda text: Console().print(text, markup=False))
        asked[name] = Asked(distinct(prompts), source.reward)
    return asked


def sampler(config: SampleConfig | PreferencesConfig, model: Path, ends: Sequence[int], folder: Path) -> Sampler:
    """Asks the checkpoint `model` for answers that end at one of `ends`, and keeps them below `folder`; engines and
    judges start where they must."""
    assert config.model is not None and config.sampling is not None and config.rollout is not None
    dtype, rollout = config.model.dtype, config.rollout

    @contextmanager
    def speaking() -> Iterator[Speaker]:
        start = partial(start_rollout, model, rollout, dtype=dtype, seed=config.seed, stop_token_ids=ends)
        with start_all(start) as (speaker,):
            yield speaker

    @contextmanager
    def judging(spec: RewardSpec | None) -> Iterator[RewardPool | None]:
        if spec is None:
            yield None
            return
        with start_all(lambda: start_rewards([spec], config.reward_pool)) as (rewards,):
            yield rewards

    return Sampler(folder / "answers", config.samples, config.sampling, rollout, config.seed, speaking, judging)
