"""Setting up the sampling of answers: the checks, prompts and sampler of the stages `preferences` and `sample`."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerFast

from configs.preferences import PreferencesConfig, SampledPairs
from configs.rewards import RewardPoolConfig, RewardSpec
from configs.sample import SampleConfig, SampledDomain
from pipeline.cluster.start import start_rewards, start_rollout
from pipeline.data.prompts import Prompts, judgeable
from pipeline.data.rows import check_files, report_bad_rows
from pipeline.preferences.answers import AnswerSampler, PromptSet, distinct_prompts
from rewards.pool.guard import Judges, inspect, refuse_idle_workers
from rewards.pool.workers import RewardPool

SampledSource = SampledPairs | SampledDomain


def check_sources(sources: Iterable[SampledSource], pool: RewardPoolConfig) -> None:
    """Raise ValueError for a missing source or reward, and for pools of workers that no reward uses."""
    rewards: list[RewardSpec] = []
    for source in sources:
        check_files(source.prompts.source)
        rewards += source.rewards
    refuse_idle_workers(pool, [name for reward in rewards for name in inspect([reward], pool).values()])


def load_prompt_sets(
    sources: Mapping[str, SampledSource],
    pool: RewardPoolConfig,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    folder: Path,
) -> dict[str, PromptSet]:
    """Load the prompts of every source by its name; report bad rows and prompts that its reward can't judge."""
    prompt_sets: dict[str, PromptSet] = {}
    for name, source in sources.items():
        if source.rewards:
            with Judges(source.rewards, pool) as judges:
                prompts = judgeable(source.prompts, judges, tokenizer, seed)
        else:
            prompts = Prompts.load(source.prompts, tokenizer, seed)
        report_bad_rows(
            prompts.bad_rows, folder / f"{name}.bad_rows.jsonl", lambda text: Console().print(text, markup=False)
        )
        asked = distinct_prompts(prompts)
        if isinstance(source, SampledDomain):
            prompt_sets[name] = PromptSet(asked, source.reward, source.filters)
        else:
            prompt_sets[name] = PromptSet(asked, source.reward, reasoning=source.reasoning)
    return prompt_sets


def answer_sampler(
    config: SampleConfig | PreferencesConfig, model: Path, stop_token_ids: Sequence[int], folder: Path
) -> AnswerSampler:
    """Return a sampler of the checkpoint `model` that stores answers in `folder`/answers.

    stop_token_ids: token ids that end an answer. Engines and judges start when an answer is missing.
    """
    assert config.model and config.sampling and config.rollout, "a stage that samples sets these together"

    def start_judges(specs: list[RewardSpec]) -> RewardPool:
        return start_rewards(specs, config.reward_pool)

    engines = partial(
        start_rollout, model, config.rollout, dtype=config.model.dtype, seed=config.seed, stop_token_ids=stop_token_ids
    )
    answers, samples = folder / "answers", config.samples
    return AnswerSampler(answers, samples, config.sampling, config.rollout, config.seed, engines, start_judges)
