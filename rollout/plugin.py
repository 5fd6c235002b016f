"""vLLM's plug-in of this package: the patches for the CPU in every process of vLLM, whoever starts it.

vLLM loads the entry points of `vllm.general_plugins` where it reads its arguments and in each worker before that builds
a model (vllm/plugins/__init__.py, v1/worker/worker_base.py, 0.32.0): so also in workers that Ray starts, under
`vllm serve`, and for a user's own `LLM(...)`. VLLM_PLUGINS="" turns plug-ins off.
"""

from rollout.process import bind_stores
from rollout.version import is_patched_release


def patch_cpu_build() -> None:
    """Patch vLLM in this process where it runs on the CPU, in the release that the patches were made for; on every
    device, keep the stores of its process groups on the loopback interface."""
    bind_stores()
    import vllm
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and is_patched_release(vllm.__version__):
        from rollout.cpu import patch_vllm  # names modules of one release of vLLM

        patch_vllm()
