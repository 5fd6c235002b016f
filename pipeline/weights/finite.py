"""A check that all weights of a checkpoint are finite, made on the bits of its files.

An infinity or a NaN shows in a few bits of a number, so nothing is converted, and a file that is mapped into memory is
read at the speed of the disk.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from huggingface_hub import parse_local_safetensors_file_metadata

NOT_FINITE = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F8_E5M2": (np.uint8, 0x7C),
    "F8_E4M3": (np.uint8, 0x7F),
}
"""For each type, as safetensors files name it: an integer of that width, and the bits that are all set in a number that
is not finite (E4M3 has no infinity, and one NaN)."""
CHUNK = 2**24
THREADS = 8


def refuse_nonfinite(folder: Path) -> None:
    """Raise ValueError naming the tensors of a checkpoint's safetensors files that hold a NaN or an infinity."""
    files = sorted(folder.glob("*.safetensors"))
    with ThreadPoolExecutor(THREADS) as pool:
        tensors = [name for names in pool.map(_nonfinite, files) for name in names]
    if tensors:
        raise ValueError(
            f"checkpoint '{folder}' holds numbers that are not finite (NaN or infinity) in {len(tensors)} tensors: "
            f"{', '.join(tensors[:5])}; export it again, or start from an earlier checkpoint"
        )


def _nonfinite(file: Path) -> list[str]:
    """The names of the tensors of one file that are not finite everywhere."""
    header = parse_local_safetensors_file_metadata(file)
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
    names: list[str] = []
    for name, tensor in header.tensors.items():
        if tensor.dtype not in NOT_FINITE or tensor.data_offsets[0] == tensor.data_offsets[1]:
            continue
        kind, bits = NOT_FINITE[tensor.dtype]
        first, end = tensor.data_offsets
        count = (end - first) // np.dtype(kind).itemsize
        numbers = np.memmap(file, kind, "r", offset=start + first, shape=(count,))
        mask = kind(bits)
        if any(((part & mask) == mask).any() for part in (numbers[i : i + CHUNK] for i in range(0, count, CHUNK))):
            names.append(name)
    return names
