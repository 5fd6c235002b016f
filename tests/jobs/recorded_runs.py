"""Folders of runs as the report writes them, without engines or ranks: for tests of the verbs that look at runs."""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from configs.load import load_config
from configs.stages import Recipe
from pipeline.disk.lock import locked
from pipeline.disk.run_record import RunRecord, StageRecord, State
from pipeline.reports.report import Report, Sample
from rewards.types import Status, Verdict

SMALL = Path(__file__).parents[1] / "pipeline" / "small.yaml"
HOSTILE = "\x1b[2J\x1b]0;owned\x07\u202e<script>document.title='owned'</script>"


def steady(step: int) -> float:
    return 0.02 * step


def samples_of(step: int) -> list[Sample]:
    """Samples of two prompts: a right answer, a wrong one and one that was not judged."""
    late = {"math": Verdict(None, Status.TIMEOUT, "5 s are over")}
    right, wrong = {"math": Verdict(1.0, outcome="right")}, {"math": Verdict(0.0, outcome="wrong")}
    return [
        sample
        for prompt in (f"{step}+1=", f"{step}+2=")
        for sample in (
            Sample(prompt, f"{step + 1} is right", "stop", 1.0, right),
            Sample(prompt, f"wrong {HOSTILE}", "stop", 0.0, wrong),
            Sample(prompt, "long " * 20, "length", math.nan, late),
        )
    ]


def record_steps(
    folder: Path, first: int, last: int, reward: Callable[[int], float] = steady, samples: bool = True
) -> None:
    """Report the steps of a GRPO stage of 20 steps, as its driver does."""
    with Report(folder, total_steps=20, label="grpo") as report:
        report.resume(first - 1)
        for step in range(first, last + 1):
            noise = 1 + 0.01 * math.sin(7 * step)
            figures = {
                "reward/total/mean": reward(step),
                "reward/math/mean": reward(step),
                "rollout/length/mean": 17 * noise,
                "rollout/entropy_mean": noise,
                "time/train_seconds": noise,
                "time/step_seconds": 2 * noise,
            }
            report.step(step, figures, samples_of(step) if samples else [])


def recorded_run(
    folder: Path,
    overrides: Sequence[str] = (),
    *,
    steps: int = 20,
    reward: Callable[[int], float] = steady,
    state: str = "done",
    samples: bool = True,
) -> Path:
    """A run of tests/pipeline/small.yaml: `sft` done and reused, `grpo` after so many steps."""
    recipe = load_config(str(SMALL), [f"name={folder.name}", f"runs_dir={folder.parent}", *overrides], Recipe).config
    for name, stage in recipe.stages.items():
        (folder / name).mkdir(parents=True)
        lineage = {"stage": name, "type": stage.type, "created": "2026-01-01T00:00:00+00:00", "versions": {"a": "1"}}
        lineage |= {"models": {}, "data": {}, "parents": [], "rewards": {"math": "0" * 64} if name == "grpo" else {}}
        (folder / name / "lineage.json").write_text(json.dumps(lineage))
        (folder / name / "config.json").write_text(stage.model_dump_json())
    (folder / "recipe.json").write_text(recipe.model_dump_json())
    (folder / "sft" / "metrics.jsonl").write_text(
        '{"loss/nll_mean": 2.0, "step": 1}\n{"loss/nll_mean": 1.0, "step": 2}\n'
    )
    record_steps(folder / "grpo", 1, steps, reward, samples)
    stages = {"sft": StageRecord("sft", [], state="done"), "grpo": StageRecord("grpo", ["sft"], state=state)}
    RunRecord(folder.name, str(folder), stages, state=state, started=1.0).write()
    (folder / ".lock").touch()
    return folder


class GoingOn:
    """A run that goes on while the block runs; `end` ends it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stack = folder, ExitStack()

    def __enter__(self) -> "GoingOn":
        self._stack.enter_context(locked(self._folder))
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self, state: str = "done") -> None:
        record = RunRecord.read(self._folder)
        record.state = record.stages["grpo"].state = state
        record.write()
        self._stack.close()


RUNNING = State.RUNNING
