"""`alignyard eval`: a checkpoint evaluated on suites."""

import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from jobs.command import JsonFile, Overrides, verb_app, write_json
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
    from configs.evaluation import EvalConfig
    from configs.load import load_config

    file, name = target, Path(target).stem
    if suite:
        # A running stage may replace its checkpoint folder meanwhile: evaluate the present one, behind any link.
        checkpoint = str(Path(target).resolve()) if Path(target).is_dir() else target
        # All checkpoints end in the same few folder names, so the run is named for the last three.
        file, name = suite, "-".join([Path(suite).stem, *Path(checkpoint).resolve().parts[1:][-3:]])
        overrides = [f"model.path={json.dumps(checkpoint)}", *overrides]
    elif Path(target).is_dir():
        raise ValueError(f"{target} is a folder: name by --suite FILE the configuration to evaluate it by")
    config = load_config(file, overrides, EvalConfig).config
    from pipeline.run.stage import run_stage

    folder = output or Path("runs") / name
    write_json(run_stage(config, folder), json_file)
    print_results(folder)
    return 0
