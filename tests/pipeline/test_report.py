"""The record of a run: whole, exact, resumable, and safe to look at."""

import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.reports import report as report_module
from pipeline.reports.charts import area_chart, axis_ticks, line_chart, sparkline, thin
from pipeline.reports.page import tag
from pipeline.reports.recipe_page import write_recipe_html
from pipeline.reports.report import Report, Sample, StepLines, duration, read_metrics, sample_lines
from pipeline.reports.shapes import Interval, forest, heat_map
from pipeline.reports.stage_page import write_html
from rewards.types import Status, Verdict
from tests.pipeline.report_run import make_run

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
    assert page.count("<script") == 1 and "&lt;script&gt;alert(1)" in page and "&lt;b&gt;" in page
    assert not re.search(r"https?://|src=|@import|url\(", page)
    assert "not judged" in page and "math timeout (5 s are over)" in page
    assert page.count('class="plot"') == 3  # reward, divergence, gradient norm
    assert ">total <b>0.667</b>" in page


def test_html_of_an_empty_stage(tmp_path: Path) -> None:
    write_html(tmp_path)
    assert "<h1>" in (tmp_path / "report.html").read_text()


def test_chart_places_points_by_hand() -> None:
    # 360 x 170 with margins 44, 8 (right), 8 (top), 20: x from 44 to 352, y from 8 (value 10) to 150 (value 0).
    drawn = line_chart("t", {"a": [(1.0, 0.0), (2.0, 5.0), (3.0, 10.0)]})
    assert 'points="44.0,150.0 198.0,79.0 352.0,8.0"' in drawn


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 10.0, [0, 5, 10]),
        (0.31, 0.9, [0.2, 0.4, 0.6, 0.8, 1.0]),
        (3.0, 3.0, [1, 2, 3, 4, 5]),
        (0, 0, [0, 0.5, 1]),
        (-2.0, -2.0, [-3, -2.5, -2, -1.5, -1]),
    ],
)
def test_axis_ticks(low: float, high: float, ticks: list[float]) -> None:
    assert axis_ticks(low, high) == pytest.approx(ticks)


def test_long_curves_are_thinned_to_means() -> None:
    thinned = thin([(float(step), float(step)) for step in range(1, 401)])
    assert len(thinned) == 200
    assert thinned[0] == (1.5, 1.5) and thinned[-1] == (399.5, 399.5)


def test_areas_stand_upon_each_other() -> None:
    drawn = area_chart("t", {"a": [(1.0, 2.0), (3.0, 4.0)], "b": [(1.0, 8.0), (3.0, 6.0)]})
    # y from 150 (0) to 8 (10): the upper edge from left to right, then the lower one back.
    assert 'points="44.0,121.6 352.0,93.2 352.0,150.0 44.0,150.0"' in drawn
    assert 'points="44.0,8.0 352.0,8.0 352.0,93.2 44.0,121.6"' in drawn
    assert "a <b>30%</b>" in drawn and "b <b>70%</b>" in drawn


def test_a_small_curve_of_one_value_is_drawn() -> None:
    assert 'points="3.0,32.0"' in sparkline([(5.0, 1.0)], "t")


def test_nothing_but_tag_makes_markup() -> None:
    made = tag("p", "<b>", tag("b", '"&'), ["x", 3, ("<", tag("i"))], title="\"'<>&", class_="a", data_x=None)
    assert made == ('<p title="&quot;&#x27;&lt;&gt;&amp;" class="a">&lt;b&gt;<b>&quot;&amp;</b>x3&lt;<i></i></p>')


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("a\u202eb", "a\\u202eb"),
        ("\ud800", "\\ud800"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\n\tb \u3000\u4e2d", "a\n\tb \u3000\u4e2d"),
    ],
)
def test_what_would_not_be_seen_is_written_out(raw: str, shown: str) -> None:
    assert tag("p", raw) == f"<p>{shown}</p>"


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
        for step, (said, reward) in enumerate([("41", 0.0), ("dunno", 0.0), ("42", 1.0)], start=1):
            report.step(step, {}, [Sample("40+2=", said, "stop", reward, RIGHT), sample(f"{step}+1=")])
    write_html(tmp_path)
    page = (tmp_path / "report.html").read_text()
    first, second = page.index(">step 1 · <b>0</b>"), page.index(">step 3 · <b>1</b>")
    assert page.index("Before and after") < first < second < page.index("Best and worst of step 3")
    assert "dunno" not in page[first:second]


