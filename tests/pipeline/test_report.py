"""The record of a run: whole, exact, resumable, and safe to look at."""

import json
import math
import re
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.report import Report, Sample, StepLines, duration, read_metrics, sample_lines
from pipeline.report_html import axis_ticks, chart, thin, write_html
from rewards.types import Status, Verdict

RIGHT = {"math": Verdict(1.0)}
LATE = {"math": Verdict(None, Status.TIMEOUT, "5 s are over")}


def metrics_of(step: int) -> dict[str, float]:
    return {"reward/total/mean": step / 3, "loss/kl_mean": 1e-3 / step, "train/grad_norm": math.sqrt(step)}


def sample(prompt: str = "1+1=", completion: str = "2") -> Sample:
    return Sample(prompt, completion, "stop", 1.0, RIGHT)


def record(folder: Path, first: int, last: int) -> None:
    with Report(folder, total_steps=4, label="grpo") as report:
        report.resume(first - 1)
        for step in range(first, last + 1):
            report.step(step, metrics_of(step), [sample(f"{step}+1=")])


def test_every_digit_is_kept_and_readable_at_once(tmp_path: Path) -> None:
    with Report(tmp_path, total_steps=2, label="sft") as report:
        report.step(1, {"loss/nll_mean": 0.1 + 0.2, "eval/nll_mean": math.nan})
        [line] = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert line == '{"eval/nll_mean": null, "loss/nll_mean": 0.30000000000000004, "step": 1}'
    [row] = read_metrics(tmp_path)
    assert row["loss/nll_mean"] == 0.1 + 0.2 and math.isnan(row["eval/nll_mean"])


def test_a_killed_and_resumed_record_is_the_same_to_the_byte(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    record(whole, 1, 4)
    record(killed, 1, 3)
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"loss/kl_mean": 0.00')  # torn by kill -9
    record(killed, 3, 4)  # the newest checkpoint was of step 2
    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for folder in (killed, whole):
        assert [file.name for file in sorted((folder / "rollouts").iterdir())] == [
            f"step-{step:06d}.jsonl" for step in (1, 2, 3, 4)
        ]


def test_resume_drops_what_came_later(tmp_path: Path) -> None:
    record(tmp_path, 1, 4)
    with Report(tmp_path, total_steps=4, label="grpo") as report:
        report.resume(2)
        assert report.last_metrics == metrics_of(2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert len(list((tmp_path / "rollouts").iterdir())) == 2


def test_a_run_started_over_does_not_record_twice(tmp_path: Path) -> None:
    record(tmp_path, 1, 3)
    with Report(tmp_path, total_steps=4, label="grpo") as report:
        report.step(1, metrics_of(1))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]


def test_tensorboard_shows_each_step_once(tmp_path: Path) -> None:
    record(tmp_path, 1, 3)
    time.sleep(1.1)  # files of events are read in the order of their second; a killed run is resumed later than that
    record(tmp_path, 2, 4)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("reward/total/mean")
    assert [event.step for event in events] == [1, 2, 3, 4]
    assert events[3].value == pytest.approx(4 / 3)


def test_a_broken_line_in_the_middle_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not JSON"):
        read_metrics(tmp_path)


def test_what_was_reported_survives_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="rank"), Report(tmp_path, total_steps=2, label="grpo") as report:
        report.step(1, metrics_of(1))
        raise RuntimeError("a rank died")
    assert len(read_metrics(tmp_path)) == 1


def test_samples_of_the_first_groups(tmp_path: Path) -> None:
    left_out = Sample("p0", "\ud800 half a pair", "length", math.nan, LATE)
    groups = [[left_out, sample("p0")], *([sample(f"p{i}"), sample(f"p{i}")] for i in range(1, 6))]
    with Report(tmp_path, total_steps=2, label="grpo") as report:
        report.step(1, {}, [one for group in groups for one in group])
    kept = [json.loads(line) for line in (tmp_path / "rollouts" / "step-000001.jsonl").read_text().splitlines()]
    assert [one["prompt"] for one in kept] == ["p0", "p0", "p1", "p1", "p2", "p2", "p3", "p3"]
    assert kept[0] == {
        "prompt": "p0",
        "completion": "\ud800 half a pair",
        "finish_reason": "length",
        "reward": None,
        "verdicts": {"math": {"score": None, "status": "timeout", "outcome": "", "detail": "5 s are over"}},
    }


