"""The state of a run, in `run.json` of its folder, for other shells and the report."""

import json
import os
import socket
import time
from dataclasses import asdict, dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Self

from pydantic import TypeAdapter, ValidationError

from configs.visible import by_name
from pipeline.disk.ending import Ending
from pipeline.disk.files import read_json, read_json_or_none, write_atomic
from pipeline.disk.lock import LOCK, holder
from pipeline.disk.recorded import FIGURES, LINEAGE, begun, read_lineage

if TYPE_CHECKING:
    from configs.stages import Recipe

RUN, RECIPE, LOG, CONSOLE = "run.json", "recipe.json", "run.log", "console.log"
"""Files of a run's folder; `console.log` is the output of a stage, in its own folder."""


class State(StrEnum):
    """The state of a stage or run that has not ended by itself. The states of the others are the words of `Ending`."""

    WAITING = "waiting"
    RUNNING = "running"
    LEFT_OUT = "left out"
    NOT_REACHED = "not reached"
    KILLED = "killed"
    UNFINISHED = "unfinished"


@dataclass(slots=True)
class StageRecord:
    """A stage of a run."""

    type: str
    waits_for: list[str]
    state: str = State.WAITING
    reason: str = ""
    """The reason why the stage waits, or why it ended as it did."""
    job: str = ""
    """The Ray job that ran it last."""
    started: float | None = None
    ended: float | None = None
    exit_code: int | None = None
    reused: bool = False
    """True if the stage was done before the last start of the run."""


@dataclass(slots=True)
class RunRecord:
    """A run. Times are seconds since the epoch."""

    name: str
    folder: str
    stages: dict[str, StageRecord]
    state: str = State.RUNNING
    reason: str = ""
    exit_code: int | None = None
    address: str = ""
    """The job server of its cluster; of a local one only while it runs."""
    job: str = ""
    """The Ray job of its conductor; empty where that is a process of this machine."""
    pid: int = field(default_factory=os.getpid)
    host: str = field(default_factory=socket.gethostname)
    started: float = field(default_factory=time.time)
    ended: float | None = None

    def write(self) -> None:
        """Makes the state known."""
        write_atomic(Path(self.folder) / RUN, by_name(json.dumps(asdict(self), indent=1)))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The record of the run in `folder`, named as the folder is now. A run that lost its conductor without a word
        is KILLED. Keys that only another version knows are left out.

        Raises ValueError where there is no run, and where its file is damaged.
        """
        file, remedy = folder / RUN, "`alignyard run` with the same recipe writes it anew, and goes on"
        if not file.is_file():
            raise ValueError(f"'{folder}' holds no run: {RUN} is missing; `alignyard list` shows the runs there are")
        values = read_json(file, remedy)
        try:
            record = TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            keys = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors())
            raise ValueError(f"'{file}' is damaged (wrong or missing: {keys}); {remedy}") from error
        record.folder, record.name = str(folder.absolute()), folder.resolve().name
        if record.state == State.RUNNING and not holder(folder):
            record.state, record.reason = State.KILLED, "it ended without a word; the same command resumes it"
            for stage in record.stages.values():
                stage.state = State.KILLED if stage.state == State.RUNNING else stage.state
        return record


def stage_alone(folder: Path) -> RunRecord | None:
    """The record of a stage that was run without a recipe, as a run of one stage, made from its files; None for another
    folder.

    Raises ValueError where its lineage is damaged.
    """
    if (folder / RUN).is_file() or not (folder / LINEAGE).is_file():
        return None
    lineage, figures, writer = read_lineage(folder), folder / FIGURES, holder(folder)
    started = datetime.fromisoformat(lineage["created"]).timestamp()
    state = State.RUNNING if writer else Ending.DONE.word if figures.is_file() else State.UNFINISHED
    reason = "the same command resumes it" if state == State.UNFINISHED else ""
    ended = figures.stat().st_mtime if state == Ending.DONE.word else None
    stage = StageRecord(lineage["type"], [], state=state, reason=reason, started=started, ended=ended)
    process = read_json_or_none(folder / LOCK) or {"pid": 0, "host": ""}
    return RunRecord(
        folder.resolve().name,
        str(folder.absolute()),
        {folder.resolve().name: stage},
        state=state,
        reason=reason,
        pid=int(process["pid"]),
        host=str(process["host"]),
        started=started,
        ended=ended,
    )


def refuse_other_recipe(recipe: "Recipe", folder: Path) -> None:
    """Raises ValueError where `folder` holds results of stages that the recipe doesn't have: the run's record would
    name the stages of this recipe alone, and those results would be forgotten."""
    folders = sorted(file.parent for file in folder.glob(f"*/{LINEAGE}"))
    foreign_stages = [stage.name for stage in folders if stage.name not in recipe.stages and begun(stage)]
    if foreign_stages:
        raise ValueError(
            f"'{folder}' is the run of another recipe, with results of {', '.join(foreign_stages)}, which this "
            "one doesn't have; give it another name (name=NAME), or these stages too (--until and --only leave out "
            "what need not run)"
        )
