"""Supervised fine-tuning: masked cross-entropy on packed conversations (DeepSeek-V2 section 4.1)."""

from pathlib import Path

from configs.sft import SFTConfig
from configs.train import num_steps
from pipeline.cluster.start import start_all, start_ranks
from pipeline.data.conversations import Conversations, Example
from pipeline.data.order import refuse_repeats
from pipeline.data.rows import check_files, report_bad_rows
from pipeline.data.trees import Tree
from pipeline.models.tokenizer import load_tokenizer
from pipeline.reports.report import Report
from pipeline.reports.stopwatch import Stopwatch
from pipeline.stages.context import Context
from pipeline.train.checkpoints import Checkpoints
from pipeline.train.spec import TrainSpec
from pipeline.train.worker import TrainingRanks
from pipeline.weights.resolve import check_adapters, check_template, resolve_model


def run(
    config: SFTConfig,
    steps: int,
    data: Conversations,
    held_out: Conversations | None,
    ranks: TrainingRanks,
    checkpoints: Checkpoints,
    report: Report,
) -> None:
    """Do one optimizer step for each batch of conversations; the loss is the mean over the batch's trained tokens."""
    watch = Stopwatch()
    for step in range(checkpoints.step + 1, steps + 1):
        trees = [_tree(example) for example in data.take(step, config.conversations_per_step)]
        with watch("train"):
            metrics = ranks.update(ranks.shard(trees), _trained_tokens(trees))
        eval_due = config.eval_every_steps and step % config.eval_every_steps == 0
        if held_out is not None and (eval_due or step == steps):
            with watch("eval"):
                trees = [_tree(held_out[i]) for i in range(len(held_out))]
                metrics |= ranks.evaluate(ranks.shard(trees))
        report.step(step, metrics | watch.lap(), expert_load=ranks.expert_load() if report.page_due(step) else None)
        checkpoints.write(step)
        checkpoints.done(step)


def launch(config: SFTConfig, folder: Path, context: Context) -> dict[str, float]:
    """Read the conversations, start the ranks, and train into `folder`. Returns the last step's metrics."""
    model = resolve_model(config.model, workdir=folder)
    tokenizer = load_tokenizer(model, config.model.chat_template)
    data = Conversations.load(config.data, tokenizer, folder / "data", config.seed)
    refuse_repeats("conversations_per_step", config.conversations_per_step, len(data))
    held_out = None
    if config.eval_data is not None:
        held_out = Conversations.load(config.eval_data, tokenizer, folder / "data", config.seed)
        if len(held_out) < config.trainer.num_ranks:
            raise ValueError(f"eval_data has {len(held_out)} rows for trainer.num_ranks={config.trainer.num_ranks}")
    steps = num_steps(config.steps, config.epochs, rows=len(data), rows_per_step=config.conversations_per_step)
    spec = TrainSpec(
        model,
        config.model.dtype,
        config.trainer,
        config.optimizer,
        steps,
        chat_template=config.model.chat_template,
        lora=config.lora,
        balance=config.balance,
        mtp=config.mtp,
    )
    with (
        start_all(lambda: start_ranks(spec)) as (ranks,),
        Report(folder, total_steps=steps, label="sft", report_to=context.report_to) as report,
    ):
        checkpoints = Checkpoints(folder, config.checkpoint, ranks, last_step=steps)
        report.resume(checkpoints.restore())
        report_bad_rows(data.bad_rows, folder / "bad_rows.jsonl", report.note)
        if held_out is not None:
            report_bad_rows(held_out.bad_rows, folder / "eval_bad_rows.jsonl", report.note)
        run(config, steps, data, held_out, ranks, checkpoints, report)
    return report.last_metrics


def check(config: SFTConfig) -> None:
    """Raise ValueError for a chat template or source that does not exist, and for adapters that don't fit."""
    check_template(config.model)
    check_adapters(config.lora)
    for data in (config.data, config.eval_data):
        if data is not None:
            check_files(data.source)


def _tree(example: Example) -> Tree:
    return Tree(example.token_ids, root_mask=example.loss_mask)


def _trained_tokens(trees: list[Tree]) -> float:
    return float(sum(sum(tree.root_mask or []) for tree in trees))
