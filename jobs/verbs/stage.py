"""`alignyard sft | rm | dpo | grpo | distill | sample`: one stage, in the foreground."""

from pathlib import Path

from jobs.command import OUT, Fresh, Output, Overrides, StageFile, begin_anew, verb_app

app = verb_app()
STAGE_HELP = """Run one stage of type `{stage}` in the foreground. docs/configs.md lists every key.

An interrupted run continues when the same command is given again.

\b
Examples:
  alignyard {stage} my_{stage}.yaml
  alignyard {stage} my_{stage}.yaml seed=1 --output runs/second
  alignyard {stage} my_{stage}.yaml --fresh
"""


def run_in_foreground(stage: str, file: str, overrides: list[str], output: Path | None, *, fresh: bool = False) -> int:
    """Runs the stage that `file` configures, into `output` or a folder below runs/ that is named for the file. `fresh`
    moves its earlier results aside."""
    from configs.load import load_config
    from configs.stages import STAGES

    config = load_config(file, overrides, STAGES[stage]).config  # refuses a wrong file before the slow import
    from pipeline.run.stage import run_stage

    folder = output or Path("runs") / Path(file).stem
    if fresh:
        begin_anew([folder])
    run_stage(config, folder)
    print_results(folder)
    return 0


def print_results(folder: Path) -> None:
    """Prints the folder of a stage's results with the ones that it holds."""
    results = [name for name in ("hf", "data", "figures.json", "report.html") if (folder / name).exists()]
    OUT.print(f"results in {folder}: {', '.join(results)}", highlight=False, soft_wrap=True)


def _add_verb(stage: str) -> None:
    @app.command(stage, help=STAGE_HELP.format(stage=stage))
    def run_stage_verb(  # pyright: ignore[reportUnusedFunction]
        file: StageFile, overrides: Overrides, output: Output = None, fresh: Fresh = False
    ) -> int:
        return run_in_foreground(stage, file, overrides, output, fresh=fresh)


for _stage in ("sft", "rm", "dpo", "grpo", "distill", "sample"):
    _add_verb(_stage)
