"""Start-up checks: does a model give a packed row the results that it gives each sequence alone?

Both checks look at the model's behaviour, so they also hold for architectures that are not known here. One follows
gradients: the results of a segment must not depend on a token that it doesn't see, and a derivative that has to be zero
is zero in every precision. The other compares values with the model's own forward pass, one sequence at a time; its
bound is a multiple of the model's own rounding, measured (`pipeline.models.rounding`).

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
from pipeline.models.rounding import rounded_anew

LENGTHS, PARENTS = (9, 13, 11, 8, 10), (-1, -1, -1, 2, 2)
"""Two conversations, then a prompt with two branches."""
SEES = ((0,), (1,), (2,), (2, 3), (2, 4))
WINDOW = 5
"""Width that attention windows are narrowed to, so that short sequences reach beyond them as long ones do."""
WINDOWS = ("sliding_window", "attention_chunk_size", "index_topk")
MARGIN = 16.0
"""The multiple of the measured rounding that right models stay within: the largest seen of 33 families is 1.4, and the
smallest of a model that is wrong 124 (docs/numerics.md)."""
SEEDS = range(3)


def probe_trees(model: PreTrainedModel) -> list[Tree]:
    """The same random tokens for every model of that vocabulary, none of them the padding: LENGTHS as trees."""
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    ids_T = torch.randint(1, config.vocab_size, (sum(LENGTHS),), generator=generator)
    ids_T[ids_T == (-1 if config.pad_token_id is None else config.pad_token_id)] = 1 + (config.pad_token_id == 1)
    first, second, prompt, *branches = (part.tolist() for part in ids_T.split(LENGTHS))
    masks = ([0] + [1] * (len(ids) - 1) for ids in (first, second))
    conversations = [Tree(ids, root_mask=mask) for ids, mask in zip((first, second), masks, strict=True)]
    return [*conversations, Tree(prompt, [Branch(ids) for ids in branches])]


def sequences(trees: Sequence[Tree]) -> list[list[int]]:
    """Each conversation, and each branch behind its prompt."""
    return [tree.root_ids + ids for tree in trees for ids in [branch.token_ids for branch in tree.branches] or [[]]]


@contextmanager
def narrow_windows(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, every attention window of the model is at most WINDOW tokens wide."""
    holders: list[Any] = [model.config, model.config.get_text_config(), *model.modules()]
    windows = [(holder, name, getattr(holder, name, None)) for holder in holders for name in WINDOWS]
    windows = [(holder, name, value) for holder, name, value in windows if type(value) is int and value > WINDOW]
    for holder, name, _ in windows:
        setattr(holder, name, WINDOW)
    try:
        yield
    finally:
        for holder, name, value in windows:
            setattr(holder, name, value)


@contextmanager
def readable(model: PreTrainedModel) -> Iterator[None]:
    """Raise ValueError in the place of the errors that a model's code raises where it can't read packed rows."""
    try:
        yield
    except (AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{type(model).__name__} can't read packed rows: its code in transformers doesn't hand the layout to the "
            f"attention, or needs a mask of its own ({type(error).__name__}: {error}); train a model of docs/models.md"
        ) from error


def refuse_leaks(model: PreTrainedModel) -> None:
    """Raise ValueError, naming the class of the layers, for a packed `model` in which a segment's results depend on
    tokens that it doesn't see: a state along the row, or attention that ignores the layout."""
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
    model: PreTrainedModel, own: Sequence[Tensor], packed: Callable[[], Sequence[Tensor]], *, what: str
) -> None:
    """Raise ValueError where `packed()` differs from the `own` results of a model by more than rounding: in the median
    over a sequence's values, since where two experts of a router tie single tokens may differ by much.

    Both are float32 [N] for each sequence.
    """
    with torch.no_grad():
        values = packed()
        rounding = max(_apart(values, _rounded_anew(packed, model, seed)) for seed in SEEDS)
    least = torch.finfo(model.dtype).eps * max(values_N.abs().median().item() for values_N in own)
    gap = _apart(own, values)
    if not gap <= MARGIN * max(rounding, least):
        raise ValueError(
            f"{type(model).__name__} computes its {what} in a way that is not supported: in packed rows they differ by "
            f"{gap:.1e} from the model's own, where rounding makes {rounding:.1e}. Its head or its attention does more "
            "than is known here (values that are scaled or capped, another pooling, positions of its own); train a "
            "model of docs/models.md"
        )


def _rounded_anew(packed: Callable[[], Sequence[Tensor]], model: PreTrainedModel, seed: int) -> Sequence[Tensor]:
    with rounded_anew(model, seed):
        return packed()


def _apart(these: Sequence[Tensor], those: Sequence[Tensor]) -> float:
    """The largest of the sequences' median differences."""
    return max((a_N - b_N).abs().median().item() for a_N, b_N in zip(these, those, strict=True))


def _leaking(model: PreTrainedModel, row_T: Tensor) -> str | None:
    """The classes of the innermost modules that make a segment depend on tokens it doesn't see; None if none does."""
    in_and_out: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    first: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], answer: Any) -> None:
        inputs = [x for x in (*args, *kwargs.values()) if _is_of_row(x, len(row_T)) and x.requires_grad]
        output = answer[0] if isinstance(answer, tuple) else answer
        if inputs and _is_of_row(output, len(row_T)) and output.requires_grad:
            in_and_out[module] = (inputs[0], output)

    def start(_module: nn.Module, _args: Any, answer: Tensor) -> Tensor:
        first.append(answer.detach().requires_grad_())
        return first[0]

    own = [module for module in model.base_model.modules() if not type(module).__module__.startswith("torch.")]
    hooks = [module.register_forward_hook(record, with_kwargs=True) for module in own]
    hooks.append(model.get_input_embeddings().register_forward_hook(start))
    try:
        last_TD = hidden_states(model, row_T, Layout(LENGTHS, PARENTS))
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
    """Return whether a segment of `result` has a derivative with respect to a token of `source` that it doesn't see."""
    segment_T = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(0)).to(result)
    for segment, sees in enumerate(SEES):
        of_segment_T = (segment_T == segment).to(result.device)
        (gradient,) = torch.autograd.grad(
            (result * direction)[:, of_segment_T].sum(), source, retain_graph=True, allow_unused=True
        )
        unseen_T = torch.isin(segment_T, torch.tensor(sees), invert=True).to(source.device)
        if gradient is not None and gradient[:, unseen_T].any():
            return True
    return False
