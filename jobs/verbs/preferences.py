"""`alignyard preferences build`: preference data for reward models."""

from jobs.command import Output, Overrides, StageFile, verb_app
from jobs.verbs.stage import run_in_foreground

app = verb_app()


@app.callback()
def preferences() -> None:
    """Build the comparisons that reward models learn from. docs/preferences.md explains the method.

    \b
    Example:
      alignyard preferences build my_preferences.yaml
    """


@app.command("build")
def build_preferences(file: StageFile, overrides: Overrides, output: Output = None) -> int:
    """Sample, judge, pair and filter answers to comparisons.

    The answers to a prompt are judged, and the best is paired with the worst. Comparisons from files can be added. All
    of them are filtered and written to <output>/data. An interrupted run continues when the same command is given
    again. docs/configs.md lists every key.

    \b
    Examples:
      alignyard preferences build my_preferences.yaml
      alignyard preferences build my_preferences.yaml filters.min_margin=0.5 --output runs/wide
    """
    return run_in_foreground("preferences", file, overrides, output)
