"""On-policy distillation from several frozen teachers: the student samples, and its divergence from a teacher on these
samples is the loss (DeepSeek-V4 section 5, arXiv:2606.19348)."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from configs.distill import DistillConfig
from pipeline.cluster.start import start_all, start_ranks, start_rollout
from pipeline.data.chat import turn_ends
from pipeline.data.order import refuse_repeats
from pipeline.data.prompts import Prompt, Prompts
from pipeline.data.rows import check_files, report_bad_rows
from pipeline.data.trees import Tree, stored_tree
from pipeline.disk.files import read_json
from pipeline.grpo.draws import draw_seed
from pipeline.grpo.figures import rollout_figures
from pipeline.grpo.fleet import OnPolicyFleet
from pipeline.grpo.sync import probe_sequences
from pipeline.grpo.validation import Validation
from pipeline.models.tokenizer import load_tokenizer
from pipeline.objectives.aggregate import batch_denominator, token_weight
from pipeline.reports.alarms import Alarms
from pipeline.reports.report import Report, Sample, read_metrics
from pipeline.stages.context import Context
from pipeline.stages.grpo import validation_suites
from pipeline.train.checkpoints import Checkpoints
from pipeline.train.spec import BatchSums, FrozenModel, TrainSpec
from pipeline.train.worker import mean_metrics
from pipeline.weights.resolve import check_template, resolve_model
from rollout.types import StoredGroup


def run(
    config: DistillConfig,
    prompts: Prompts,
    fleet: "DistillFleet",
    report: Report,
    alarms: Alarms,
    validate: Callable[[int], dict[str, float]],
) -> None:
    """Run the remaining steps: sample G completions of each prompt, add up the gradients of the divergence from each
    teacher in turn, update the student, and send its weights to the engines."""
    for step in fleet.steps():
        batch, metrics = sample(config, prompts.take(step, config.prompts_per_step), fleet, step)
        metrics |= fleet.give_devices_to_ranks()
        trees_of, denominator = lessons(batch, config, step)
        metrics |= fleet.update([fleet.learn(teacher, trees, denominator) for teacher, trees in trees_of.items()])
        fleet.checkpoints.write(step)
        metrics |= fleet.sync_weights(step) | validate(step)
        expert_load = fleet.policy.expert_load() if report.page_due(step) else None
        report.step(step, metrics | fleet.lap(), unjudged_samples(batch), expert_load=expert_load)
        fleet.checkpoints.done(step)
        alarms.check(step, metrics)


Batch = list[tuple[Prompt, StoredGroup]]
"""Prompts of a step with their completions."""


@dataclass(frozen=True)
class Lesson:
    """The share of one teacher in a step: the number of its tokens, and each rank's sums of their loss."""

    teacher: str
    num_tokens: int
    sums: list[BatchSums]


class DistillFleet(OnPolicyFleet[DistillConfig]):
    """Handles of a distillation's workers: the student's ranks, with a teacher in turn, and its engines."""

    def learn(self, teacher: str, trees: list[Tree], denominator: float) -> Lesson:
        """Add the gradient of the divergence from `teacher` on `trees`; the loss is divided by `denominator`."""
        batch = self.policy.shard(trees)
        with self.watch("teachers"):
            self.policy.load_teacher(teacher)
            if self.config.objective.form == "full":
                self.policy.teach(batch)
            else:
                self.policy.add_logprobs(batch, reference=True)
        with self.watch("train"):
            return Lesson(teacher, batch.num_values, self.policy.forward_backward(batch, denominator))

    def update(self, lessons: list[Lesson]) -> dict[str, float]:
        """Do one optimizer step with the gradients of `lessons` and return metrics. Raises RunStopped if trainer and
        engines differ on the sampled tokens by more than the last sync allowed."""
        with self.watch("train"):
            metrics = self.policy.step([part for lesson in lessons for part in lesson.sums])
        self.refuse_mismatch(metrics, sum(lesson.num_tokens for lesson in lessons))
        name = "loss/reverse_kl_mean"
        return metrics | {
            f"teacher/{lesson.teacher}/reverse_kl_mean": mean_metrics(lesson.sums)[name] for lesson in lessons
        }


