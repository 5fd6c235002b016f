"""Tensors in pieces of several files, read back by other cuts; and where a rank's experts lie in the tensor of all."""

import random
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from pipeline.disk.checksums import checksum
from pipeline.train import expert_parallel
from pipeline.train.expert_parallel import place_in_fused
from pipeline.weights.pieces import PieceReader, PieceWriter

TENSORS = {"a": torch.arange(24.0).view(2, 3, 4), "b": torch.arange(7.0) + 100, "c": torch.tensor(5.0)}


def write(folder: Path, cuts: dict[str, list[int]], ranks: int) -> Path:
    """The tensors cut at these elements, the pieces dealt to the ranks."""
    held = [PieceWriter() for _ in range(ranks)]
    number = 0
    for name, tensor in TENSORS.items():
        bounds = [0, *cuts.get(name, []), tensor.numel()]
        for start, end in pairwise(bounds):
            part = tensor.flatten()[start:end]
            held[(number := number + 1) % ranks].add(
                name, tuple(tensor.shape), start, {"weight": part, "exp_avg": -part}
            )
    folder.mkdir()
    for rank, pieces in enumerate(held):
        sums = pieces.write(folder, rank, {"step": 3, "ranks": ranks})
        assert sums == {name: checksum(folder / name) for name in (f"rank-{rank}.safetensors", f"rank-{rank}.json")}
    return folder


def test_what_was_cut_one_way_is_read_in_any_other(tmp_path: Path) -> None:
    reader, choice = PieceReader(write(tmp_path / "state", {"a": [1, 9, 10, 20], "b": [3]}, 3)), random.Random(0)
    assert reader.facts["step"] == 3
    for name, tensor in TENSORS.items():
        assert torch.equal(reader.whole("weight", name), tensor)
        for _ in range(40):
            start, end = sorted(choice.choices(range(tensor.numel() + 1), k=2))
            assert torch.equal(reader.read("exp_avg", name, start, end - start), -tensor.flatten()[start:end])


def test_what_is_lacking_is_named(tmp_path: Path) -> None:
    state = write(tmp_path / "state", {"a": [1, 9]}, 2)
    for kind, name, length, message in (
        ("weight", "z", 1, "not of the training state of this model.*z"),
        ("weight", "a", 25, "lacks a part of a"),
        ("exp_avg_sq", "a", 1, r"exp_avg_sq/a@0 of rank \d can't be read"),
    ):
        with pytest.raises(ValueError, match=message):
            PieceReader(state).read(kind, name, 0, length)
    (state / "rank-1.json").unlink()
    with pytest.raises(ValueError, match=r"rank-1.json' is missing.*--fresh"):
        PieceReader(state)


class Block(nn.Module):
    """Stands in for AutoEP's layer, with the experts of the second of two ranks."""

    num_experts, num_local_experts, ep_rank = 4, 2, 1


@pytest.mark.parametrize(("start", "length"), [(0, 60), (7, 31), (30, 30), (59, 1), (12, 0)])
def test_a_ranks_experts_have_their_place_among_all(monkeypatch: pytest.MonkeyPatch, start: int, length: int) -> None:
    monkeypatch.setattr(expert_parallel, "AutoEPMoELayer", Block)
    model = nn.ModuleDict({"mlp": Block()})
    gate, up, down = (torch.randn(4, *shape) for shape in ((6, 5), (6, 5), (5, 6)))
    fused = {"mlp.experts.gate_up_proj": torch.cat([gate, up], dim=1), "mlp.experts.down_proj": down}
    for part, every in (("w1", gate), ("w3", up), ("w2", down)):
        own = every[2:]
        place = place_in_fused(model, f"mlp.experts.{part}", cast(Any, own.shape))
        assert place.shape == tuple(fused[place.name].shape)
        flat, covered = fused[place.name].flatten(), 0
        for at, first, run in place.runs(start, length):
            assert torch.equal(flat[at : at + run], own.flatten()[first : first + run])
            covered += run
        assert covered == length
