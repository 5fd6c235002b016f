"""Distillation against numbers worked by hand, against the whole logits, and over ranks."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from configs.distill import DistillConfig, DistillObjective
from pipeline.data.prompts import Prompt
from pipeline.data.trees import Branch, Tree, micro_batch
from pipeline.models.attention import Layout
from pipeline.models.logprobs import LogprobModel, TeacherTokens
from pipeline.models.tokenizer import byte_tokenizer
from pipeline.objectives.distillation import StudentTokens, distillation_loss, reverse_kl, sampled_divergence
from pipeline.stages.distill import lessons, refuse_other_tokens
from pipeline.train.losses import batch_loss
from pipeline.weights.fresh import create_model
from rewards.types import Task
from rollout.types import Completion, Group, StoredGroup
from tests.pipeline import distill_ranks
from tests.pipeline.rank_processes import run_ranks
from tests.pipeline.sharding import filled, shard, stored
from tests.pipeline.small_models import SMALLEST

STUDENT, TEACHER = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]
LN2 = math.log(2)
# D = 1/2 ln(2) + 1/4 ln(1) + 1/4 ln(1/2) = 1/4 ln 2
BY_HAND = 0.25 * LN2
# p_v (ln(p_v / q_v) - D): 1/2 (1 - 1/4) ln 2, 1/4 (0 - 1/4) ln 2, 1/4 (-1 - 1/4) ln 2
GRADIENT_BY_HAND = [0.375 * LN2, -0.0625 * LN2, -0.3125 * LN2]


def logits(probabilities: list[float], shift: float) -> Tensor:
    return (torch.tensor([probabilities]).log() + shift).requires_grad_()


# -- the divergence ----------------------------------------------------------------------------------------------------


def test_the_divergence_and_its_gradient_by_hand() -> None:
    student = logits(STUDENT, 3.0)
    divergence, logprobs = reverse_kl(
        logits_CV=student * 1, teacher_logits_CV=logits(TEACHER, -7.0).detach(), target_C=torch.tensor([2])
    )
    (2 * divergence).backward()
    torch.testing.assert_close(divergence, torch.tensor([BY_HAND]))
    torch.testing.assert_close(logprobs, torch.tensor([math.log(0.25)]))
    assert student.grad is not None and not logprobs.requires_grad
    torch.testing.assert_close(student.grad, 2 * torch.tensor([GRADIENT_BY_HAND]))


def test_logits_of_any_size_give_a_finite_divergence() -> None:
    student, teacher = torch.tensor([[1e4, 0.0, -1e4]]), torch.tensor([[1e4 - 3, 0.0, 1e4]])
    divergence, _ = reverse_kl(logits_CV=student, teacher_logits_CV=teacher, target_C=torch.tensor([0]))
    # the student is certain of token 0, of which the teacher's log-probability is -3 - ln(1 + e^-3)
    torch.testing.assert_close(divergence, torch.tensor([3 + math.log1p(math.exp(-3))]))


def test_the_sampled_form_has_the_full_forms_gradient_in_expectation() -> None:
    student, teacher = logits(STUDENT, 0.0), logits(TEACHER, 0.0).detach().log_softmax(1)[0]
    expected = torch.zeros(3)
    for token in range(3):
        logprobs = student.log_softmax(1)[0]
        term = sampled_divergence(logprobs_N=logprobs[token], teacher_logprobs_N=teacher[token])
        expected += STUDENT[token] * torch.autograd.grad(term, student)[0][0]
    torch.testing.assert_close(expected, torch.tensor(GRADIENT_BY_HAND))


def test_the_loss_by_hand() -> None:
    # weights 1/2 and 2, divergences 0.3 and 0.1, denominator 4: (0.15 + 0.2) / 4
    tokens = StudentTokens(
        torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0]), torch.tensor([0.5, 2.0]), torch.tensor([0, 1]), 2
    )
    divergence = torch.tensor([0.3, 0.1])
    loss, sums, maxima = distillation_loss(divergence, divergence, tokens, denominator=4.0)
    assert loss.item() == pytest.approx(0.0875)
    assert sums["loss/reverse_kl_mean"].item() == pytest.approx(0.4)
    assert sums["mismatch/abs_mean"].item() == maxima["mismatch/sequence_max"].item() == pytest.approx(0.5)


# -- in chunks, through the teacher's head -----------------------------------------------------------------------------


def llama(seed: int, **changes: Any) -> LogprobModel:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SMALLEST | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20 if parameter.dim() > 1 else 1)
    return LogprobModel(model)


def texts(num: int, length: int, vocab: int) -> list[Tree]:
    rng = np.random.default_rng(0)
    columns = {"rollout_logprobs": [0.0] * length, "weights": [1.0] * length}
    return [
        Tree(rng.integers(3, vocab, 4).tolist(), [Branch(rng.integers(3, vocab, length).tolist(), columns)])
        for _ in range(num)
    ]


def distil(student: LogprobModel, teacher: LogprobModel, trees: list[Tree]) -> float:
    """Add the gradient of the full form to the student, as a rank does, and return the loss."""
    row = micro_batch(trees)
    ids, source, target = (torch.from_numpy(x) for x in (row.token_ids_T, row.source_N, row.target_N))
    layout = Layout(row.lengths, row.parents)
    with torch.no_grad():
        hidden = teacher(ids, layout, source, None)
    head = teacher.causal_lm.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    output = student(ids, layout, source, target, teacher=TeacherTokens(hidden, head.weight.detach(), None))
    loss, _, _ = batch_loss(DistillObjective(), row, output, denominator=float(len(row.target_N)))
    loss.backward()
    return loss.item()


def gradients(model: LogprobModel) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_chunks_give_the_loss_and_gradient_of_the_whole_logits() -> None:
    teacher = llama(1, hidden_size=48, num_hidden_layers=1, vocab_size=112)  # of another size, its vocabulary padded
    trees, losses, found = texts(3, 9, 97), [], []
    for chunk_tokens in (4, 1000):
        student = llama(0)
        student.chunk_tokens = chunk_tokens
        losses.append(distil(student, teacher, trees))
        found.append(gradients(student))
    student = llama(0)
    row = micro_batch(trees)
    ids, source = torch.from_numpy(row.token_ids_T), torch.from_numpy(row.source_N)
    layout = Layout(row.lengths, row.parents)
    student_logprobs, teacher_logprobs = (
        model.causal_lm.get_output_embeddings()(model(ids, layout, source, None))[:, :97].log_softmax(1)
        for model in (student, teacher)
    )
    whole = (student_logprobs.exp() * (student_logprobs - teacher_logprobs.detach())).sum(1).mean()
    whole.backward()
    assert whole.item() > 0.1
    assert losses == pytest.approx([whole.item()] * 2, rel=1e-5)
    for gradient in found:
        torch.testing.assert_close(gradient, gradients(student), rtol=1e-4, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """The elements of the largest tensor that an operation returns within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("num_texts", [4, 16])