def test_the_conductor_can_write_the_page_of_a_run_without_torch(tmp_path: Path) -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'ray', 'vllm'}"
    code = f"import sys, pipeline.reports.recipe_page; assert not {heavy} & sys.modules.keys(), sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_run_without_a_record_is_shown_in_the_order_it_was_begun_in(tmp_path: Path) -> None:
    run = make_run(tmp_path / "made_up", steps=3)
    (run / "run.json").unlink()
    write_recipe_html(run)
    page = (run / "report.html").read_text()
    names = ("sft", "pairs", "rm_helpful", "reason", "gate_reason", "prefer")
    places = [page.index(f"<title>{name}: ") for name in names]
    assert places == sorted(places) and "<title>eval: " not in page


def test_what_improved_is_the_first_and_the_last_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "made_up", steps=3)
    write_recipe_html(run)
    page = (run / "report.html").read_text()
    row = "<td>sums/pass@1_greedy</td>" + "".join(f'<td class="number">{cell}</td>' for cell in ("0.5", "0.8", "+0.3"))
    assert row + "<td>0.74 to 0.85</td>" in page
    assert "Of 10 greedy answers to the same prompts, 3 scored higher and 0 lower" in page


def test_the_interval_of_a_gate_is_drawn_by_hand(tmp_path: Path) -> None:
    drawn = forest("t", [Interval("a", 0.3, 0.2, 0.4, 0.1, "good")], zero=True)
    # Ticks from 0 to 0.4 over x from 14 to 346: 0.2 at 180, 0.3 at 263, the bound 0.1 at 97.
    assert 'class="stem kgood" x1="180" x2="346"' in drawn
    assert 'cx="263"' in drawn and 'stroke-dasharray="3 3" x1="97" x2="97"' in drawn


def test_what_was_dropped_is_counted_by_reason(tmp_path: Path) -> None:
    run = make_run(tmp_path / "made_up", steps=3)
    write_html(run / "pairs")
    page = (run / "pairs" / "report.html").read_text()
    for said in ("kept <b>8 (15.7%)", "share of its domain <b>40 (78.4%)", "near-duplicate <b>3 (5.9%)"):
        assert said in page
    assert "Prompts of sums" in page and "in pairs <b>51 (85.0%)" in page and "all right <b>9 (15.0%)" in page
    assert "best of 2 · sums · math" in page and "worst of 2 · sums · math" in page


def test_a_heat_map_by_hand() -> None:
    """Four experts, a cell each: none, half of the mean, one and a half, three times it."""
    drawn = heat_map("t", {"layer 1": [0, 0.5, 1.0, 1.5], "layer 2": [3.0, 0.5, 0.5, 0]})
    paths = dict(re.findall(r'<path d="([^"]+)" class="bar [^"]+"(?: fill-opacity="([^"]+)")?>', drawn))
    cells = {shade: path.count("M") for path, shade in paths.items() if path != "M0 0h24v10h-24z"}
    assert cells == {"": 2, "0.3125": 3, "0.5625": 1, "0.8125": 1, "0.9375": 1}
    assert "M56.00 0h76.00" in drawn and "M208.00 14h76.00" in drawn  # the first and the third of four columns
    assert drawn.index("layer 1") < drawn.index("layer 2")


def test_the_load_of_experts_is_on_the_page_of_the_newest_step(tmp_path: Path) -> None:
    asked: list[int] = []

    def expert_load() -> dict[str, list[int]]:
        asked.append(1)
        return {"model.layers.3.mlp.gate": [7, 0, 5, 4]}

    with Report(tmp_path, total_steps=20, label="sft") as report:
        for step in range(1, 21):
            report.step(step, metrics_of(step), expert_load=expert_load)
    page = (tmp_path / "report.html").read_text()
    assert "layer 3" in page and "in step 20," in page
    assert len(asked) < 20  # not at every step, but at the last
    with Report(tmp_path, total_steps=20, label="sft") as report:
        report.resume(10)
    assert not (tmp_path / "expert_load.json").exists()