def sample(
    config: DistillConfig, prompts: list[Prompt], fleet: DistillFleet, step: int
) -> tuple[Batch, dict[str, float]]:
    """Sample the completions of a step; return them with metrics. The step selects the seed, so that a resumed run
    repeats it. The engines are awake. Raises RolloutError."""
    seed, prompt_ids = draw_seed(config.seed, step), [prompt.token_ids for prompt in prompts]
    with fleet.watch("generate"):
        groups = {
            group.index: group
            for group in fleet.rollout.generate(prompt_ids, config.sampling.of_policy(), config.group_size, seed)
        }
    batch = [(prompt, groups[index]) for index, prompt in enumerate(prompts)]
    metrics = rollout_figures([completion for _, group in batch for completion in group.completions])
    return batch, metrics | fleet.rollout.metrics()


def lessons(batch: Batch, config: DistillConfig, step: int) -> tuple[dict[str, list[Tree]], float]:
    """Return the trees of each teacher, and the denominator of the whole step.

    A row with several teachers is in the trees of each. The order of the teachers turns round from step to step, so
    that the last one of a step, which is in memory, is the first of the next.
    """
    trees: dict[str, list[Tree]] = {name: [] for name in (config.teachers if step % 2 else reversed(config.teachers))}
    for prompt, group in batch:
        for name in config.teachers_of(domain_of(prompt, config)):
            columns = {
                index: {"weights": config.teachers[name].weight * _weight(completion.num_tokens, config)}
                for index, completion in enumerate(group.completions)
            }
            trees[name].append(stored_tree(group, columns))
    lengths = [completion.num_tokens for _, group in batch for completion in group.completions]
    denominator = batch_denominator(config.objective.aggregation, lengths)
    return {name: of_teacher for name, of_teacher in trees.items() if of_teacher}, denominator


def _weight(length: int, config: DistillConfig) -> float:
    return token_weight(config.objective.aggregation, length=length, max_tokens=config.sampling.max_tokens)


def domain_of(prompt: Prompt, config: DistillConfig) -> str | None:
    """Return the domain that selects the teachers of a prompt, an empty text where its row has none; None without
    `domain_column`."""
    return None if config.domain_column is None else str(prompt.task.metadata.get(config.domain_column, ""))


def launch(config: DistillConfig, folder: Path, context: Context) -> dict[str, float]:
    """Read the prompts, start ranks and engines, and train into `folder`. Returns the last step's metrics."""
    model = resolve_model(config.model, workdir=folder, copy_fp8=True)
    tokenizer = load_tokenizer(model, config.model.chat_template)
    teachers = {name: resolve_model(teacher.model, workdir=folder) for name, teacher in config.teachers.items()}
    notes = refuse_other_tokens(model, tokenizer, teachers)
    prompts = teachable(config, tokenizer)
    refuse_repeats("prompts_per_step", config.prompts_per_step, len(prompts))
    gate = context.validation_gate
    suites = validation_suites(config, gate, tokenizer) if gate else None
    starts = (
        partial(
            start_rollout,
            model,
            config.rollout,
            dtype=config.model.dtype,
            seed=config.seed,
            stop_token_ids=turn_ends(tokenizer),
            with_routes=config.routing_replay == "rollout",
        ),
        partial(start_ranks, student_spec(config, model, teachers)),
    )
    with (
        start_all(*starts) as (rollout, policy),
        Report(folder, total_steps=config.steps, label="distill", report_to=context.report_to) as report,
    ):
        validates = config.validates if gate else lambda _: False
        checkpoints = Checkpoints(folder, config.checkpoint, policy, last_step=config.steps, is_candidate=validates)
        report.resume(checkpoints.restore())
        report_bad_rows(prompts.bad_rows, folder / "bad_rows.jsonl", report.note)
        for note in notes:
            report.note(note)
        alarms = Alarms(config, report.note)
        rows = read_metrics(folder)
        alarms.resume(rows)
        validation = None
        if gate and suites:
            validation = Validation(gate, suites, rollout, checkpoints, folder / "validation", validates)
        text = chain.from_iterable(prompt.token_ids for prompt in prompts)
        probe = probe_sequences(len(tokenizer), max_model_len=config.rollout.max_model_len, text=text)
        fleet = DistillFleet(policy=policy, rollout=rollout, checkpoints=checkpoints, config=config, probe=probe)
        fleet.resume(rows)
        run(config, prompts, fleet, report, alarms, validation.figures if validation else lambda _: {})
    return report.last_metrics


