"""docs/models.md: what each family of models can be used for, tried on a tiny random one.

python -m tests.pipeline.support docs/models.md          all columns, an engine for every family: half an hour
python -m tests.pipeline.support docs/models.md Llama    one family anew, the others as they are in the file
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from configs.sampling import RolloutConfig
from pipeline.data.trees import MicroBatch, micro_batch
from pipeline.grpo.sync import MARGINS
from pipeline.models.attention import Layout
from pipeline.models.experts import EXPERT_PARALLEL_FAMILIES
from pipeline.models.logprobs import LogprobModel, refuse_other_logits, refuse_randomness
from pipeline.models.mtp import Mtp
from pipeline.models.parity import probe_trees, sequences
from pipeline.models.rounding import perturbed_rounding
from pipeline.models.score import ScoreModel, refuse_other_scores
from pipeline.models.tokenizer import byte_tokenizer
from pipeline.weights.fused import checkpoint_tensors
from pipeline.weights.load import load_model
from pipeline.weights.reward_model import new_score_model
from rollout.weights import to_buckets
from tests.pipeline.families import FAMILIES, random_model
from tests.pipeline.small_models import load_with_mtp

ANSWER, ENGINE_SECONDS = "GRPO ", 600.0
YES, NOTHING, NOT_TRIED = "yes", "-", "not tried"
"""NOTHING stands where there is nothing to try: experts of a dense model."""
MEANINGS = {
    "SFT": "packed rows and branches of a prompt give the log-probabilities of the model's own forward pass, one "
    "sequence at a time; no segment depends on tokens that it doesn't see; every weight has a finite gradient",
    "RM": "the same for a new reward model on it",
    "GRPO": "vLLM on a CPU gives the trainer's log-probabilities, from the checkpoint and after a sync of other "
    "weights, within the bounds of a sync, in float32",
    "expert parallel": "`trainer.expert_parallel_size`: for families whose sharded layers were compared with "
    "`transformers`",
    "replay": "`routing_replay`: the routers use replayed experts, with weights from their own scores",
    "FP8": "`trainer.fp8`: products in FP8, every weight has a finite gradient",
    "MTP": "`mtp`: modules for multi-token prediction are trained too",
}
COLUMNS = tuple(MEANINGS)
TRAINED = tuple(column for column in COLUMNS if column != "GRPO")
"""What is tried without an engine."""

HEAD = """# Models: which families can be trained

Look up here if the model that you want to train is supported. `python -m tests.pipeline.support docs/models.md`
generates this page from tiny random models with the features of each family: attention, windows, groups of experts,
scaling of logits. `tests/pipeline/test_support.py` (slow) checks every cell.

Models of other families are allowed: each start runs the checks of the columns SFT and RM on its model
(`pipeline/models/parity.py`) before training begins. The models here are small; `alignyard plan` tells you if a large
one fits your machines.

"""


def table(rows: dict[str, dict[str, str]]) -> str:
    """The whole page."""
    lines = ["| column | yes means |", "|---|---|", *(f"| {name} | {text} |" for name, text in MEANINGS.items()), ""]
    lines += [f"`{NOTHING}`: nothing to try, such as the experts of a dense model, or refused in SFT already.", ""]
    lines += [f"| family | {' | '.join(COLUMNS)} |", "|" + "---|" * (1 + len(COLUMNS))]
    lines += [f"| {name} | {' | '.join(cells[column] for column in COLUMNS)} |" for name, cells in rows.items()]
    return HEAD + "\n".join(lines) + "\n"


def read_table(file: Path) -> dict[str, dict[str, str]]:
    """The rows of a page that `table` wrote."""
    rows = [line.strip("| \n").split(" | ") for line in file.read_text(encoding="utf-8").splitlines()]
    return {row[0]: dict(zip(COLUMNS, row[1:], strict=True)) for row in rows if row[0] in FAMILIES}


def saved(family: str, folder: Path) -> Path:
    """A checkpoint of a random model of the family."""
    random_model(family).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def trained_cells(family: str) -> dict[str, str]:
    """TRAINED of one family."""
    with TemporaryDirectory() as made:
        folder = saved(family, Path(made))
        tries: dict[str, Callable[[Path], str]] = {
            "SFT": _sft,
            "RM": _reward_model,
            "expert parallel": _experts_apart,
            "replay": _replay,
            "FP8": _fp8,
            "MTP": _mtp,
        }
        cells: dict[str, str] = {}
        for column, attempt in tries.items():
            cells[column] = _in_words(attempt, folder) if column == "RM" or cells.get("SFT", YES) == YES else NOTHING
    return cells


def _in_words(attempt: Callable[[Path], str], folder: Path) -> str:
    try:
        return attempt(folder)
    except ValueError as error:
        return f"refused: {reason(str(error))}"


def reason(message: str) -> str:
    """The part of an error that says why, in a table's cell."""
    for pattern, words in (
        (r"in its layers of class ([\w, ]+):", r"sequences of a row are not apart in \1"),
        (r"attention with s_aux is not", "its attention has sinks"),
        (r"attention with softcap is not", "its attention caps scores"),
        (r"computes its ([\w-]+) in a way", r"its \1 are not head(hidden state)"),
        (r"can't read packed rows", "its attention can't read packed rows"),
        (r"Unrecognized configuration class", "transformers has no form of it with a score"),
        (r"drops out at random", "drops out at random"),
        (r"mtp needs a DeepSeek-V3", "only DeepSeek-V3 has modules"),
        (r"is not of the usual form", "experts of another form"),
        (r"attention heads of (\d+)", r"no CPU kernel for heads of \1"),
    ):
        found = re.search(pattern, message)
        if found:
            return found.expand(words)
    return message.splitlines()[0][:100].replace("|", "/")


