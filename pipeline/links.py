"""Symbolic links that are replaced whole: a reader finds the old folder or the new one."""

import os
from pathlib import Path


def link(place: Path, target: Path) -> None:
    """Make `place` a relative link to the folder `target`; whatever link stood there is replaced in one step."""
    partial = place.with_name(f".{place.name}.partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(os.path.relpath(target, place.parent), target_is_directory=True)
    partial.replace(place)
