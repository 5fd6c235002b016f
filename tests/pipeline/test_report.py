"""The record of a run: whole, exact, resumable, and safe to look at."""

import json
import math
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import rich
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.gates.decision import read_decision, write_decision
from pipeline.reports import report as report_module
from pipeline.reports.curves import headline
from pipeline.reports.files import duration, read_metrics
from pipeline.reports.recipe_page import FigureChange
from pipeline.reports.report import Report, Sample, StepLines, sample_lines
from rewards.types import Status, Verdict
from tests.pipeline.report_run import STAGES, make_run, write_run_page, write_stage_page

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
        report.step(1, {}, [sample for group in groups for sample in group])
    records = [json.loads(line) for line in (tmp_path / "rollouts" / "step-000001.jsonl").read_text().splitlines()]
    assert [record["prompt"] for record in records] == ["p0", "p0", "p1", "p1", "p2", "p2", "p3", "p3"]
    assert records[0] == {
        "prompt": "p0",
        "completion": "\ud800 half a pair",
        "finish_reason": "length",
        "reward": None,
        "verdicts": {"math": {"score": None, "status": "timeout", "outcome": "", "detail": "5 s are over"}},
    }


def test_console_lines_fit_and_stay_plain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rich.get_console(), "width", 100)
    phases = {f"time/{phase}_seconds": 123.4 for phase in ("generate", "reference", "train", "sync", "step")}
    figures = {
        **metrics_of(1),
        **phases,
        "reward/math/mean": 0.375,
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
    assert first.startswith("1/100 0.333 0.38 118 1.0e-03 1.8e-05 1.00 123.4 123.4 123.4 123.4 123.4 2950 ")
    assert len(lines) == 6 and lines[5].startswith("  2/100  0.333")
    assert all(len(line) <= 100 and line.isprintable() for line in lines)
    assert len(lines[1]) == len(lines[2])


def test_heading_comes_again_with_a_new_column_and_every_20_lines() -> None:
    lines = StepLines(100)
    counts = [len(lines.lines(step, {"loss/nll_mean": 1.0})) for step in range(1, 22)]
    assert counts == [2] + [1] * 19 + [2]
    heading, _ = lines.lines(22, {"loss/nll_mean": 1.0, "eval/nll_mean": 2.0})
    assert "held-out" in heading.plain
    [line] = lines.lines(23, {"loss/nll_mean": 1.0})
    assert len(line) == len(heading)


def test_a_sample_in_two_lines() -> None:
    texts, judged = sample_lines(Sample("58+13=", "8+3=11;\n71", "stop", 0.5, RIGHT | {"late": LATE["math"]}))
    assert texts.plain == "  58+13=  ->  8+3=11;\\n71"
    assert judged.plain == "  reward 0.5 (math ok 1, late timeout), finish_reason stop"
    _, judged = sample_lines(Sample("58+13=", "", "length", math.nan, LATE))
    assert judged.plain == "  left out (math timeout), finish_reason length"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (192, "3m12s"), (7500, "2h05m"), (90000, "25h00m")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def page_of_steps(folder: Path, rows: list[dict[str, float]]) -> str:
    lines = [json.dumps({"step": step, **row}) + "\n" for step, row in enumerate(rows, start=1)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return write_stage_page(folder)


def test_html_is_self_contained_and_escaped(tmp_path: Path) -> None:
    attack = "</td><script>alert(1)</script>\ud800"
    with Report(tmp_path, total_steps=2, label="grpo") as report:
        for step in (1, 2):
            report.step(step, metrics_of(step), [Sample(attack, attack, "length", math.nan, LATE)])
    (tmp_path / "config.json").write_text('{"a": "<b>"}')
    page = write_stage_page(tmp_path)
    assert page.count("<script") == 1 and "&lt;script&gt;alert(1)" in page and "&lt;b&gt;" in page
    assert not re.search(r"https?://|src=|@import|url\(", page)
    assert "not judged" in page and "math timeout (5 s are over)" in page
    assert page.count('class="plot"') == 3  # reward, divergence, gradient norm
    assert ">total <b>0.667</b>" in page


def test_html_of_an_empty_stage(tmp_path: Path) -> None:
    assert "<h1>" in write_stage_page(tmp_path)


def test_the_same_files_give_the_same_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "made_up", steps=3)
    assert write_stage_page(run / "reason") == write_stage_page(run / "reason")


def test_chart_places_points_by_hand(tmp_path: Path) -> None:
    # 360 x 170 with margins 44, 8 (right), 8 (top), 20: x from 44 to 352, y from 8 (value 10) to 150 (value 0).
    page = page_of_steps(tmp_path, [{"loss/nll_mean": value} for value in (0.0, 5.0, 10.0)])
    assert 'points="44.0,150.0 198.0,79.0 352.0,8.0"' in page


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 10.0, "0 5 10"),
        (0.31, 0.9, "0.2 0.4 0.6 0.8 1"),
        (3.0, 3.0, "1 2 3 4 5"),
        (0.0, 0.0, "0 0.5 1"),
        (-2.0, -2.0, "-3 -2.5 -2 -1.5 -1"),
    ],
)
def test_axes_have_round_numbers(tmp_path: Path, low: float, high: float, ticks: str) -> None:
    page = page_of_steps(tmp_path, [{"loss/nll_mean": low}, {"loss/nll_mean": high}])
    assert re.findall(r'dy="4" text-anchor="end">([^<]+)<', page) == ticks.split()


