"""Supervised fine-tuning: masked cross-entropy on packed conversations (DeepSeek-V2 section 4.1)."""

from configs.sft import SFTConfig
from pipeline.data.conversations import Conversations, Example
from pipeline.data.trees import Tree
from pipeline.reports.report import Report
from pipeline.reports.stopwatch import Stopwatch
from pipeline.train.checkpoints import Checkpoints
from pipeline.train.worker import Policy


def run(
    config: SFTConfig,
    steps: int,
    data: Conversations,
    held_out: Conversations | None,
    policy: Policy,
    checkpoints: Checkpoints,
    report: Report,
) -> None:
    """One optimizer step a batch of conversations; the loss is the mean over the batch's trained tokens."""
    watch = Stopwatch()
    for step in range(checkpoints.step + 1, steps + 1):
        trees = [_tree(example) for example in data.take(step, config.conversations_per_step)]
        with watch("train"):
            metrics = policy.update(policy.shard(trees), _trained_tokens(trees))
        due = config.eval_every_steps and step % config.eval_every_steps == 0
        if held_out is not None and (due or step == steps):
            with watch("eval"):
                trees = [_tree(held_out[i]) for i in range(len(held_out))]
                metrics |= policy.evaluate(policy.shard(trees))
        report.step(step, metrics | watch.lap(), expert_load=policy.expert_load() if report.page_due(step) else None)
        checkpoints.done(step, last=step == steps)


def _tree(example: Example) -> Tree:
    return Tree(example.token_ids, root_mask=example.loss_mask)


def _trained_tokens(trees: list[Tree]) -> float:
    return float(sum(sum(tree.root_mask or []) for tree in trees))
