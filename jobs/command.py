"""The parts that all verbs share: consoles, exit codes, and the arguments that several verbs take."""

import errno
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import rich.control
from rich.console import Console
from rich.table import Column, Table
from typer import Argument, Option, Typer

from jobs.import_guard import check_imports

if TYPE_CHECKING:
    from pipeline.disk.ending import Ending

OUT, ERR = Console(), Console(stderr=True)

# Set before any heavy import and inherited by the processes that Ray starts; values that the user has set stay.
QUIET_ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

EXIT_CODES = """\b
Exit codes:
  0    done
  1    an internal error, with its traceback (doctor: a requirement is missing; reward check: a rule is broken)
  2    a wrong configuration or input; the message says what to change
  3    the run stopped itself: rewards kept failing, a weight sync was not proven, or a gate decided to stop
  4    a gate waits for your decision; the message says how to give it
  130  interrupted
  141  the program that read the output closed it
"""

Overrides = Annotated[
    list[str],
    Argument(
        metavar="key=value",
        default_factory=list,
        show_default=False,
        help="Set any key of the configuration: a dotted key and a YAML value, such as stages.reason.steps=3.",
    ),
]
RecipeFile = Annotated[str, Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")]
StageFile = Annotated[str, Argument(metavar="CONFIG", help="A YAML file with the stage's `type` and its keys.")]
RunsDir = Annotated[Path, Option(metavar="DIR", help="The folder of the runs.")]
RunName = Annotated[str, Argument(metavar="RUN", help="Name or folder of the run.")]
StageOption = Annotated[str | None, Option("--stage", metavar="STAGE", help="Look at this stage alone.")]
Output = Annotated[Path | None, Option(metavar="DIR", help="Folder of the run. [default: runs/<name of CONFIG>]")]
Fresh = Annotated[
    bool, Option("--fresh", help="Begin anew; earlier results are kept in a folder before-N beside them.")
]
JsonFile = Annotated[Path | None, Option("--json", metavar="FILE", help="Also write the results to this file.")]
PageFile = Annotated[Path | None, Option("--page", metavar="FILE", help="Write this HTML page, too.")]
Address = Annotated[
    str,
    Option(
        metavar="URL",
        envvar="RAY_ADDRESS",
        show_default=False,
        help="Job server of a Ray cluster, such as http://head:8265.",
    ),
]


def verb_app() -> Typer:
    """A typer application for the verbs of one file."""
    return Typer(rich_markup_mode=None, add_completion=False, no_args_is_help=True, subcommand_metavar="VERB ...")


def quieten() -> None:
    """Silences the logs and the telemetry of libraries."""
    os.environ.update({name: value for name, value in QUIET_ENVIRONMENT.items() if name not in os.environ})
    for category in (DeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", category)


def escape_output() -> None:
    """Makes what this process prints safe for a terminal: all text that goes through rich, in tables and statuses too,
    and tracebacks, whose messages may quote a completion."""
    from configs.visible import ESCAPES, visible

    def print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.stderr.write(visible("".join(traceback.format_exception(kind, error, trace))))

    control_codes: Any = rich.control
    control_codes._CONTROL_STRIP_TRANSLATE.update(ESCAPES)  # rich removes five characters, but not the escape
    sys.excepthook = print_traceback


def exit_code(verb: Callable[[], int], *, resumes: bool) -> int:
    """Runs `verb` and returns its exit code, or the one that its exception stands for, with a message.

    A fault keeps its traceback. `resumes` says that the same command continues after an interruption.
    """
    try:
        check_imports()
    except ValueError as error:
        print_error(str(error))
        return 2  # Ending cannot be imported here
    escape_output()
    from pipeline.disk.ending import Ending
    from pipeline.disk.home import replace_read_only_home
    from pipeline.errors import DecisionNeeded, RunStopped

    try:
        replace_read_only_home()
        return verb()
    except (RunStopped, DecisionNeeded, ValueError, OSError) as error:
        message, ending = explain(error)
        if ending == Ending.FAULT:
            raise
    except KeyboardInterrupt:
        message, ending = "interrupted" + ("; the same command resumes the run" if resumes else ""), Ending.INTERRUPTED
    print_error(message)
    return ending


def explain(error: Exception) -> tuple[str, "Ending"]:
    """The message to print for an exception, and the ending it stands for."""
    from pipeline.disk.ending import Ending
    from pipeline.errors import DecisionNeeded, RunStopped

    match error:
        case RunStopped():
            return str(error), Ending.STOPPED
        case DecisionNeeded():
            return f"a decision is needed: {error}", Ending.UNDECIDED
        case ValueError():
            return str(error), Ending.WRONG_INPUT
        case OSError(errno=number, strerror=reason, filename=file) if number in DISK_FULL:
            where = f" for '{file}'" if file else ""
            return f"the disk has no room{where} ({reason}); free some, and the same command goes on", Ending.STOPPED
        case _:
            return f"{type(error).__name__}: {error}", Ending.FAULT


def print_error(message: str) -> None:
    """Prints to stderr, in red, as the command's own message."""
    ERR.print(f"alignyard: {message}", style="red", markup=False, highlight=False, soft_wrap=True)


def plain_table(*columns: str) -> Table:
    """A table without lines, which breaks a word that is too long rather than cutting it."""
    folded = (Column(header, overflow="fold") for header in columns)
    return Table(*folded, box=None, header_style="bold", pad_edge=False)


def one_line(text: str, width: int, tail: int = 0) -> str:
    """Untrusted text on one line of at most `width` characters, without control characters.

    Longer text keeps its beginning and its last `tail` characters.
    """
    from configs.visible import visible

    line = visible(" ".join(text[: 4 * width].split()))
    return line if len(line) <= width else f"{line[: width - tail - 3]}...{line[len(line) - tail :]}"


def spark_levels() -> str:
    """The characters of a curve in the terminal, lowest first."""
    return "▁▂▃▄▅▆▇█" if OUT.encoding.startswith("utf") else "_.-=+*#@"


def begin_anew(folders: Iterable[Path], run: Path | None = None) -> None:
    """Moves the folders of stages aside and says where to. Raises ValueError, and moves none, where one of them or the
    folder of their `run` is in use."""
    from pipeline.disk.lock import holder
    from pipeline.disk.recorded import set_aside

    folders = list(folders)
    for folder in [run, *folders] if run else folders:
        if writer := holder(folder):
            raise ValueError(f"--fresh: '{folder}' is being written by {writer}; wait for it or stop it")
    for folder in folders:
        if (place := set_aside(folder)) is not None:
            OUT.print(f"{folder.name} begins anew; its earlier results are kept in {place}", soft_wrap=True)


def run_folder(run: str, runs_dir: Path) -> Path:
    """The folder of a run that is given by its name below `runs_dir`, or else by its path."""
    return runs_dir / run if (runs_dir / run).is_dir() else Path(run)


def write_json(values: Mapping[str, Any], file: Path | None) -> None:
    """Writes `values` to `file`, whole or not at all; does nothing where `file` is None."""
    from pipeline.disk.files import write_atomic

    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(values, indent=2) + "\n")