def test_long_curves_are_thinned_to_means(tmp_path: Path) -> None:
    page = page_of_steps(tmp_path, [{"loss/nll_mean": float(step)} for step in range(1, 401)])
    points = re.findall(r'points="([^"]+)"', page)[0].split()
    # The first of 200 means lies at step 1.5 of 1 to 400, and at 1.5 on an axis from 0 to 400.
    assert len(points) == 200 and points[0] == f"{44 + 308 * 0.5 / 399:.1f},{150 - 142 * 1.5 / 400:.1f}"


def test_a_curve_of_one_value_is_a_dot(tmp_path: Path) -> None:
    assert '<circle class="dot s0" cx="44.0"' in page_of_steps(tmp_path, [{"loss/nll_mean": 1.0}])


def test_time_is_shared_out_by_phase(tmp_path: Path) -> None:
    rows = [{"time/generate_seconds": 2.0, "time/train_seconds": 7.0, "time/step_seconds": 10.0}] * 2
    page = page_of_steps(tmp_path, rows)
    for share in ("generate <b>4 (20.0%)", "train <b>14 (70.0%)", "other <b>2 (10.0%)"):
        assert share in page
    assert 'style="width:70.00%"' in page


def test_an_outcome_that_a_step_lacks_is_a_share_of_zero(tmp_path: Path) -> None:
    rows = [{"reward/math/mean": 1.0, "reward/math/outcome/right_rate": 1.0}]
    rows += [{"reward/math/mean": 0.0, "reward/math/outcome/wrong_rate": 1.0}]
    page = page_of_steps(tmp_path, rows)
    assert "Outcomes of math" in page
    for outcome, points in {"right": "44.0,8.0 352.0,150.0", "wrong": "44.0,150.0 352.0,8.0"}.items():
        assert f'data-name="{outcome}" points="{points}"' in page


