"""Our losses beside those of TRL, verl and OpenRLHF on the same random batches; writes the table of docs/algorithm.md.

`make test-peers` runs it. A difference of a loss, or of its gradient in any log-probability, above LIMIT fails.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.dpo import DpoLoss
from configs.grpo import ObjectiveConfig
from pipeline.objectives.advantage import group_advantage, leave_one_out_advantage
from pipeline.objectives.aggregate import batch_denominator, token_weight
from pipeline.objectives.direct import ComparedAnswers, dpo_loss
from pipeline.objectives.policy import PolicyTokens, grpo_loss
from pipeline.objectives.preference import ScoredAnswers, pairwise_loss
from tests.peers.peers import (
    FOLDER,
    VERSIONS,
    Actor,
    PaddedBatch,
    load,
    trl_dpo_loss,
    trl_policy_loss,
    trl_reward_loss,
)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FOLDER.is_dir(), reason="`make test-peers` installs the peers")]
PEERS = ("trl", "verl", "openrlhf")
LIMIT = 1e-6
PAGE = Path(__file__).parents[2] / "docs" / "algorithm.md"
START, END = "<!-- `make test-peers` writes this table -->", "<!-- end of the table -->"
GROUPS, GROUP, LENGTH = 2, 4, 12
INLINE = "in its rollout code, not callable"
NONE = "none"

Loss = Callable[[PaddedBatch], Tensor]
cells: dict[str, dict[str, str]] = {}
values: list[float] = []
"""Our loss of the first batch in each case: where two are equal, a setting had no effect on it."""


@pytest.fixture(scope="module")
def theirs(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The peers' modules; when all cases agree, their table is written."""
    yield load()
    if request.session.testsfailed:
        return
    names = {"trl": "TRL", "verl": "verl", "openrlhf": "OpenRLHF"}
    lines = [["objective", *(f"{names[peer]} {VERSIONS[peer]}" for peer in PEERS)], ["---"] * 4]
    lines += [[case, *(of_case[peer] for peer in PEERS)] for case, of_case in cells.items()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    before, rest = PAGE.read_text().split(START)
    PAGE.write_text(f"{before}{START}\n\n{table}\n\n{END}{rest.split(END)[1]}")


def batches() -> Iterator[PaddedBatch]:
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)

        def normal(scale: float, *shape: int, generator: torch.Generator = generator) -> Tensor:
            return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

        size = (GROUPS * GROUP, LENGTH)
        lengths = torch.randint(1, LENGTH + 1, (size[0], 1), generator=generator)
        mask = (torch.arange(LENGTH)[None] < lengths).double()
        logprobs = -normal(1.0, *size).abs() - 0.1
        others = [logprobs + normal(scale, *size) for scale in (0.3, 0.2, 0.5)]
        yield PaddedBatch(logprobs, *others, mask, normal(1.0, size[0]))


def compare(case: str, ours: Loss, peers: dict[str, Loss | str]) -> None:
    """Record the largest difference of loss and gradient to each peer over all batches, or why there is none."""
    cells[case] = {}
    values.append(ours(next(batches())).item())
    assert len(set(values)) == len(values), f"{case}: its settings have no effect"
    for peer in PEERS:
        loss = peers.get(peer, NONE)
        if isinstance(loss, str):
            cells[case][peer] = loss
            continue
        difference = 0.0
        for batch in batches():
            (our_loss, our_gradient), (their_loss, their_gradient) = (with_gradient(f, batch) for f in (ours, loss))
            assert bool((our_gradient != 0).any())
            gap = max((our_loss - their_loss).abs().item(), (our_gradient - their_gradient).abs().max().item())
            difference = max(difference, gap)
        cells[case][peer] = power_of_ten(difference)
        assert difference < LIMIT, f"{case}: {peer} {VERSIONS[peer]} differs by {difference:.2g}"


def power_of_ten(difference: float) -> str:
    return f"1e{math.ceil(math.log10(max(difference, 1e-14)))}"  # less is rounding, another on each machine


def with_gradient(loss: Loss, batch: PaddedBatch) -> tuple[Tensor, Tensor]:
    leaf = batch.logprobs.clone().requires_grad_()
    value = loss(batch._replace(logprobs=leaf))
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad * batch.mask


