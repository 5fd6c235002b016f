"""vLLM's plug-in: a process that we don't start computes as the engines do. Workers of Ray: test_ray_executor.py."""

from collections.abc import Callable

import pytest
import vllm
from vllm.platforms import current_platform

from rollout import cpu, plugin
from tests.rollout import tiny
from tests.rollout.variants import Gaps, gaps_of

pytestmark = pytest.mark.engine

SCRIPT = """
import rollout.engine  # sets vLLM up, before it is imported; patches nothing
from tests.rollout import tiny
from vllm import LLM, SamplingParams, TokensPrompt

def measure(root):
    model = tiny.moe(0)
    llm = LLM(
        str(tiny.save(model, root / "model")), dtype="float32", enforce_eager=True, skip_tokenizer_init=True,
        distributed_executor_backend="uni", attention_backend="CPU_MLA", max_model_len=160, block_size=32,
        kv_cache_memory_bytes=2**27,
    )
    prompts = [TokensPrompt(prompt_token_ids=prompt) for prompt in tiny.PROMPTS]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
    own = [
        [logprobs[token].logprob for token, logprobs in zip(prompt[1:], output.prompt_logprobs[1:])]
        for prompt, output in zip(tiny.PROMPTS, outputs)
    ]
    return [tiny.prompt_gap(model, own)]
"""
VARIANTS = {
    "as installed": ({"VLLM_MLA_DISABLE": "1"},),
    "without plug-ins": ({"VLLM_MLA_DISABLE": "1", "VLLM_PLUGINS": ""},),
}


@pytest.fixture(scope="module")
def gaps(tmp_path_factory: pytest.TempPathFactory) -> Gaps:
    return gaps_of(SCRIPT, VARIANTS, tmp_path_factory.mktemp("variants"))


def test_a_users_own_engine_is_patched(gaps: Gaps) -> None:
    assert tiny.within_bounds(gaps["as installed"][0])
    assert gaps["without plug-ins"][0][0] > 1e-3


@pytest.mark.parametrize(("version", "on_cpu"), [("0.32.1", True), ("0.32.0+cu129", False)])
def test_another_release_and_another_device_are_left_alone(
    version: str, on_cpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise AssertionError("patched")

    monkeypatch.setattr(cpu, "patch_vllm", refuse)
    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: on_cpu)
    plugin.patch_cpu_build()


def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "entry_points", lambda **_: ())


def kept_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "another")


@pytest.mark.parametrize(
    ("arrange", "remedy"),
    [(nothing_installed, "make setup"), (kept_out, "unset the variable")],
    ids=["old", "kept out"],
)
def test_workers_that_would_not_load_it_are_refused(
    arrange: Callable[[pytest.MonkeyPatch], None], remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu.refuse_unpatched_workers()
    arrange(monkeypatch)
    with pytest.raises(RuntimeError, match=remedy):
        cpu.refuse_unpatched_workers()
