"""Columns of the console: each says what it counts, and a narrow terminal says what it leaves out."""

from pipeline.reports.report import StepLines


def test_a_rewards_column_is_its_mean_score_under_its_whole_name() -> None:
    row = {"reward/total/mean": 0.5, "reward/format_reward/mean": 0.19, "reward/format_reward/pass_rate": 0.0}
    heading, line = StepLines(9).lines(1, row)
    assert "format_reward" in heading.plain and "0.19" in line.plain and "0%" not in line.plain


def test_a_narrow_terminal_leaves_columns_out_and_says_which() -> None:
    row = dict.fromkeys(("reward/total/mean", "reward/math/mean", "loss/kl_mean", "rollout/length/mean"), 0.5)
    row |= dict.fromkeys(("train/grad_norm", "train/learning_rate", "mismatch/abs_max", "rollout/entropy_mean"), 0.5)
    row |= {f"time/{phase}_seconds": 1.0 for phase in ("generate", "reference", "train", "sync", "step")}
    lines = StepLines(100, width=80)
    note, heading, line = lines.lines(1, row)
    assert len(heading) <= 80 and len(line) == len(heading) and "math" in heading.plain
    assert "lr" in note.plain and " lr" not in heading.plain and "metrics.jsonl" in note.plain
    assert len(lines.lines(2, row)) == 1
    heading, _ = StepLines(100).lines(1, row)
    assert " lr" in heading.plain