def ours(**settings: Any) -> Loss:
    objective = ObjectiveConfig.model_validate({"kl_coef": 0.0} | settings)

    def loss(batch: PaddedBatch) -> Tensor:
        kept = batch.mask.bool()
        lengths = [int(n) for n in batch.mask.sum(1)]
        weights = [token_weight(objective.aggregation, length=n, max_tokens=LENGTH) for n in lengths]
        tokens = PolicyTokens(
            logprobs_N=batch.logprobs[kept],
            policy_logprobs_N=batch.old[kept],
            rollout_logprobs_N=batch.rollout[kept],
            ref_logprobs_N=batch.reference[kept] if objective.kl_coef else None,
            advantages_N=batch.advantages[:, None].expand_as(batch.mask)[kept],
            weights_N=torch.tensor(weights, dtype=torch.float64)[:, None].expand_as(batch.mask)[kept],
            sequence_N=torch.arange(len(lengths))[:, None].expand_as(batch.mask)[kept],
            num_sequences=len(lengths),
        )
        return grpo_loss(tokens, objective, denominator=batch_denominator(objective.aggregation, lengths)).loss

    return loss


def verl(
    theirs: Any, name: str, aggregation: str, correction: tuple[str, str | float] | None = None, **actor: Any
) -> Loss:
    settings = {"clip_ratio": 0.2, "clip_ratio_low": 0.2, "clip_ratio_high": 0.2, "clip_ratio_c": 1e9} | actor
    scale = {"loss_scale_factor": LENGTH} if aggregation.endswith("norm") else {}
    config = Actor(**settings, global_batch_info=scale)

    def loss(batch: PaddedBatch) -> Tensor:
        weights = None
        if correction is not None:
            weights, _ = theirs.correction.compute_rollout_correction_weights(
                batch.old - batch.rollout, batch.mask, *correction
            )
        function = getattr(theirs.verl, f"compute_policy_loss_{name}")
        advantages = batch.advantages[:, None] * batch.mask
        return function(batch.old, batch.logprobs, advantages, batch.mask, aggregation, config, weights)[0]

    return loss


def openrlhf(theirs: Any, **settings: Any) -> Loss:
    def loss(batch: PaddedBatch) -> Tensor:
        advantages = batch.advantages[:, None] * batch.mask
        return theirs.openrlhf.PolicyLoss(**settings)(batch.logprobs, batch.old, advantages, batch.mask, batch.rollout)[
            0
        ]

    return loss


def trl(theirs: Any, **settings: Any) -> Loss:
    return lambda batch: trl_policy_loss(theirs.grpo, batch, **settings)


def test_policy_losses(theirs: Any) -> None:
    sequence, token = "seq-mean-token-mean", "token-mean"
    rloo: Loss = lambda batch: trl_policy_loss(theirs.rloo, batch)  # noqa: E731
    compare(
        "GRPO",
        ours(),
        {
            "trl": trl(theirs),
            "verl": verl(theirs, "vanilla", sequence),
            "openrlhf": openrlhf(theirs, token_level_loss=False),
        },
    )
    compare(
        "DAPO: clip-higher, mean over tokens",
        ours(preset="dapo"),
        {
            "trl": trl(theirs, loss_type="dapo", epsilon_high=0.28),
            "verl": verl(theirs, "vanilla", token, clip_ratio_high=0.28),
            "openrlhf": openrlhf(theirs, clip_eps_high=0.28),
        },
    )
    compare(
        "Dr. GRPO",
        ours(preset="dr_grpo"),
        {"trl": trl(theirs, loss_type="dr_grpo"), "verl": verl(theirs, "vanilla", "seq-mean-token-sum-norm")},
    )
    bounds = {"clip_low": 0.05, "clip_high": 0.06}
    compare(
        "GSPO",
        ours(ratio="sequence", **bounds),
        {
            "trl": trl(theirs, importance_sampling_level="sequence", epsilon_low=0.05, epsilon_high=0.06),
            "verl": verl(theirs, "gspo", sequence, clip_ratio_low=0.05, clip_ratio_high=0.06),
            "openrlhf": openrlhf(theirs, policy_loss_type="gspo", clip_eps_low=0.05, clip_eps_high=0.06),
        },
    )
    compare(
        "CISPO",
        ours(preset="cispo", clip_high=0.2),
        {
            "trl": trl(theirs, loss_type="cispo", epsilon_high=1.2),
            "verl": verl(theirs, "cispo", token, clip_ratio_low=1.0),
        },
    )
    compare("RLOO: ratio of completions", ours(preset="rloo"), {"trl": rloo})
    compare(
        "dual clip",
        ours(clip_dual=1.3),
        {
            "trl": trl(theirs, delta=1.3),
            "verl": verl(theirs, "vanilla", sequence, clip_ratio_c=1.3),
            "openrlhf": openrlhf(theirs, token_level_loss=False, dual_clip=1.3),
        },
    )


