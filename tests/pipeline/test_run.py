"""The whole path as a user runs it, `alignyard run`, against the golden curve; and its stages killed and run again."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.series import series

pytestmark = [pytest.mark.engine, pytest.mark.ranks]

RECIPE = Path(__file__).with_name("small.yaml")
GOLDEN = Path(__file__).parents[1] / "golden" / "small.txt"

LOSS_TOLERANCE = 5e-5
"""Of a loss against the recorded one, 15 times what was measured: on one AMD EPYC, with AVX-512, AVX2 and no vector
instructions, losses of SFT differed by 1e-6 and those of GRPO by 3.3e-6 at most. An Intel processor with AMX differed
from it by 6e-7 over SFT's first nine steps, at a learning rate that made later differences grow."""
REWARD_TOLERANCE = 1e-3
"""Of a step's mean reward. The same tokens were sampled with each of these instruction sets; a single other token of
one of the 16 completions moves the mean by 0.003 or more."""

# One process for all stages, which is quicker to start and to kill than a run of Ray jobs; tests/jobs kills those.
STAGES = """
import sys
from pathlib import Path
from configs.load import load_config
from configs.stages import Recipe
from pipeline.run.stage import run_stage
recipe = load_config(sys.argv[1], [f"runs_dir={sys.argv[2]}", *sys.argv[4:]], Recipe).config
for name in sys.argv[3].split():
    config = recipe.stages[name]
    run_stage(config, Path(recipe.runs_dir, recipe.name, name), recipe)
"""


def run(folder: Path, *overrides: str) -> "subprocess.Popen[str]":
    command = str(Path(sys.executable).with_name("alignyard"))
    return start(command, "run", str(RECIPE), f"runs_dir={folder}", *overrides)


def run_stages(folder: Path) -> "subprocess.Popen[str]":
    return start(sys.executable, "-P", "-c", STAGES, str(RECIPE), str(folder), "sft grpo")


def start(*command: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"COLUMNS": "100"}
    )


def finish(process: "subprocess.Popen[str]") -> str:
    output = process.communicate(timeout=500)[0]
    assert process.returncode == 0, output
    return output


def metrics(folder: Path, stage: str) -> list[dict[str, float]]:
    """The series, and not how busy the reward pools were."""
    return series(folder / "small" / stage / "metrics.jsonl", "reward_pool/")


def kill_at(process: "subprocess.Popen[str]", file: Path, lines: int) -> None:
    """SIGKILL, once `file` has so many lines."""
    for _ in range(6000):
        if file.is_file() and len(file.read_text().splitlines()) >= lines:
            break
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    finish(run(folder))
    return folder


@pytest.mark.timeout(1500)
def test_killed_and_run_again_the_series_is_the_same_to_the_bit(whole: Path, tmp_path: Path) -> None:
    killed_and_run_again(whole, tmp_path, lines=8)


@pytest.mark.slow  # test_reward_model_stage.py stops a stage before its last step in every run of the tests
@pytest.mark.timeout(1500)
def test_so_it_is_when_killed_in_or_after_the_last_step(whole: Path, tmp_path: Path) -> None:
    killed_and_run_again(whole, tmp_path, lines=20)


def killed_and_run_again(whole: Path, tmp_path: Path, lines: int) -> None:
    """GRPO, from a copy of the finished SFT stage: tests/jobs/test_conductor.py kills SFT at its steps."""
    shutil.copytree(whole / "small" / "sft", tmp_path / "small" / "sft")
    kill_at(run_stages(tmp_path), tmp_path / "small" / "grpo" / "metrics.jsonl", lines)
    output = finish(run_stages(tmp_path))
    assert "sft: done before, reused" in output
    assert metrics(tmp_path, "grpo") == metrics(whole, "grpo")
    assert [row["step"] for row in metrics(tmp_path, "grpo")] == list(range(1, 21))


def curve(folder: Path) -> str:
    """A line a step: `sft STEP LOSS`, `grpo STEP LOSS REWARD`."""
    lines = [f"sft {row['step']} {row['loss/total']:.6f}" for row in metrics(folder, "sft")]
    if (folder / "small" / "grpo").exists():
        lines += [
            f"grpo {row['step']} {row['loss/total']:.6f} {row['reward/total/mean']:.4f}"
            for row in metrics(folder, "grpo")
        ]
    return "\n".join(lines) + "\n"


def departures(text: str) -> list[str]:
    """The steps of a curve that are further from the recorded ones than the tolerances allow."""
    recorded = {tuple(line.split()[:2]): line.split()[2:] for line in GOLDEN.read_text().splitlines()}
    found: list[str] = []
    for line in text.splitlines():
        stage, step, *figures = line.split()
        allowed = zip(figures, recorded[stage, step], (LOSS_TOLERANCE, REWARD_TOLERANCE), strict=False)
        if any(abs(float(figure) - float(golden)) > tolerance for figure, golden, tolerance in allowed):
            found.append(f"{line}, recorded {' '.join(recorded[stage, step])}")
    return found


