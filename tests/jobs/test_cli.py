import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from configs.load import load_config
from configs.stages import STAGES, Recipe
from jobs.cli import VERBS, LazyVerb, main
from jobs.command import exit_code, write_json
from jobs.import_guard import GUARDED_PACKAGES
from jobs.verbs.bench import BENCHES
from pipeline.errors import DecisionNeeded, RunStopped

RECIPE = str(Path(__file__).parents[1] / "configs" / "recipe.yaml")


def raising(error: BaseException):
    def verb() -> int:
        raise error

    return verb


def test_help_does_not_wait_for_heavy_imports() -> None:
    program = "import sys; from jobs.cli import VERBS, main\n"
    program += "for verb in ['', *VERBS]: main([*verb.split(), '--help'])\nprint(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120)
    assert "alignyard" in shown.stdout
    heavy = {"torch", "transformers", "ray", "vllm", "deepspeed", "datasets", "sympy", "numpy", "tensorboard"}
    assert not heavy & set(shown.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"alignyard {verb}" in text.split("Example")[1] and "Exit codes:" in text


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("steps=0: set it to 1 or more"), 2, "alignyard: steps=0: set it to 1 or more\n"),
        (RunStopped("rewards failed [math]"), 3, "alignyard: rewards failed [math]\n"),
        (DecisionNeeded("gate 'g'"), 4, "alignyard: a decision is needed: gate 'g'\n"),
        (KeyboardInterrupt(), 130, "alignyard: interrupted; the same command resumes the run\n"),
    ],
)
def test_exceptions_become_exit_codes(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(raising(error), resumes=True) == code
    assert capsys.readouterr().err == message


def test_only_resumable_verbs_promise_to_resume(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(raising(KeyboardInterrupt()), resumes=False) == 130
    assert capsys.readouterr().err == "alignyard: interrupted\n"


def test_a_fault_keeps_its_traceback() -> None:
    with pytest.raises(KeyError):
        exit_code(raising(KeyError("bug")), resumes=True)


def test_overrides_stand_before_and_after_options() -> None:
    line = ["model", "seed=1", "--suite", "suite.yaml", "suites.a.k=[1, 2]", "--json", "out.json"]
    values = LazyVerb("eval", "eval", "").make_context("eval", line).params
    assert (values["target"], values["suite"], values["json_file"]) == ("model", "suite.yaml", Path("out.json"))
    assert list(values["overrides"]) == ["seed=1", "suites.a.k=[1, 2]"]


@pytest.mark.parametrize("line", [["run", "demo", "--fast=1"], ["doctor", "a=1"], ["rum"], []])
def test_wrong_arguments_are_refused(line: list[str]) -> None:
    assert main(line) == 2


def test_a_dry_run_of_a_hub_model_needs_no_hub(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.verbs.run.OUT", Console(width=200))
    recipe = load_config(RECIPE, ["stages.warm.model={path: some/model}"], Recipe).config
    file = tmp_path / "far.yaml"
    OmegaConf.save(OmegaConf.create(recipe.model_dump(mode="json")), file)
    assert main(["run", str(file), "--dry-run", f"runs_dir={tmp_path}"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "not fetched" in printed and "stage:warm" in printed and "ZeRO-1" in printed
    assert not (tmp_path / recipe.name).exists()


def test_a_dry_run_names_missing_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    source = "stages.reason.prompts.source={type: file, paths: [no.jsonl]}"
    assert main(["run", RECIPE, "--dry-run", source]) == 0  # the cluster may have it
    printed = capsys.readouterr().out
    assert "no.jsonl" in printed and "missing before it can run here: the inputs of reason" in printed
    assert main(["run", RECIPE, "--from", "resaon"]) == 2
    assert "did you mean 'reason'?" in capsys.readouterr().err


def test_a_missing_run_or_cluster_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--runs-dir", str(tmp_path)]) == 2
    assert "no runs below" in capsys.readouterr().err
    assert main(["stop", "gone", "--runs-dir", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main(["list", "--address", "http://127.0.0.1:1"]) == 2
    assert "no Ray job server answers" in capsys.readouterr().err


def test_config_prints_a_recipe_that_runs_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [
        "stages.reason.steps=3",
        "stages.reason.prompts.system='two\n lines, \\${kept} and # all'",
        "stages.reason.rewards=[{name: math, args: {levels: [1, 2]}}, {name: reasoning_gym, weight: 0.5}]",
    ]
    assert main(["config", RECIPE, *overrides]) == 0
    printed = capsys.readouterr().out
    again = tmp_path / "again.yaml"
    again.write_text(printed)
    assert load_config(str(again), [], Recipe).config == load_config(RECIPE, overrides, Recipe).config
    lines = {line.split("#")[0].strip(): line.split("# ")[-1] for line in printed.splitlines()}
    assert (lines["steps: 3"], lines["steps: 20"], lines["runs_dir: runs"]) == ("override", "recipe.yaml", "default")


def test_config_shows_a_single_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "stage.yaml"
    OmegaConf.save(OmegaConf.load(RECIPE).stages.warm, file)
    assert main(["config", str(file), "seed=7"]) == 0
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out)
    assert load_config(str(again), [], STAGES["sft"]).config == load_config(str(file), ["seed=7"], STAGES["sft"]).config


def test_a_wrong_configuration_is_a_message_and_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", RECIPE, "stages.reason.stepz=3"]) == 2
    assert "did you mean 'steps'?" in capsys.readouterr().err


def test_a_checkpoint_without_a_suite_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(tmp_path)]) == 2
    assert "--suite FILE" in capsys.readouterr().err


def test_json_is_written_whole(tmp_path: Path) -> None:
    file = tmp_path / "new" / "figures.json"
    write_json({"eval/sums/accuracy": 0.5}, file)
    assert json.loads(file.read_text()) == {"eval/sums/accuracy": 0.5}
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(("line", "offered"), [("alignyard lin", "lineage"), ("alignyard reward sc", "score")])
def test_a_shell_is_offered_completions(line: str, offered: str) -> None:
    environment = {**os.environ, "_ALIGNYARD_COMPLETE": "complete_bash", "COMP_WORDS": line}
    environment["COMP_CWORD"] = str(len(line.split()) - 1)
    command = [sys.executable, "-m", "jobs.cli"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert shown.stdout.split() == [offered]


def test_every_bench_exists_and_nothing_else_imports_benches() -> None:
    home = Path(__file__).parents[2]
    for place in BENCHES.values():
        module, _, function = place.partition(":")
        assert f"\ndef {function}(" in (home / f"{module.replace('.', '/')}.py").read_text()
    product = [file for room in GUARDED_PACKAGES for file in (home / room).rglob("*.py")]
    importers = {
        file for file in product if re.search(r"^\s*(from|import) jobs\.bench", file.read_text(), re.MULTILINE)
    }
    assert importers and {file.parent.name for file in importers} == {"bench"}