@pytest.mark.parametrize(
    ("raw", "visible"),
    [
        ("a\u202eb", "a\\u202eb"),
        ("\ud800", "\\ud800"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\n\tb \u3000\u4e2d", "a\n\tb \u3000\u4e2d"),
        ("\"'<>&", "&#34;&#39;&lt;&gt;&amp;"),
    ],
)
def test_invisible_characters_are_written_out(tmp_path: Path, raw: str, visible: str) -> None:
    with Report(tmp_path, total_steps=1, label="grpo") as report:
        report.step(1, {}, [sample(raw)])
    assert f'long">{visible}</div>' in write_stage_page(tmp_path)


def test_the_page_costs_a_hundredth_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a second, pages that take two: one page in the first steps, the next not before 200 s are over."""
    clock = [1000.0]
    written: list[float] = []

    def slow(_: Path) -> None:
        written.append(clock[0])
        clock[0] += 2.0

    monkeypatch.setattr(report_module, "write_html", slow)
    monkeypatch.setattr(report_module.time, "monotonic", lambda: clock[0])
    with Report(tmp_path, total_steps=500, label="grpo") as report:
        for step in range(1, 500):
            report.step(step, {})
            clock[0] += 1.0
    assert len(written) == 3 and written[1] - written[0] >= 200


def test_answers_before_and_after_are_told_apart(tmp_path: Path) -> None:
    with Report(tmp_path, total_steps=3, label="grpo") as report:
        for step, (answer, reward) in enumerate([("41", 0.0), ("dunno", 0.0), ("42", 1.0)], start=1):
            report.step(step, {}, [Sample("40+2=", answer, "stop", reward, RIGHT), sample(f"{step}+1=")])
    page = write_stage_page(tmp_path)
    first, second = page.index(">step 1 · <b>0</b>"), page.index(">step 3 · <b>1</b>")
    assert page.index("Before and after") < first < second < page.index("Best and worst of step 3")
    assert "dunno" not in page[first:second]


def test_the_conductor_can_write_the_page_of_a_run_without_torch(tmp_path: Path) -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'ray', 'vllm'}"
    code = f"import sys, pipeline.reports.recipe_page; assert not {heavy} & sys.modules.keys(), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_page_of_a_run_shows_its_stages_in_the_recipes_order(tmp_path: Path) -> None:
    page = write_run_page(make_run(tmp_path / "made_up", steps=3))
    stages = page[page.index('class="stages"') : page.index("</ol>")]
    assert re.findall(r"<li>\s*(?:<a [^>]+>)?(\w+)", stages) == list(STAGES)
    assert "grpo · from gate_reason, rm_helpful · " in stages
    assert "promote: sums/pass@1_greedy holds" in stages and "eval · from prefer · waits for prefer" in stages
    assert page.count('<span class="pill good">done</span>') == 5


def test_before_and_after_tells_better_from_worse_and_names_the_rules(tmp_path: Path) -> None:
    page = write_run_page(make_run(tmp_path / "made_up", steps=3))
    row = '<td>sums/pass@1_greedy</td><td class="number">0.5</td><td class="number">0.8</td>'
    row += '<td class="number good">+0.3</td><td class="good">\u25b2 better</td><td>0.74 to 0.85</td>'
    assert row + "<td>gate_reason: holds" in page and "What improved" not in page
    assert "Of 10 greedy answers to the same prompts, 3 scored higher and 0 lower" in page


@pytest.mark.parametrize(
    ("figure", "first", "last", "interval", "direction"),
    [
        ("sums/pass@1", 0.5, 0.8, (0.7, 0.9), "better"),
        ("sums/pass@1", 0.8, 0.5, (0.4, 0.6), "worse"),
        ("sums/pass@1", 0.55, 0.5, (0.4, 0.6), "same"),  # it may be chance
        ("prose/bits_per_byte", 1.1, 1.3, (None, None), "worse"),
        ("prose/bits_per_byte", 1.3, 1.1, (None, None), "better"),
        ("sums/truncated_rate", 0.0, 0.0, (None, None), "same"),
    ],
)
def test_a_change_is_better_or_worse_by_the_direction_of_its_figure(
    figure: str, first: float, last: float, interval: tuple[float | None, float | None], direction: str
) -> None:
    assert FigureChange(figure, first, last, *interval, rules=[]).direction == direction


def test_a_persons_decision_is_told_from_that_of_the_rules(tmp_path: Path) -> None:
    run = make_run(tmp_path / "made_up", steps=3)
    gate = run / "gate_reason"
    decision = read_decision(gate)
    assert decision is not None
    write_decision(gate, replace(decision, decided_by="user", note="3 of 20 is chance"))
    page = write_run_page(run)
    assert "promote, decided by a person: sums/pass@1_greedy holds" in page
    assert '<span class="pill busy">promote, decided by a person</span>' in page
    assert '<span class="pill good">promote</span>' not in page
    assert "3 of 20 is chance" in write_stage_page(gate)


def test_a_figure_that_was_measured_once_has_no_start(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss/nll_mean": 2.0}, {"step": 2, "loss/nll_mean": 1.0, "eval/nll_mean": 1.5}]
    assert headline(rows) == [("held-out loss", None, 1.5), ("loss", 2.0, 1.0)]


def test_the_interval_of_a_gate_is_drawn_by_hand(tmp_path: Path) -> None:
    page = write_stage_page(make_run(tmp_path / "made_up", steps=3) / "gate_reason")
    # The interval 0.21 to 0.38 around 0.3 with the bound 0.02, on an axis from 0 (at 4 %) to 0.4 (at 96 %).
    assert '<line class="stem good" x1="52.30%" x2="91.40%"' in page
    assert '<circle class="dot good" cx="73.00%"' in page and 'stroke-dasharray="3 3" x1="8.60%" x2="8.60%"' in page


def test_the_calibration_of_a_reward_model_is_on_its_page(tmp_path: Path) -> None:
    page = write_stage_page(make_run(tmp_path / "made_up", steps=3) / "rm_helpful")
    assert "Calibration" in page and "50% to 55% sure" in page and "51% right of 120 pairs" in page


def test_what_was_dropped_is_counted_by_reason(tmp_path: Path) -> None:
    page = write_stage_page(make_run(tmp_path / "made_up", steps=3) / "pairs")
    for share in ("kept <b>8 (15.7%)", "share of its domain <b>40 (78.4%)", "near-duplicate <b>3 (5.9%)"):
        assert share in page
    assert "Prompts of sums" in page and "in pairs <b>51 (85.0%)" in page and "all right <b>9 (15.0%)" in page
    assert "best of 2 · sums · math" in page and "worst of 2 · sums · math" in page


def test_the_load_of_experts_is_on_the_page_of_the_newest_step(tmp_path: Path) -> None:
    due: list[int] = []
    with Report(tmp_path, total_steps=20, label="sft") as report:
        for step in range(1, 21):
            load = {"model.layers.3.mlp.gate": [7, 0, 5, 4]} if report.page_due(step) else None
            report.step(step, metrics_of(step), expert_load=load)
            due += [step] * (load is not None)
    page = (tmp_path / "report.html").read_text()
    # Four experts, a mean of 4: the line from 0 to 7/4 with its dot at the median 4.5/4, on an axis from 0 to 2.
    assert "layer 3" in page and "in step 20," in page and "1.75 at most, 1 of 4 without a token" in page
    assert '<line class="stem bad" x1="4.00%" x2="84.50%"' in page and 'cx="55.75%"' in page
    assert due == [1, 20]  # no call to a rank in the steps between
    with Report(tmp_path, total_steps=20, label="sft") as report:
        report.resume(10)
    assert not (tmp_path / "expert_load.json").exists()
