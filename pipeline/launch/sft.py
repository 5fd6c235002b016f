"""Supervised fine-tuning, put together: data, ranks, report."""

from pathlib import Path

from configs.sft import SFTConfig
from configs.stages import Recipe
from configs.train import num_steps
from pipeline.cluster.start import start_all, start_policy
from pipeline.data.conversations import Conversations
from pipeline.data.order import refuse_repeats
from pipeline.data.rows import report_bad_rows, source_files
from pipeline.models.tokenizer import load_tokenizer
from pipeline.reports.report import Report
from pipeline.stages import sft
from pipeline.train.checkpoints import Checkpoints
from pipeline.train.spec import TrainSpec
from pipeline.weights.resolve import check_template, resolve_model


def check(config: SFTConfig) -> None:
    """Raise ValueError for a template or source that isn't there."""
    check_template(config.model)
    for data in (config.data, config.eval_data):
        if data is not None:
            source_files(data.source)


def launch(config: SFTConfig, folder: Path, recipe: Recipe | None) -> dict[str, float]:
    """Train into `folder`; the last step's metrics."""
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
        balance=config.balance,
        mtp=config.mtp,
    )
    with start_all(lambda: start_policy(spec)) as (policy,), Report(folder, total_steps=steps, label="sft") as report:
        checkpoints = Checkpoints(folder, config.checkpoint, policy)
        report.resume(checkpoints.restore())
        report_bad_rows(data.bad_rows, folder / "bad_rows.jsonl", report.note)
        if held_out is not None:
            report_bad_rows(held_out.bad_rows, folder / "eval_bad_rows.jsonl", report.note)
        sft.run(config, steps, data, held_out, policy, checkpoints, report)
    return report.last_metrics
