"""Writing rows as a data set, each prompt always on the same side of the split."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, Features

from pipeline.data.messages import Message
from pipeline.disk.files import new_folder

datasets.disable_progress_bars()  # they would interrupt the stage's own

TRAIN, HELD_OUT = "train", "held_out"


def prompt_key(messages: Sequence[Message]) -> str:
    """Hash a prompt's roles and texts, ignoring case and white space."""
    content = [[message["role"], " ".join(message["content"].casefold().split())] for message in messages]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def is_held_out_prompt(messages: Sequence[Message], share: float) -> bool:
    """Return whether a prompt belongs to the held-out `share`, whatever its source and the seed.

    Its first question decides, so a dialogue and its continuation are on the same side.
    """
    opening = next((index for index, message in enumerate(messages) if message["role"] == "user"), 0)
    return int(prompt_key(messages[: opening + 1])[:16], 16) < share * 16**16


def save_splits(folder: Path, rows: Sequence[dict[str, Any]], held_out: Sequence[bool], features: Features) -> None:
    """Write `rows` as the splits `train` and, if any, `held_out` of a data set in `folder`, whole or not at all."""
    splits = DatasetDict()
    for name, side in ((TRAIN, False), (HELD_OUT, True)):
        side_rows = [row for row, is_held_out in zip(rows, held_out, strict=True) if is_held_out == side]
        if side_rows or name == TRAIN:
            splits[name] = Dataset.from_list(side_rows, features=features)
    with new_folder(folder) as partial:
        splits.save_to_disk(partial)
