"""Runs a stage as a Ray job: `python -m jobs.stage_job RUN_FOLDER STAGE`.

The job writes its result into the stage's folder before its process ends, so that the conductor need not wait for Ray.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from configs.stages import Recipe
from configs.visible import by_name, visible
from jobs.command import escape_output, explain, print_error, quieten
from pipeline.disk.ending import Ending
from pipeline.disk.files import write_atomic
from pipeline.disk.recorded import CHECKPOINTS
from pipeline.disk.run_record import RECIPE
from pipeline.errors import RunStopped

RESULT_FILE = "outcome.json"


@dataclass(frozen=True, slots=True)
class StageResult:
    """The ending of a stage, and the reason for it in words."""

    ending: Ending
    reason: str = ""

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The result in a stage's folder, or None while there is none."""
        file = folder / RESULT_FILE
        if not file.is_file():
            return None
        values = json.loads(file.read_text(encoding="utf-8"))
        return cls(Ending(values["exit_code"]), values["reason"])

    def write(self, folder: Path) -> None:
        """Writes the result into a stage's folder, which it makes if needed."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / RESULT_FILE, json.dumps({"exit_code": self.ending, "reason": by_name(self.reason)}))


def copy_results(recipe: Recipe, folder: Path, stage: str = "") -> None:
    """Copies a stage's results, or the whole run's, to the recipe's `copy_to`, if it has one; training states stay.
    Raises RunStopped where that fails."""
    if recipe.copy_to is None:
        return
    from pipeline.disk.remote import copy_folder

    address = "/".join(filter(None, [recipe.copy_to.rstrip("/"), recipe.name, stage]))
    try:
        sent = copy_folder(folder / stage, address, leaving=CHECKPOINTS)
    except ValueError as error:
        raise RunStopped(f"{error}; the results are complete here, and the same command copies them") from error
    print(visible(f"copied {sent} files to {address}"), flush=True)


def main(run: str, stage: str) -> Ending:
    """Runs the stage of the recipe in the run's folder."""
    quieten()
    escape_output()
    folder = Path(run)
    recipe = Recipe.model_validate_json((folder / RECIPE).read_text(encoding="utf-8"))
    try:
        from pipeline.run.stage import run_stage

        run_stage(recipe.stages[stage], folder / stage, recipe)
        copy_results(recipe, folder, stage)
        result = StageResult(Ending.DONE)
    except KeyboardInterrupt:
        result = StageResult(Ending.INTERRUPTED, "stopped")
    except Exception as error:  # noqa: BLE001  # the conductor needs a result of every exception
        message, ending = explain(error)
        if ending == Ending.FAULT:
            sys.excepthook(type(error), error, error.__traceback__)
        print_error(message)
        result = StageResult(ending, message)
    result.write(folder / stage)
    return result.ending


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # everything is closed; unloading these imports would take seconds
