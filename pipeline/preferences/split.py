"""Rows to a data set on disk, a prompt always on the same side of the split."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, Features

from pipeline.data.messages import Message
from pipeline.disk.files import new_folder

datasets.disable_progress_bars()  # datasets draws its own, beside ours

TRAIN, HELD_OUT = "train", "held_out"


def prompt_key(messages: Sequence[Message]) -> str:
    """What tells prompts apart: a hash of who says what, in which case and white space don't count."""
    said = [[message["role"], " ".join(message["content"].casefold().split())] for message in messages]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def is_held_out(messages: Sequence[Message], share: float) -> bool:
    """Whether a prompt belongs to the held-out `share`, for good: whatever the seed and wherever it comes from.

    Its first question decides, so a dialogue and what goes on from it are on the same side.
    """
    opening = next((place for place, message in enumerate(messages) if message["role"] == "user"), 0)
    return int(prompt_key(messages[: opening + 1])[:16], 16) < share * 16**16


def save_splits(folder: Path, rows: Sequence[dict[str, Any]], held_out: Sequence[bool], features: Features) -> None:
    """Writes `rows` to the splits `train` and, if there is one, `held_out` below `folder`, whole or not at all."""
    splits = DatasetDict()
    for name, side in ((TRAIN, False), (HELD_OUT, True)):
        chosen = [row for row, held in zip(rows, held_out, strict=True) if held == side]
        if chosen or name == TRAIN:
            splits[name] = Dataset.from_list(chosen, features=features)
    with new_folder(folder) as partial:
        splits.save_to_disk(partial)
