"""`alignyard sft | rm | grpo | sample`: one stage, in the foreground."""

from pathlib import Path
from typing import Annotated

from typer import Argument

from jobs.command import Output, Overrides, verb_app

app = verb_app()
STAGE_VERBS = ("sft", "rm", "grpo", "sample")
HELP = """Run one stage of type `{stage}` in the foreground. docs/configs.md lists every key.

An interrupted run continues when the same command is given again.

\b
Examples:
  alignyard {stage} my_{stage}.yaml
  alignyard {stage} my_{stage}.yaml seed=1 --output runs/second
"""


def _add_verb(stage: str) -> None:
    @app.command(stage, help=HELP.format(stage=stage))
    def run(  # pyright: ignore[reportUnusedFunction]
        file: Annotated[str, Argument(metavar="CONFIG", help=f"A YAML file with `type: {stage}` and its keys.")],
        overrides: Overrides,
        output: Output = None,
    ) -> int:
        from configs.load import load
        from configs.stages import STAGES

        config = load(file, overrides, STAGES[stage]).config  # a wrong file is refused before the slow import
        from pipeline.run.stage import run_stage

        run_stage(config, output or Path("runs") / Path(file).stem)
        return 0


for _stage in STAGE_VERBS:
    _add_verb(_stage)
