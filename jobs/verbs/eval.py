"""`alignyard eval`: a checkpoint evaluated on suites."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from jobs.command import JsonFile, Overrides, verb_app, write_json
from jobs.start import evaluation_of
from jobs.verbs.stage import print_results

app = verb_app()


@app.command("eval")
def evaluate_checkpoint(
    target: Annotated[str, Argument(metavar="CONFIG|CHECKPOINT", help="A YAML file, or with --suite a checkpoint.")],
    overrides: Overrides,
    suite: Annotated[str | None, Option(metavar="FILE", help="The YAML file to evaluate CHECKPOINT by.")] = None,
    output: Annotated[Path | None, Option(metavar="DIR", help="Folder of the run. [default: below runs/]")] = None,
    json_file: JsonFile = None,
) -> int:
    """Evaluate the checkpoint that a configuration of type `eval` names, and print the figures.

    With --suite the checkpoint is the argument, and the configuration is the suite.

    \b
    Examples:
      alignyard eval my_eval.yaml --json figures.json
      alignyard eval runs/demo/reason/hf --suite my_eval.yaml seed=1
    """
    if suite:
        config, folder = evaluation_of(target, suite, overrides)
    elif Path(target).is_dir():
        raise ValueError(f"{target} is a folder: name by --suite FILE the configuration to evaluate it by")
    else:
        from configs.evaluation import EvalConfig
        from configs.load import load_config

        config, folder = load_config(target, overrides, EvalConfig).config, Path("runs", Path(target).stem)
    from pipeline.run.stage import run_stage

    folder = output or folder
    write_json(run_stage(config, folder), json_file)
    print_results(folder)
    return 0
