"""Check at start-up that a model gives a packed row the same results as each sequence alone.

The checks test behaviour, so they also cover unknown architectures. The first follows gradients: the results of a
segment must not depend on a token that it doesn't see, and that derivative is exactly zero in every precision. The
second compares values with the model's own forward pass, one sequence at a time. Its bound is a multiple of the
model's measured rounding (`pipeline.models.rounding`).

Legend: T tokens of the packed row, D model width, N compared values.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.data.trees import Branch, Tree, micro_batch
from pipeline.models.attention import Layout
from pipeline.models.packed import hidden_states
from pipeline.models.rounding import perturbed_rounding

_LENGTHS, _PARENTS = (9, 13, 11, 8, 10), (-1, -1, -1, 2, 2)
"""Layout of the probe row: two conversations, then a prompt with two branches."""
_VISIBLE = ((0,), (1,), (2,), (2, 3), (2, 4))
_PROBE_WINDOW = 5
"""Width of attention windows during the check, so that short sequences are longer than them."""
_WINDOW_SETTINGS = ("sliding_window", "attention_chunk_size", "index_topk")
_MARGIN = 16.0
"""Bound in multiples of the measured rounding. The largest gap of 33 supported families is 1.4, the smallest of a wrong
model 124 (docs/numerics.md)."""
_SEEDS = range(3)


def probe_trees(model: PreTrainedModel) -> list[Tree]:
    """Return trees of random tokens without padding, the same for every model of one vocabulary."""
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(1, config.vocab_size, (sum(_LENGTHS),), generator=generator)
    ids_T[ids_T == (-1 if config.pad_token_id is None else config.pad_token_id)] = 1 + (config.pad_token_id == 1)
    first, second, prompt, *branches = (part.tolist() for part in ids_T.split(_LENGTHS))
    masks = ([0] + [1] * (len(ids) - 1) for ids in (first, second))
    conversations = [Tree(ids, root_mask=mask) for ids, mask in zip((first, second), masks, strict=True)]
    return [*conversations, Tree(prompt, [Branch(ids) for ids in branches])]


def sequences(trees: Sequence[Tree]) -> list[list[int]]:
    """Return the token ids of each conversation, and of each branch with its prompt."""
    return [[*tree.root_ids, *ids] for tree in trees for ids in [branch.token_ids for branch in tree.branches] or [[]]]


@contextmanager
def narrow_windows(model: PreTrainedModel) -> Iterator[None]:
    """Narrow every attention window of the model to at most _PROBE_WINDOW tokens within the block."""
    holders: list[Any] = [model.config, model.config.get_text_config(), *model.modules()]
    windows = [(holder, name, getattr(holder, name, None)) for holder in holders for name in _WINDOW_SETTINGS]
    windows = [(holder, name, value) for holder, name, value in windows if type(value) is int and value > _PROBE_WINDOW]
    for holder, name, _ in windows:
        setattr(holder, name, _PROBE_WINDOW)
    try:
        yield
    finally:
        for holder, name, value in windows:
            setattr(holder, name, value)


@contextmanager
def readable(model: PreTrainedModel) -> Iterator[None]:
    """Raise ValueError instead of the errors of a model's code that can't read packed rows."""
    try:
        yield
    except (AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{type(model).__name__} can't read packed rows: its code in transformers doesn't hand the layout to the "
            f"attention, or needs a mask of its own ({type(error).__name__}: {error}); train a model of docs/models.md"
        ) from error


def refuse_leaks(model: PreTrainedModel) -> None:
    """Raise ValueError if a segment of a packed `model` depends on tokens that it doesn't see.

    Causes are a state along the row and attention that ignores the layout. The message names the class of the layers.
    """
    row_T = torch.from_numpy(micro_batch(probe_trees(model)).token_ids_T)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            leaking = _leaking(model, row_T)
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
    if leaking is not None:
        raise ValueError(
            f"{type(model).__name__} carries something from one sequence of a packed row into the next, in its layers "
            f"of class {leaking}: sequences would learn from their neighbours. Layers with a state along the row "
            "(linear attention, state-space, convolutions) and attention with masks of its own can't be trained "
            "here; take a model whose layers mix tokens by attention of transformers' usual form (docs/models.md)"
        )


def refuse_other_values(
    model: PreTrainedModel, own: Sequence[Tensor], packed: Callable[[], Sequence[Tensor]], *, quantity: str
) -> None:
    """Raise ValueError if the results of `packed` differ from the model's `own` results by more than rounding.

    Both are float32 [N] for each sequence. The median over a sequence is compared, because a token can differ by much
    when two experts of a router are nearly tied. `quantity` names the results in the message.
    """
    with torch.no_grad():
        values = packed()
        rounding = max(_gap(values, _perturbed(packed, model, seed)) for seed in _SEEDS)
    least = torch.finfo(model.dtype).eps * max(values_N.abs().median().item() for values_N in own)
    gap = _gap(own, values)
    if not gap <= _MARGIN * max(rounding, least):
        raise ValueError(
            f"{type(model).__name__} computes its {quantity} in a way that is not supported: in packed rows they "
            f"differ by {gap:.1e} from the model's own, where rounding makes {rounding:.1e}. Its head or its attention "
            "does more than is known here (values that are scaled or capped, another pooling, positions of its own); "
            "train a model of docs/models.md"
        )


def _perturbed(packed: Callable[[], Sequence[Tensor]], model: PreTrainedModel, seed: int) -> Sequence[Tensor]:
    with perturbed_rounding(model, seed):
        return packed()


def _gap(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Return the largest median difference of a sequence."""
    return max((a_N - b_N).abs().median().item() for a_N, b_N in zip(first, second, strict=True))