def test_corrections_of_off_policy_tokens(theirs: Any) -> None:
    sequence = "seq-mean-token-mean"
    correction = {"token_level_loss": False, "is_correction_level": "token"}
    compare(
        "weight of tokens, truncated (TIS)",
        ours(importance_cap=1.1),
        {
            "trl": INLINE,
            "verl": verl(theirs, "vanilla", sequence, ("token", 1.1)),
            "openrlhf": openrlhf(theirs, **correction, is_correction_mode="clip", is_correction_threshold=(0.0, 1.1)),
        },
    )
    masked = {"importance_mode": "mask", "importance_floor": 0.8, "importance_cap": 1.2}
    compare(
        "weight of tokens, masked (MIS)",
        ours(**masked),
        {
            "trl": INLINE,
            "verl": verl(theirs, "vanilla", sequence, ("token", "0.8_1.2")),
            "openrlhf": openrlhf(theirs, **correction, is_correction_threshold=(0.8, 1.2)),
        },
    )
    whole = {"importance_level": "completion"}
    compare(
        "weight of completions, truncated",
        ours(**whole, importance_cap=1.1),
        {"trl": INLINE, "verl": verl(theirs, "vanilla", sequence, ("sequence", 1.1))},
    )
    compare(
        "weight of completions, masked",
        ours(**whole, **masked | {"importance_floor": 0.3, "importance_cap": 3.0}),
        {"trl": INLINE, "verl": verl(theirs, "vanilla", sequence, ("sequence", "0.3_3.0"))},
    )
    compare("off-policy mask", ours(off_policy_mask=0.05), {"trl": trl(theirs, off_policy_mask_threshold=0.05)})


def test_divergences(theirs: Any) -> None:
    def verl_k3(batch: PaddedBatch) -> Tensor:
        divergence = theirs.verl.kl_penalty(batch.logprobs, batch.reference, "k3")
        mean = theirs.verl.agg_loss(divergence, batch.mask, "seq-mean-token-mean")
        return verl(theirs, "vanilla", "seq-mean-token-mean")(batch) + 0.5 * mean

    def openrlhf_k3(batch: PaddedBatch) -> Tensor:
        divergence = theirs.approx_kl(batch.logprobs, batch.reference, kl_estimator="k3")
        mean = theirs.openrlhf.aggregate_loss(divergence, batch.mask, token_level_loss=False)
        return openrlhf(theirs, token_level_loss=False)(batch) + 0.5 * mean

    compare("GRPO with k3", ours(kl_coef=0.5), {"trl": trl(theirs, beta=0.5), "verl": verl_k3, "openrlhf": openrlhf_k3})
    another = "another form: k2's gradient times a weight"
    compare(
        "GRPO with k3 times the ratio",
        ours(kl_coef=0.5, kl="unbiased"),
        {"trl": trl(theirs, beta=0.5, unbiased=True), "openrlhf": another},
    )


def test_advantages(theirs: Any) -> None:
    """One reward for each completion, here its first log-probability; the gradient is that of a weighted sum."""
    index = np.repeat(np.arange(GROUPS), GROUP)

    def of_verl(name: str, factor: float = 1.0, **settings: Any) -> Callable[[np.ndarray], np.ndarray]:
        def advantages(rewards_PG: np.ndarray) -> np.ndarray:
            tokens = torch.tensor(rewards_PG.reshape(-1, 1))
            function = getattr(theirs.verl, f"compute_{name}_outcome_advantage")
            return factor * function(tokens, torch.ones_like(tokens), index, **settings)[0].numpy().reshape(-1, GROUP)

        return advantages

    deviation = math.sqrt(GROUP / (GROUP - 1))  # ours is the population's
    cases: dict[str, tuple[Any, Any]] = {
        f"advantage, times {deviation:.3f} at G = 4": (
            lambda r: group_advantage(r, normalize_std=True),
            of_verl("grpo", deviation, epsilon=0.0),
        ),
        "advantage without deviation": (
            lambda r: group_advantage(r, normalize_std=False),
            of_verl("grpo", norm_adv_by_std_in_grpo=False),
        ),
        "leave-one-out advantage (RLOO)": (leave_one_out_advantage, of_verl("rloo")),
    }
    for case, (our, their) in cases.items():
        rewards = [np.random.default_rng(seed).normal(size=(GROUPS, GROUP)) for seed in range(3)]
        difference = max(float(np.abs(our(r) - their(r)).max()) for r in rewards)
        cells[case] = {"trl": INLINE, "verl": power_of_ten(difference), "openrlhf": INLINE}
        assert difference < LIMIT, f"{case}: verl {VERSIONS['verl']} differs by {difference:.2g}"