def _row(model: LogprobModel | ScoreModel) -> MicroBatch:
    return micro_batch(probe_trees(model.causal_lm if isinstance(model, LogprobModel) else model.model))


def _tensors(row: MicroBatch) -> tuple[Tensor, Layout, Tensor, Tensor]:
    token_ids_T, source_N, target_N = (torch.from_numpy(x) for x in (row.token_ids_T, row.source_N, row.target_N))
    return token_ids_T, Layout(row.lengths, row.parents), source_N, target_N


def _learns(loss: Tensor, model: torch.nn.Module) -> str:
    """YES where every weight of `model` that a token can reach has a finite gradient."""
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None and "embed" not in name]
    assert not without, f"no gradient reaches {without[:3]}"
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None), "a gradient is not finite"
    return YES


def _policy(folder: Path, *, fp8: bool = False) -> LogprobModel:
    model = load_model(folder, "float32")
    refuse_randomness(model)
    refuse_other_logits(model)
    return LogprobModel(model, fp8=fp8)


def _sft(folder: Path) -> str:
    policy = _policy(folder)
    return _learns(-policy(*_tensors(_row(policy))).sum(), policy)


def _reward_model(folder: Path) -> str:
    model = new_score_model(folder, "float32", seed=0)
    refuse_randomness(model)
    refuse_other_scores(model)
    scoring = ScoreModel(model)
    return _learns(scoring(*_tensors(_row(scoring))[:3]).square().sum(), scoring)


def _is_mixture(policy: LogprobModel) -> bool:
    return any(hasattr(module, "_apply_gate") for module in policy.modules())


def _experts_apart(folder: Path) -> str:
    policy = _policy(folder)
    if not _is_mixture(policy):
        return NOTHING
    kind = policy.causal_lm.config.model_type
    return YES if kind in EXPERT_PARALLEL_FAMILIES else f"refused: only {', '.join(EXPERT_PARALLEL_FAMILIES)}"


def _replay(folder: Path) -> str:
    policy = _policy(folder)
    if not _is_mixture(policy):
        return NOTHING
    if not policy.routers:
        return "refused: routers of an unknown kind"
    tensors = _tensors(_row(policy))
    with torch.no_grad():
        own_N = policy(*tensors)
        chosen_TLK = policy.routers.chosen_TLK
        same_N = policy(*tensors, experts_TLK=chosen_TLK)
        other_N = policy(*tensors, experts_TLK=(chosen_TLK + 1) % policy.routers.gates[0].num_experts)
    torch.testing.assert_close(same_N, own_N, rtol=0, atol=1e-4)
    assert (other_N - own_N).abs().max() > 1e-2, "other experts said the same"
    return YES


def _fp8(folder: Path) -> str:
    policy = _policy(folder, fp8=True)
    return _learns(-policy(*_tensors(_row(policy))).sum(), policy)


def _mtp(folder: Path) -> str:
    model, layers = load_with_mtp(folder, 1)
    policy = LogprobModel(model, mtp=Mtp(model, layers, detached=False))
    answer = policy(*_tensors(_row(policy)))
    return _learns(-(answer.logprobs_N.sum() + answer.mtp_logprobs_KN.sum()), policy)


