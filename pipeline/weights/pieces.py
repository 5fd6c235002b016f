"""Tensors in pieces: each file holds runs of their elements, and beside it lies an index of what it holds.

A tensor has several kinds of values, such as a weight and its moments, which are cut alike. The piece of a kind of a
tensor from element `start` on, all dimensions flattened, is a flat tensor under KIND/NAME@START.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.disk.checksums import checksum
from pipeline.disk.files import fsync, read_json

WEIGHT, BUFFER = "weight", "buffer"
"""Kinds: of master weights, and of tensors without moments, which are stored whole."""


class PieceWriter:
    """Pieces of one file, copied to the host as they are added, and their index."""

    def __init__(self) -> None:
        self._pieces: dict[str, Tensor] = {}
        self._index: dict[str, tuple[tuple[int, ...], list[tuple[int, int]]]] = {}

    def add(self, name: str, shape: tuple[int, ...], start: int, values: Mapping[str, Tensor]) -> None:
        """Add the values of a run of the tensor `name`, by kind. From a GPU they are copied meanwhile."""
        for kind, part in values.items():
            copy = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
            self._pieces[_key(kind, name, start)] = copy.copy_(part.detach(), non_blocking=True)
        self._index.setdefault(name, (shape, []))[1].append((start, len(next(iter(values.values())))))

    def write(self, folder: Path, rank: int, facts: Mapping[str, Any]) -> dict[str, str]:
        """Write the pieces, and the index with `facts` about all files. Returns checksums by file name."""
        files = [folder / f"rank-{rank}.safetensors", folder / f"rank-{rank}.json"]
        save_file(self._pieces, files[0])
        self._pieces.clear()
        files[1].write_text(json.dumps({**facts, "tensors": self._index}), encoding="utf-8")
        for file in files:
            fsync(file)
        return {file.name: checksum(file) for file in files}


class PieceReader:
    """Runs of tensors, from the files `rank-N.safetensors` of a folder.

    facts: what all files say of themselves. shapes: of the tensors, by name.

    Example: `PieceReader(folder).read("weight", "lm_head.weight", 0, 1000)`
    """

    def __init__(self, folder: Path) -> None:
        """Raises ValueError for a folder without an index, or with too few."""
        remedy = f"remove '{folder}' to start from an earlier state, or begin anew with --fresh"
        self.facts = read_json(folder / "rank-0.json", remedy)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._folder, self._open = folder, dict[int, Any]()
        self._pieces: dict[str, list[tuple[int, int, int]]] = {}  # start, end, rank
        for rank in range(self.facts["ranks"]):
            for name, (shape, runs) in read_json(folder / f"rank-{rank}.json", remedy)["tensors"].items():
                self.shapes[name] = tuple(shape)
                self._pieces.setdefault(name, []).extend((start, start + length, rank) for start, length in runs)
        for pieces in self._pieces.values():
            pieces.sort()

    def read(self, kind: str, name: str, start: int, length: int) -> Tensor:
        """Return elements `start` to `start + length` of a tensor, flat. Raises ValueError for what no file holds."""
        parts = list(self._parts(kind, name, start, start + length))
        if sum(map(len, parts)) != length:
            raise ValueError(f"'{self._folder}' is not of the training state of this model: it lacks a part of {name}")
        return torch.cat(parts) if parts else torch.empty(0)

    def whole(self, kind: str, name: str) -> Tensor:
        """Return a tensor in its shape. Raises ValueError as `read`."""
        shape = self.shapes.get(name, ())
        return self.read(kind, name, 0, math.prod(shape)).view(shape)

    def _parts(self, kind: str, name: str, start: int, end: int) -> Iterator[Tensor]:
        for first, last, rank in self._pieces.get(name, ()):
            if first <= start < min(last, end):
                key = _key(kind, name, first)
                try:
                    part = self._file(rank).get_slice(key)[start - first : min(last, end) - first]
                except (SafetensorError, OSError) as error:
                    raise ValueError(f"'{self._folder}': {key} of rank {rank} can't be read ({error})") from error
                yield part
                start += len(part)

    def _file(self, rank: int) -> Any:
        if rank not in self._open:
            self._open[rank] = safe_open(self._folder / f"rank-{rank}.safetensors", "pt")
        return self._open[rank]


def _key(kind: str, name: str, start: int) -> str:
    return f"{kind}/{name}@{start}"
