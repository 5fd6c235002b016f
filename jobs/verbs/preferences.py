"""`alignyard preferences build`: preference data for reward models."""

from pathlib import Path
from typing import Annotated

from typer import Argument

from jobs.command import Output, Overrides, verb_app

app = verb_app()


@app.callback()
def preferences() -> None:
    """Build the comparisons that reward models learn from. docs/preferences.md explains the method.

    \b
    Example:
      alignyard preferences build my_preferences.yaml
    """


@app.command("build")
def build_preferences(
    file: Annotated[str, Argument(metavar="CONFIG", help="A YAML file with `type: preferences` and its keys.")],
    overrides: Overrides,
    output: Output = None,
) -> int:
    """Sample answers, judge them, pair the best with the worst, and write the pairs to <output>/data.

    Comparisons from files can be added; all of them are filtered. An interrupted run continues when the same command
    is given again. docs/configs.md lists every key.

    \b
    Examples:
      alignyard preferences build my_preferences.yaml
      alignyard preferences build my_preferences.yaml filters.min_margin=0.5 --output runs/wide
    """
    from configs.load import load
    from configs.preferences import PreferencesConfig

    config = load(file, overrides, PreferencesConfig).config
    from pipeline.run.stage import run_stage

    run_stage(config, output or Path("runs") / Path(file).stem)
    return 0