def test_the_golden_curve(whole: Path) -> None:
    """Loss and reward of 20 steps of SFT and of GRPO; a refactor leaves them as they are.

    To record anew after a change that is meant to move them: delete the file and run this test once.
    """
    text = curve(whole)
    if not GOLDEN.exists():
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(text)
        pytest.fail(f"{GOLDEN} did not exist; recorded, look at it and commit it")
    assert len(text.splitlines()) == len(GOLDEN.read_text().splitlines()) == 40
    assert not departures(text)


# Classes of a main program travel to Ray's workers whole, so that a fault can be put into a training rank.
NO_GRADIENT = """
import torch
import pipeline.train.worker as worker
class Rank(worker.TrainActor):
    def build(self, *args):
        super().build(*args)
        for name, parameter in self.engine.engine.module.named_parameters():
            if name.endswith("layers.1.input_layernorm.weight"):
                parameter.register_hook(torch.zeros_like)
                return
        raise LookupError("no such parameter")
worker.TrainingRanks.actor = Rank
"""
DENOMINATOR = """
import pipeline.stages.sft as sft
sft._trained_tokens = lambda trees: float(sum(len(tree.root_ids) for tree in trees))
"""
STALE = """
import pipeline.grpo.fleet as fleet
send = fleet.Fleet.sync_weights
fleet.Fleet._colocated = False  # else the engines lose their weights in their sleep, and refuse to sample
fleet.Fleet.sync_weights = lambda self, version: send(self, version) if version == 0 else {"sync/bound_mean": 1.0}
fleet.refuse_mismatch = lambda *args, **kwargs: None
"""


@pytest.mark.parametrize(
    ("fault", "stage"),
    [(NO_GRADIENT, "sft"), (DENOMINATOR, "sft"), (STALE, "grpo")],
    ids=["one gradient is left out", "prompts count in the denominator", "engines keep the first weights"],
)
def test_the_tolerances_catch(fault: str, stage: str, whole: Path, tmp_path: Path) -> None:
    if stage == "grpo":
        shutil.copytree(whole / "small" / "sft", tmp_path / "small" / "sft")
    # GRPO needs fewer steps; the learning rates of SFT depend on their number.
    command = (sys.executable, "-P", "-c", fault + STAGES, str(RECIPE), str(tmp_path), stage, "stages.grpo.steps=6")
    finish(start(*command))
    faulty = [line for line in curve(tmp_path).splitlines() if line.startswith(stage)]
    assert len(faulty) == (6 if stage == "grpo" else 20) and departures("\n".join(faulty))


def test_a_run_is_a_folder(whole: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stage = whole / "small" / "grpo"
    for name in ("config.json", "lineage.json", "report.html", "figures.json", "metrics.jsonl"):
        assert (stage / name).is_file(), name
    assert any((stage / "rollouts").glob("*.jsonl")) and any((stage / "tensorboard").iterdir())
    assert sorted(path.name for path in (stage / "checkpoints").iterdir()) == ["step-18", "step-20"]
    model = AutoModelForCausalLM.from_pretrained(stage / "hf")
    tokenizer = AutoTokenizer.from_pretrained(stage / "hf")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "1+1="}], add_generation_prompt=True)["input_ids"]
    assert model(torch.tensor([ids])).logits.isfinite().all()


def test_mismatch_is_within_the_bound_at_every_step(whole: Path) -> None:
    within_the_bound(whole)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_deepseek_v2s_twin_goes_the_same_way(tmp_path: Path) -> None:
    """Softmax gates that keep to groups, with V2's balance in the place of V3's bias."""
    finish(run(tmp_path, "stages.sft.model.init_config=tiny_v2", "stages.sft.balance={type: v2}"))
    losses = [row["loss/total"] for row in metrics(tmp_path, "sft")]
    assert len(losses) == 20 and losses[-1] < losses[0] - 1
    assert len(metrics(tmp_path, "grpo")) == 20
    within_the_bound(tmp_path)


def within_the_bound(folder: Path) -> None:
    """Means stay below 1.5e-6 nats with AVX-512, AVX2 and no vector instructions. A single token may be further off by
    far, 8.5e-5 there, since the two scores of a router nearly tie for it."""
    for row in metrics(folder, "grpo"):
        assert row["mismatch/abs_mean"] <= 1e-5 and row["mismatch/abs_max"] <= 1e-3
        assert row["sync/gap_mean"] <= 1e-5 and row["sync/gap_max"] <= 1e-3