def test_direct_preference_losses(theirs: Any) -> None:
    """The first half of a batch is chosen, the second rejected."""
    beta, smoothing = 0.3, 0.2

    def ours_of(**settings: Any) -> Loss:
        loss = DpoLoss.model_validate({"beta": beta} | settings)

        def of(batch: PaddedBatch) -> Tensor:
            pairs = len(batch.mask) // 2
            order = torch.arange(2 * pairs).view(2, pairs).T.flatten()  # chosen and rejected in turn
            kept = batch.mask[order].bool()
            logprobs, reference = (x[order][kept] for x in (batch.logprobs, batch.reference))
            answers = ComparedAnswers(
                logprobs_N=logprobs,
                ref_logprobs_N=reference,
                targets_N=torch.full_like(reference, math.nan),
                sequence_N=torch.arange(2 * pairs)[:, None].expand_as(kept)[kept],
                comparison_S=torch.arange(pairs).repeat_interleave(2),
            )
            return dpo_loss(answers, loss, denominator=float(pairs)).loss

        return of

    def trl_dpo(kind: str) -> Loss:
        return lambda batch: trl_dpo_loss(theirs.dpo, batch, kind, beta, smoothing)

    def openrlhf_dpo(**settings: Any) -> Loss:
        def loss(batch: PaddedBatch) -> Tensor:
            sums = [(x * batch.mask).sum(1).chunk(2) for x in (batch.logprobs, batch.reference)]
            return theirs.openrlhf.DPOLoss(beta, **settings)(*sums[0], *sums[1])[0]

        return loss

    compare("DPO", ours_of(), {"trl": trl_dpo("sigmoid"), "openrlhf": openrlhf_dpo()})
    compare(
        "cDPO",
        ours_of(label_smoothing=smoothing),
        {"trl": "none: `sigmoid` ignores `label_smoothing`", "openrlhf": openrlhf_dpo(label_smoothing=smoothing)},
    )
    compare("DPO, robust", ours_of(kind="robust", label_smoothing=smoothing), {"trl": trl_dpo("robust")})
    compare("DPO, hinge", ours_of(kind="hinge"), {"trl": trl_dpo("hinge")})
    compare("IPO of sums", ours_of(kind="ipo"), {"trl": "of means", "openrlhf": openrlhf_dpo(ipo=True)})
    compare("IPO of means", ours_of(kind="ipo", length_normalized=True), {"trl": trl_dpo("ipo"), "openrlhf": "of sums"})
    compare("DPO, length-normalised", ours_of(length_normalized=True), {"trl": trl_dpo("sigmoid_norm")})


def test_reward_model_losses(theirs: Any) -> None:
    """A score of each completion is its first log-probability, and its target is its advantage."""

    def ours_of(margin: float = 0.0, center: float = 0.0) -> Loss:
        def loss(batch: PaddedBatch) -> Tensor:
            pairs = len(batch.mask) // 2
            order = torch.arange(2 * pairs).view(2, pairs).T.flatten()
            comparison_N = torch.arange(pairs).repeat_interleave(2)
            answers = ScoredAnswers(batch.logprobs[order, 0], batch.advantages[order], comparison_N, pairs)
            return pairwise_loss(answers, denominator=float(pairs), margin=margin, center=center).loss

        return loss

    def margin_of(batch: PaddedBatch) -> Tensor:
        chosen, rejected = batch.advantages.chunk(2)
        return chosen - rejected

    def openrlhf_pairs(with_margin: bool) -> Loss:
        return lambda batch: theirs.openrlhf.PairWiseLoss()(
            *batch.logprobs[:, 0].chunk(2), margin_of(batch) if with_margin else None
        )

    plain: Loss = lambda batch: trl_reward_loss(theirs.rm, batch.logprobs[:, 0], None, None)  # noqa: E731
    margin: Loss = lambda batch: trl_reward_loss(theirs.rm, batch.logprobs[:, 0], margin_of(batch), None)  # noqa: E731
    center: Loss = lambda batch: trl_reward_loss(theirs.rm, batch.logprobs[:, 0], None, 0.1)  # noqa: E731
    compare("reward model, pairs", ours_of(), {"trl": plain, "openrlhf": openrlhf_pairs(False)})
    compare("reward model, margin", ours_of(margin=1.0), {"trl": margin, "openrlhf": openrlhf_pairs(True)})
    compare("reward model, centred", ours_of(center=0.1), {"trl": center})
