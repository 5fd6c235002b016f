"""What all verbs of the command share: how they are added, what their end means as an exit code."""

import argparse
import errno
import os
import warnings
from collections.abc import Callable
from typing import TypeAlias

from rich.console import Console

from jobs.rooms import check_rooms

OUT, ERR = Console(), Console(stderr=True)

# Set before any heavy import, and inherited by the processes Ray starts; what the user has set stays.
QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
}

EXIT_CODES = """\
exit codes:
  0    done
  1    a fault: the traceback says where (doctor: something required is missing; reward check: a promise is broken)
  2    a wrong configuration or input: the message says what to change
  3    the run stopped itself: rewards kept failing, a weight sync could not be proven, or a gate said stop
  4    a gate waits for a decision: the message says how to give it
  130  interrupted
  141  the reader of the output closed it
"""
FAULT, WRONG_INPUT, STOPPED, UNDECIDED, INTERRUPTED, UNREAD = 1, 2, 3, 4, 130, 141
FULL = (errno.ENOSPC, errno.EDQUOT)

Verbs: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_verb(
    verbs: Verbs,
    name: str,
    verb: Callable[[argparse.Namespace], int],
    summary: str,
    text: str,
    *,
    resumes: bool = False,
) -> argparse.ArgumentParser:
    """A verb's parser; `resumes` says whether the same command goes on after an interruption."""
    parser = verbs.add_parser(
        name, help=summary, description=text, epilog=EXIT_CODES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(verb=verb, resumes=resumes)
    return parser


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """`key=value` arguments."""
    explanation = "sets any key of the configuration, dotted, to a value in YAML: stages.reason.steps=3"
    parser.add_argument("overrides", metavar="key=value", nargs="*", help=explanation)


def quieten() -> None:
    """Silences the logs and the telemetry of libraries."""
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    for category in (DeprecationWarning, FutureWarning):
        warnings.simplefilter("ignore", category)


def exit_code(verb: Callable[[], int], *, resumes: bool) -> int:
    """Runs `verb`; what it raises becomes a message and an exit code, save a fault, which keeps its traceback."""
    try:
        check_rooms()
    except ValueError as error:
        return refuse(str(error), WRONG_INPUT)
    from pipeline.errors import DecisionNeeded, RunStopped

    try:
        return verb()
    except (RunStopped, DecisionNeeded, ValueError, OSError) as error:
        message, code = meaning(error)
        if code == FAULT:
            raise
        return refuse(message, code)
    except KeyboardInterrupt:
        return refuse("interrupted" + ("; the same command resumes the run" if resumes else ""), INTERRUPTED)


def meaning(error: Exception) -> tuple[str, int]:
    """What an exception says to people, and the exit code it stands for."""
    from pipeline.errors import DecisionNeeded, RunStopped

    match error:
        case RunStopped():
            return f"the run stopped itself: {error}", STOPPED
        case DecisionNeeded():
            return f"a decision is needed: {error}", UNDECIDED
        case ValueError():
            return str(error), WRONG_INPUT
        case OSError(errno=number, strerror=reason, filename=file) if number in FULL:
            place = f" for '{file}'" if file else ""
            return f"the disk has no room{place} ({reason}); make some, and the same command goes on", STOPPED
        case _:
            return f"{type(error).__name__}: {error}", FAULT


def refuse(message: str, code: int) -> int:
    """Tells why it ends with `code`."""
    ERR.print(f"alignyard: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    return code


def duration(seconds: float) -> str:
    """`45s`, `3m12s`, `2h05m`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
