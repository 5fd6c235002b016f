"""The guard at the door: the rooms that run must be the installed ones.

Their names are everyday words (`configs`, `rewards`, ...), and Python takes the first folder of that name on its path:
a user's own `rewards/` in the working directory or on PYTHONPATH would be run in place of ours, without a word.
"""

from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

ROOMS = ("configs", "rewards", "rollout", "pipeline")
HOME = Path(__file__).resolve().parent.parent


def check_rooms() -> None:
    """Raises ValueError naming the folder in the way, if a room Python would import is not the one beside `jobs`."""
    for room in ROOMS:
        spec = find_spec(room)
        if spec is None:
            raise ValueError(f"alignyard's own '{room}' is not installed in {HOME}; run make setup again")
        found = _folder(spec)
        if found != HOME / room:
            raise ValueError(
                f"{found} is in the way: Python imports it in place of alignyard's own '{room}' ({HOME / room}). "
                "Rename it, start alignyard from another folder, or take its parent off PYTHONPATH"
            )


def _folder(spec: ModuleSpec) -> Path:
    """Where a package lies, or the file of a module that is none."""
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(str(spec.origin)).resolve()