def test_no_tensor_grows_with_vocabulary_times_length(num_texts: int) -> None:
    vocabulary, chunk = 4000, 64
    student, teacher = llama(0, vocab_size=vocabulary), llama(1, vocab_size=vocabulary)
    student.chunk_tokens = chunk
    with LargestTensor() as largest:
        distil(student, teacher, texts(num_texts, 40, vocabulary))
    assert largest.elements == chunk * vocabulary  # of 160 and of 640 tokens


# -- teachers and their rows -------------------------------------------------------------------------------------------

CONFIG: dict[str, Any] = {
    "type": "distill",
    "model": {"path": "student"},
    "teachers": {"math": {"model": {"path": "a"}}, "code": {"model": {"path": "b"}, "weight": 0.5}},
    "prompts": {"source": {"type": "sums", "size": 10}, "max_prompt_length": 16},
    "steps": 1,
    "prompts_per_step": 2,
    "sampling": {"max_tokens": 8},
    "optimizer": {"learning_rate": 1e-3},
    "rollout": {"max_model_len": 32},
}


def batch(*domains: str) -> list[tuple[Prompt, StoredGroup]]:
    """A prompt of each domain, with one completion: of two tokens, then of four."""
    return [
        (
            Prompt([1, 2], Task(prompt="", truth=None, metadata={"domain": domain})),
            stored(Group(index, [1, 2], [Completion([5] * 2 * (index + 1), [-1.0] * 2 * (index + 1), "", "stop", 0)])),
        )
        for index, domain in enumerate(domains)
    ]