def _leaking(model: PreTrainedModel, row_T: Tensor) -> str | None:
    """Name the classes of the innermost modules that make a segment depend on tokens it doesn't see, if any."""
    in_and_out: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    first: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        inputs = [x for x in (*args, *kwargs.values()) if _is_of_row(x, len(row_T)) and x.requires_grad]
        output = result[0] if isinstance(result, tuple) else result
        if inputs and _is_of_row(output, len(row_T)) and output.requires_grad:
            in_and_out[module] = (inputs[0], output)

    def start(_module: nn.Module, _args: Any, embeddings: Tensor) -> Tensor:
        first.append(embeddings.detach().requires_grad_())
        return first[0]

    own = [module for module in model.base_model.modules() if not type(module).__module__.startswith("torch.")]
    hooks = [module.register_forward_hook(record, with_kwargs=True) for module in own]
    hooks.append(model.get_input_embeddings().register_forward_hook(start))
    try:
        last_TD = hidden_states(model, row_T, Layout(_LENGTHS, _PARENTS))
    finally:
        for hook in hooks:
            hook.remove()
    if not _depends_on_others(first[0], last_TD.unsqueeze(0)):
        return None
    leaking = {module for module, (source, result) in in_and_out.items() if _depends_on_others(source, result)}
    innermost = [module for module in leaking if leaking.isdisjoint(set(module.modules()) - {module})]
    return ", ".join(sorted({type(module).__name__ for module in innermost or [model]}))


def _is_of_row(value: Any, length: int) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape[:2] == (1, length)


def _depends_on_others(source: Tensor, result: Tensor) -> bool:
    """Return True if a segment of `result` has a derivative by a token of `source` that it doesn't see."""
    segment_T = torch.repeat_interleave(torch.arange(len(_LENGTHS)), torch.tensor(_LENGTHS))
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(0)).to(result)
    for segment, visible in enumerate(_VISIBLE):
        of_segment_T = (segment_T == segment).to(result.device)
        (gradient,) = torch.autograd.grad(
            (result * direction)[:, of_segment_T].sum(), source, retain_graph=True, allow_unused=True
        )
        unseen_T = torch.isin(segment_T, torch.tensor(visible), invert=True).to(source.device)
        if gradient is not None and gradient[:, unseen_T].any():
            return True
    return False
