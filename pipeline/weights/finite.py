"""Check that all weights of a checkpoint are finite.

The check reads the exponent bits from memory-mapped files and converts nothing, so it runs at the speed of the disk.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from huggingface_hub import parse_local_safetensors_file_metadata

_EXPONENT_BITS = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
    "F8_E5M2": (np.uint8, 0x7C),
    "F8_E4M3": (np.uint8, 0x7F),
}
"""An integer type of the width of each safetensors dtype, and the bits that are all set in an infinity or NaN. E4M3 has
no infinity and one NaN."""
_CHUNK_ELEMENTS = 2**24
_THREADS = 8


def refuse_nonfinite(folder: Path) -> None:
    """Raise ValueError with the names of the tensors that hold a NaN or an infinity."""
    files = sorted(folder.glob("*.safetensors"))
    with ThreadPoolExecutor(_THREADS) as pool:
        tensors = [name for names in pool.map(_nonfinite, files) for name in names]
    if tensors:
        raise ValueError(
            f"checkpoint '{folder}' holds numbers that are not finite (NaN or infinity) in {len(tensors)} tensors: "
            f"{', '.join(tensors[:5])}; export it again, or start from an earlier checkpoint"
        )


def _nonfinite(file: Path) -> list[str]:
    """Return the names of the tensors in `file` that hold a NaN or an infinity."""
    header = parse_local_safetensors_file_metadata(file)
    with file.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
    names: list[str] = []
    for name, tensor in header.tensors.items():
        if tensor.dtype not in _EXPONENT_BITS or tensor.data_offsets[0] == tensor.data_offsets[1]:
            continue
        kind, bits = _EXPONENT_BITS[tensor.dtype]
        first, end = tensor.data_offsets
        count = (end - first) // np.dtype(kind).itemsize
        numbers = np.memmap(file, kind, "r", offset=start + first, shape=(count,))
        mask = kind(bits)
        chunks = (numbers[i : i + _CHUNK_ELEMENTS] for i in range(0, count, _CHUNK_ELEMENTS))
        if any(((chunk & mask) == mask).any() for chunk in chunks):
            names.append(name)
    return names