def weights(trees: list[Tree]) -> list[float]:
    return [
        float(weight) for tree in map(filled, trees) for branch in tree.branches for weight in branch.columns["weights"]
    ]


def test_every_teacher_teaches_every_row_by_its_weight() -> None:
    config = DistillConfig.model_validate(CONFIG)
    trees, denominator = lessons(batch("math", "code"), config, step=1)
    assert denominator == 6  # tokens, whatever the number of teachers
    assert {name: weights(of_teacher) for name, of_teacher in trees.items()} == {"math": [1.0] * 6, "code": [0.5] * 6}
    assert list(trees) == ["math", "code"]
    assert list(lessons(batch("math"), config, step=2)[0]) == ["code", "math"]  # the one in memory comes first


def test_a_column_selects_the_teacher_of_a_row() -> None:
    teachers = {"math": {"model": {"path": "a"}, "domains": ["sums", "logic"]}, "code": {"model": {"path": "b"}}}
    objective = {"aggregation": "sequence"}
    changes = {"teachers": teachers, "domain_column": "domain", "objective": objective}
    config = DistillConfig.model_validate(CONFIG | changes)
    trees, denominator = lessons(batch("code", "logic"), config, step=1)
    assert denominator == 2  # completions
    assert {name: weights(of_teacher) for name, of_teacher in trees.items()} == {"math": [0.25] * 4, "code": [0.5] * 2}
    assert config.teachers_of("math") == []


def test_tokenizers_that_differ_are_refused_by_name(tmp_path: Path) -> None:
    own = create_model("tiny", 0, tmp_path / "student")
    other = create_model("tiny", 1, tmp_path / "other")
    student = byte_tokenizer()
    assert refuse_other_tokens(own, student, {"same": other}) == []
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(other)
    assert "teacher 'same' has another chat template" in refuse_other_tokens(own, student, {"same": other})[0]
    file = other / "tokenizer.json"
    file.write_text(file.read_text().replace("<|spare_0|>", "<think>"))
    with pytest.raises(ValueError, match=r"(?s)teachers.math.model.path=.*2 tokens differ.*'<think>' with id 6"):
        refuse_other_tokens(own, student, {"math": other})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teachers": {"a": {"model": {"path": "a"}, "weight": 2.0}}}, "a single teacher has no effect"),
        ({"teachers": {"a": {"model": {"path": "a"}, "domains": ["x"]}}}, "has no effect without domain_column"),
        ({"teachers": {"a": {"model": {"path": "a", "chat_template": "chatml"}}}}, "reads the student's tokens"),
        ({"prompts": CONFIG["prompts"] | {"reward": "math"}}, "prompts.reward has no effect"),
        ({"sampling": {"max_tokens": 30}}, r"max_prompt_length=\d+ \+ .* exceeds rollout.max_model_len"),
        ({"trainer": {"num_ranks": 4}}, "lower num_ranks"),
        ({"trainer": {"fp8": True}}, "must be given with trainer.fp8"),
    ],
)
def test_settings_without_effect_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillConfig.model_validate(CONFIG | change)


def test_a_rank_without_a_row_of_a_teacher_gets_an_untrained_one() -> None:
    ranks = shard(texts(1, 3, 97), num_ranks=2, micro_batch_tokens=64)
    assert [[len(row.target_N) for row in rows] for rows in ranks] == [[3], [0]]


@pytest.mark.ranks
def test_ranks_and_zero_stages_agree(tmp_path: Path) -> None:
    """Two teachers in turn, twice; the second update starts with the one in memory. One teacher has a single row, so a
    rank of two has none of it."""
    models = [create_model("tiny", seed, tmp_path / f"tiny-{seed}") for seed in range(3)]
    traces = []
    for ranks, zero in ((1, 1), (2, 3)):
        out = tmp_path / f"trace-{ranks}.npz"
        run_ranks(distill_ranks.main, ranks, tmp_path, *models, out, zero)
        traces.append(dict(np.load(out)))
    for name, tolerance in (("losses", 2e-5), ("grad_norms", 2e-4)):
        np.testing.assert_allclose(traces[1][name], traces[0][name], rtol=tolerance)
    np.testing.assert_allclose(traces[1]["weights"], traces[0]["weights"], atol=2e-5)
    assert traces[0]["losses"][1] < traces[0]["losses"][0]
