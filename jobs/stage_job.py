"""A stage as a Ray job: `python -m jobs.stage_job RUN_FOLDER STAGE`.

How it ended stands in the stage's folder before the process has ended, so that the conductor needn't wait for Ray.
"""

import json
import os
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from configs.stages import Recipe
from jobs.command import FAULT, INTERRUPTED, meaning, quieten, refuse
from pipeline.disk.files import write_atomic
from pipeline.disk.run_record import RECIPE


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a stage ended."""

    exit_code: int
    reason: str = ""

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The outcome in a stage's folder; None where there is none yet."""
        file = folder / OUTCOME
        return cls(**json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None

    def write(self, folder: Path) -> None:
        """Into the stage's folder."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / OUTCOME, json.dumps(asdict(self)))

    @staticmethod
    def clear(folder: Path) -> None:
        """Makes the folder, and removes an earlier outcome."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / OUTCOME).unlink(missing_ok=True)


OUTCOME = "outcome.json"


def main(run: str, stage: str) -> int:
    """Runs the stage of the recipe in the run's folder; the exit code of a verb."""
    quieten()
    folder = Path(run)
    recipe = Recipe.model_validate_json((folder / RECIPE).read_text(encoding="utf-8"))
    try:
        from pipeline.run.stage import run_stage

        run_stage(recipe.stages[stage], folder / stage, recipe)
    except KeyboardInterrupt:
        ended = Outcome(INTERRUPTED, "stopped")
    except Exception as error:  # noqa: BLE001  # whatever it is, the conductor must know
        message, code = meaning(error)
        if code == FAULT:
            traceback.print_exc()
        ended = Outcome(refuse(message, code), message)
    else:
        ended = Outcome(0)
    ended.write(folder / stage)
    return ended.exit_code


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # all is closed: taking the interpreter apart takes seconds after imports like these