def check(config: DistillConfig) -> None:
    """Raise ValueError for a chat template or source that does not exist."""
    check_template(config.model)
    check_files(config.prompts.source)


def refuse_other_tokens(student: Path, tokenizer: PreTrainedTokenizerFast, teachers: Mapping[str, Path]) -> list[str]:
    """Raise ValueError for a teacher to which the student's token ids mean other tokens, or that lacks some of them.

    Returns a note on each teacher whose chat template is another than the student's, which then writes the prompts.
    """
    own, notes = tokenizer.get_vocab(), list[str]()
    for name, folder in teachers.items():
        theirs = load_tokenizer(folder)
        where = f"teachers.{name}.model.path='{folder}'"
        if differing := sorted(own.items() ^ theirs.get_vocab().items(), key=lambda item: (item[1], item[0])):
            token, index = differing[0]
            raise ValueError(
                f"{where}: its tokenizer is not that of the student '{student}': {len(differing)} tokens differ, the "
                f"first is {token!r} with id {index}. Take a teacher with the student's tokenizer, or let the student "
                "learn the teacher's texts (stages `sample` and `sft`)"
            )
        if (rows := _vocab_size(folder)) < (needed := _vocab_size(student)):
            raise ValueError(
                f"{where}: its vocab_size={rows} is less than the student's {needed}; resize the teacher's embedding "
                "(model.resize_token_embeddings) and save it"
            )
        if theirs.chat_template != tokenizer.chat_template:
            notes.append(f"teacher '{name}' has another chat template than the student, whose prompts it reads")
    return notes


def teachable(config: DistillConfig, tokenizer: PreTrainedTokenizerFast) -> Prompts:
    """Load the prompts that have a teacher; the others are bad rows. Raises ValueError for too many of them."""
    prompts = Prompts.load(config.prompts.model_copy(update={"truth": None}), tokenizer, config.seed)
    domains = [domain_of(prompt, config) for prompt in prompts]
    problems = [
        None if config.teachers_of(domain) else f"{config.domain_column}={domain!r} is no teacher's domain"
        for domain in domains
    ]
    return prompts.without(problems, config.prompts.max_bad_share, "has no teacher")


def unjudged_samples(batch: Batch) -> list[Sample]:
    """Convert each completion of a step into a sample for the report, without a reward."""
    return [
        Sample(prompt.task.prompt, completion.text, completion.finish_reason, math.nan, {})
        for prompt, group in batch
        for completion in group.completions
    ]


def student_spec(config: DistillConfig, model: Path, teachers: Mapping[str, Path]) -> TrainSpec:
    """Return the specification of the student's ranks, which start from the checkpoint `model`."""
    return TrainSpec(
        model,
        config.model.dtype,
        config.trainer,
        config.optimizer,
        config.steps,
        chat_template=config.model.chat_template,
        objective=config.objective,
        teachers={name: FrozenModel(teachers[name], config.teachers[name].model.dtype) for name in teachers},
        routing_replay=config.routing_replay == "rollout",
    )


def _vocab_size(folder: Path) -> int:
    """Return the rows of a model's embedding."""
    settings = read_json(folder / "config.json", "restore the checkpoint")
    return (settings.get("text_config") or settings)["vocab_size"]