def grpo_cells(families: Sequence[str]) -> Iterator[tuple[str, str]]:
    """GRPO of each family. vLLM is imported once, and each engine has a process of its own, since it leaves it full."""
    ran = subprocess.Popen(
        [sys.executable, "-m", "tests.pipeline.support", "--engines", *families],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    output, errors = ran.communicate()
    cells = dict(json.loads(line[len(ANSWER) :]) for line in output.splitlines() if line.startswith(ANSWER))
    for family in families:
        if family not in cells:
            raise RuntimeError(f"{family}: its engine's process ended without an answer\n{errors[-3000:]}")
        yield family, cells[family]


def _engines(families: Sequence[str]) -> None:
    import rollout.engine  # noqa: F401  before the forks, which then needn't

    for family in families:
        process = get_context("fork").Process(target=_answer, args=(family,))
        process.start()
        process.join(ENGINE_SECONDS)
        if process.is_alive():
            process.kill()


def _answer(family: str) -> None:
    print(ANSWER + json.dumps([family, _grpo_cell(family)]), flush=True)


def _grpo_cell(family: str) -> str:
    with TemporaryDirectory() as made:
        folder = saved(family, Path(made))
        policy = _policy(folder)
        # Read first: vLLM serves a family that it has no code for with transformers' own class, which it changes.
        saved_weights = Scores.of(policy)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
        updated_weights = Scores.of(policy)
        from rollout.engine import RolloutEngine  # vLLM, in this process alone

        config = RolloutConfig(max_model_len=64, kv_cache_gib=0.2, threads=1)
        try:
            engine = RolloutEngine(folder, config, "float32", 0)
        except (RuntimeError, ValueError, NotImplementedError, AssertionError, KeyError, AttributeError) as error:
            return f"refused: {reason(str(error))}"
        if not saved_weights.agree(engine.prompt_logprobs):
            return "refused: vLLM computes otherwise"
        model = policy.causal_lm
        tied = set(model.all_tied_weights_keys)
        tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        engine.load_weights(to_buckets(checkpoint_tensors(model, tensors).items(), 128), version=1)
        return YES if updated_weights.agree(engine.prompt_logprobs) else "refused: a sync leaves other weights"


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of the probe under a policy's present weights, and how far its rounding moves them."""

    probe: list[list[int]]
    logprobs_N: Tensor
    rounding_N: Tensor

    @classmethod
    def of(cls, policy: LogprobModel) -> "Scores":
        """Compute them."""
        probe = sequences(probe_trees(policy.causal_lm))

        def read() -> Tensor:
            parts = [
                policy(torch.tensor(ids), Layout((len(ids),), (-1,)), torch.arange(len(ids) - 1), torch.tensor(ids[1:]))
                for ids in probe
            ]
            return torch.cat(parts)

        with torch.no_grad():
            logprobs_N = read()
            with perturbed_rounding(policy.causal_lm):
                return cls(probe, logprobs_N, (read() - logprobs_N).abs())

    def agree(self, engine_logprobs: Callable[[list[list[int]]], list[list[float]]]) -> bool:
        """Return whether an engine gives the same within the bounds of a weight sync."""
        values = [value for sequence in engine_logprobs(self.probe) for value in sequence]
        gap_N, rounding_N = (torch.tensor(values) - self.logprobs_N).abs(), self.rounding_N
        print(f"gap {gap_N.mean():.1e}, {gap_N.max():.1e}; rounding {rounding_N.mean():.1e}, {rounding_N.max():.1e}")
        return bool(
            gap_N.mean() <= MARGINS.mean * rounding_N.mean() and gap_N.max() <= MARGINS.largest * rounding_N.max()
        )


def main(arguments: list[str]) -> None:
    """Write the page, or answer for one family's engine."""
    if arguments[0] == "--engines":
        _engines(arguments[1:])
        return
    file, chosen = Path(arguments[0]), arguments[1:] or list(FAMILIES)
    rows = read_table(file) if file.is_file() else {}
    rows |= {family: trained_cells(family) | {"GRPO": NOTHING} for family in chosen}
    for family, cell in grpo_cells([family for family in chosen if rows[family]["SFT"] == YES]):
        rows[family]["GRPO"] = cell
    file.write_text(table({family: rows[family] for family in FAMILIES if family in rows}), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