def test_console_lines_fit_and_stay_plain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phases = {f"time/{phase}_seconds": 123.4 for phase in ("generate", "reference", "train", "sync", "step")}
    figures = {
        **metrics_of(1),
        **phases,
        "reward/math/pass_rate": 0.375,
        "rollout/length/mean": 117.6,
        "mismatch/abs_max": 1.8e-5,
        "rollout/tokens_per_second": 2950.4,
        "not/shown": 1.0,
    }
    with Report(tmp_path, total_steps=100, label="grpo") as report:
        report.note("3 of 9 rows are bad: [bold]not JSON[/] :smile:\n  \x1b[2J")
        report.step(1, figures, [sample("p" * 200, "\x1b[2J\u202e" + "c" * 200)])
        report.step(2, figures)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 of 9 rows are bad: [bold]not JSON[/] :smile:"
    assert lines.pop(1) == "  \\x1b[2J"
    heading, first = (" ".join(line.split()) for line in lines[1:3])
    assert heading == "step reward math length kl mismatch grad gen ref train sync s/step tok/s left"
    assert first.startswith("1/100 0.333 38% 118 1.0e-03 1.8e-05 1.00 123.4 123.4 123.4 123.4 123.4 2950 ")
    assert len(lines) == 6 and lines[5].startswith("  2/100  0.333")
    assert all(len(line) <= 100 and line.isprintable() for line in lines)
    assert len(lines[1]) == len(lines[2])


def test_heading_comes_again_with_a_new_column_and_every_20_lines() -> None:
    lines = StepLines(100)
    counts = [len(lines.of(step, {"loss/nll_mean": 1.0})) for step in range(1, 22)]
    assert counts == [2] + [1] * 19 + [2]
    heading, _ = lines.of(22, {"loss/nll_mean": 1.0, "eval/nll_mean": 2.0})
    assert "held-out" in heading.plain
    [line] = lines.of(23, {"loss/nll_mean": 1.0})
    assert len(line) == len(heading)


def test_a_sample_in_two_lines() -> None:
    asked, judged = sample_lines(Sample("58+13=", "8+3=11;\n71", "stop", 0.5, RIGHT | {"late": LATE["math"]}))
    assert asked.plain == "  58+13=  ->  8+3=11;\\n71"
    assert judged.plain == "  reward 0.5 (math ok 1, late timeout), finish_reason stop"
    _, judged = sample_lines(Sample("58+13=", "", "length", math.nan, LATE))
    assert judged.plain == "  left out (math timeout), finish_reason length"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (192, "3m12s"), (7500, "2h05m"), (90000, "25h00m")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_html_is_self_contained_and_escaped(tmp_path: Path) -> None:
    attack = "</td><script>alert(1)</script>\ud800"
    with Report(tmp_path, total_steps=2, label="grpo") as report:
        for step in (1, 2):
            report.step(step, metrics_of(step), [Sample(attack, attack, "length", math.nan, LATE)])
    (tmp_path / "config.json").write_text('{"a": "<b>"}')
    write_html(tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page and "&lt;b&gt;" in page
    assert not re.search(r"https?://|src=|@import|url\(", page)
    assert "left out" in page and "math timeout: 5 s are over" in page
    assert page.count("<svg") == 3  # reward, divergence, gradient norm
    assert "reward/total/mean, step 2: 0.666667" in page


def test_html_of_an_empty_stage(tmp_path: Path) -> None:
    write_html(tmp_path)
    assert "<h1>" in (tmp_path / "report.html").read_text()


def test_chart_places_points_by_hand() -> None:
    # 440 x 190 with margins 58, 8 (right), 8 (top), 22: x from 58 to 432, y from 8 (value 10) to 168 (value 0).
    drawn = chart("t", {"a": [(1.0, 0.0), (2.0, 5.0), (3.0, 10.0)]})
    assert 'points="58.0,168.0 245.0,88.0 432.0,8.0"' in drawn


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 10.0, [0, 5, 10]),
        (0.31, 0.9, [0.2, 0.4, 0.6, 0.8, 1.0]),
        (3.0, 3.0, [1, 2, 3, 4, 5]),
        (0, 0, [-0.5, 0, 0.5]),
    ],
)
def test_axis_ticks(low: float, high: float, ticks: list[float]) -> None:
    assert axis_ticks(low, high) == pytest.approx(ticks)


def test_long_curves_are_thinned_to_means() -> None:
    thinned = thin([(float(step), float(step)) for step in range(1, 401)])
    assert len(thinned) == 200
    assert thinned[0] == (1.5, 1.5) and thinned[-1] == (399.5, 399.5)
