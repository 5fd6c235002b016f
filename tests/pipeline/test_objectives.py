"""The GRPO objective against numbers worked by hand, and the properties the equation has."""

import math

import numpy as np
import pytest
import torch

from configs.grpo import ObjectiveConfig
from pipeline.objectives.advantage import batch_advantage, group_advantage, has_spread, leave_one_out_advantage
from pipeline.objectives.aggregate import batch_denominator, token_weight
from pipeline.objectives.policy import (
    LossOutput,
    PolicyTokens,
    cispo_surrogate,
    clipped_surrogate,
    divergence,
    grpo_loss,
    importance_ratio,
    importance_weight,
    k3_divergence,
    off_policy_mask,
)
from pipeline.objectives.supervised import sft_loss

NAN = float("nan")


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# -- advantages -------------------------------------------------------------------------------------------------------


def test_advantages_are_the_rewards_in_standard_deviations_from_the_mean() -> None:
    # mean 0.25, population std sqrt(3)/4: (1 - 1/4) / (sqrt(3)/4) = sqrt(3), (0 - 1/4) / (sqrt(3)/4) = -1/sqrt(3)
    advantages = group_advantage(np.array([[1.0, 0.0, 0.0, 0.0]]), normalize_std=True)
    np.testing.assert_allclose(advantages, [[math.sqrt(3), *[-1 / math.sqrt(3)] * 3]], rtol=1e-14)


def test_without_the_std_advantages_are_centred_rewards() -> None:
    advantages = group_advantage(np.array([[1.0, 0.0, 0.0, 0.0]]), normalize_std=False)
    np.testing.assert_array_equal(advantages, [[0.75, -0.25, -0.25, -0.25]])


def test_an_unjudged_completion_is_in_neither_mean_nor_std_and_gets_nothing() -> None:
    with_gap = group_advantage(np.array([[3.0, NAN, 1.0, 2.0]]), normalize_std=True)
    without = group_advantage(np.array([[3.0, 1.0, 2.0]]), normalize_std=True)
    np.testing.assert_array_equal(with_gap[0, [0, 2, 3]], without[0])
    assert with_gap[0, 1] == 0


@pytest.mark.parametrize("rewards", [[0.1, 0.1, 0.1], [0.3, NAN, NAN], [NAN, NAN, NAN], [0.1 + 0.2, 0.3, 0.3]])
def test_a_group_without_spread_has_advantage_exactly_zero(rewards: list[float]) -> None:
    rewards_PG = np.array([rewards])
    if not has_spread(rewards_PG)[0]:
        np.testing.assert_array_equal(group_advantage(rewards_PG, normalize_std=True), np.zeros((1, 3)))
    else:  # 0.1 + 0.2 differs from 0.3 in the last bit, and is the one spread here
        assert rewards[0] != rewards[1]


@pytest.mark.parametrize("normalize_std", [True, False])
def test_advantages_ignore_a_shift_and_follow_a_permutation(normalize_std: bool) -> None:
    rewards_PG = np.random.default_rng(0).integers(0, 5, (6, 8)).astype(float)
    advantages = group_advantage(rewards_PG, normalize_std=normalize_std)
    np.testing.assert_allclose(group_advantage(rewards_PG + 7, normalize_std=normalize_std), advantages, atol=1e-12)
    order = np.random.default_rng(1).permutation(8)
    np.testing.assert_allclose(group_advantage(rewards_PG[:, order], normalize_std=normalize_std), advantages[:, order])


def test_leave_one_out_advantages_are_the_rewards_less_the_mean_of_the_others() -> None:
    np.testing.assert_allclose(leave_one_out_advantage(np.array([[1.0, 0.0, 0.0, 0.0]])), [[1, -1 / 3, -1 / 3, -1 / 3]])
    np.testing.assert_allclose(leave_one_out_advantage(np.array([[3.0, NAN, 1.0, 2.0]])), [[1.5, 0, -1.5, 0]])
    np.testing.assert_array_equal(leave_one_out_advantage(np.array([[2.0, NAN], [0.3, 0.3]])), np.zeros((2, 2)))


def test_batch_advantages_are_the_rewards_in_standard_deviations_of_the_step() -> None:
    # judged: 1, -1, 2, -2 of mean 0 and std sqrt(10 / 4)
    advantages = batch_advantage(np.array([[1.0, -1.0, NAN], [2.0, -2.0, NAN]]))
    std = math.sqrt(2.5)
    np.testing.assert_allclose(advantages, [[1 / std, -1 / std, 0], [2 / std, -2 / std, 0]], rtol=1e-14)


def test_batch_advantages_of_groups_without_spread_are_exactly_zero() -> None:
    advantages = batch_advantage(np.array([[0.0, 0.0], [1.5, -1.5], [NAN, 3.0]]))
    np.testing.assert_array_equal(advantages[[0, 2]], np.zeros((2, 2)))
    assert advantages[1, 0] > 0 > advantages[1, 1]
    np.testing.assert_array_equal(batch_advantage(np.array([[2.0, 2.0], [NAN, NAN]])), np.zeros((2, 2)))


# -- the factors ------------------------------------------------------------------------------------------------------


def test_token_ratio_is_the_quotient_of_probabilities() -> None:
    ratio = importance_ratio(
        logprobs_N=tensor(math.log(0.6), math.log(0.1)),
        policy_logprobs_N=tensor(math.log(0.3), math.log(0.2)),
        sequence_N=torch.tensor([0, 0]),
        num_sequences=1,
        level="token",
    )
    torch.testing.assert_close(ratio, tensor(2.0, 0.5))


def test_sequence_ratio_is_the_geometric_mean_of_its_own_tokens() -> None:
    ratio = importance_ratio(
        logprobs_N=tensor(math.log(4), math.log(1), math.log(3)),
        policy_logprobs_N=tensor(0.0, 0.0, 0.0),
        sequence_N=torch.tensor([0, 0, 1]),
        num_sequences=2,
        level="sequence",
    )
    torch.testing.assert_close(ratio, tensor(2.0, 2.0, 3.0))  # sqrt(4 * 1), 3


def test_completion_ratio_is_the_product_over_its_own_tokens() -> None:
    ratio = importance_ratio(
        logprobs_N=tensor(math.log(4), math.log(0.5), math.log(3)),
        policy_logprobs_N=tensor(0.0, 0.0, 0.0),
        sequence_N=torch.tensor([0, 0, 1]),
        num_sequences=2,
        level="completion",
    )
    torch.testing.assert_close(ratio, tensor(2.0, 2.0, 3.0))


def test_the_dual_clip_bounds_the_loss_of_a_negative_advantage_alone() -> None:
    surrogate = clipped_surrogate(
        ratio_N=tensor(9.0, 2.0, 0.1, 9.0),
        advantages_N=tensor(-2, -2, -2, 2),
        clip_low=0.2,
        clip_high=0.2,
        clip_dual=3.0,
    )
    torch.testing.assert_close(surrogate, tensor(-6.0, -4.0, -1.6, 2.4))  # 3 * -2, 2 * -2, 0.8 * -2, 1.2 * 2


def test_the_clip_bounds_gain_but_never_loss() -> None:
    surrogate = clipped_surrogate(
        ratio_N=tensor(1.5, 1.5, 0.5, 0.5), advantages_N=tensor(2, -2, 2, -2), clip_low=0.2, clip_high=0.3
    )
    torch.testing.assert_close(surrogate, tensor(2.6, -3.0, 1.0, -1.6))  # 1.3*2, 1.5*-2, 0.5*2, 0.8*-2


def test_cispo_keeps_the_gradient_of_a_clipped_token() -> None:
    logprobs = tensor(math.log(0.5)).requires_grad_()
    ratio = (logprobs - tensor(math.log(0.1))).exp()  # 5, far above the clip
    cispo_surrogate(
        ratio_N=ratio, advantages_N=tensor(2.0), logprobs_N=logprobs, clip_low=0.2, clip_high=0.3
    ).backward()
    torch.testing.assert_close(logprobs.grad, tensor(2.6))  # clip(5) * A
    logprobs.grad = None
    clipped_surrogate(
        ratio_N=(logprobs - tensor(math.log(0.1))).exp(), advantages_N=tensor(2.0), clip_low=0.2, clip_high=0.3
    ).sum().backward()
    torch.testing.assert_close(logprobs.grad, tensor(0.0))


def test_k3_by_hand_and_unbiased() -> None:
    # pi_ref / pi = 2: 2 - ln 2 - 1
    value = k3_divergence(logprobs_N=tensor(math.log(0.2)), ref_logprobs_N=tensor(math.log(0.4)))
    torch.testing.assert_close(value, tensor(1 - math.log(2)))
    policy, reference = tensor(0.5, 0.3, 0.2), tensor(0.2, 0.2, 0.6)
    expected = (policy * k3_divergence(logprobs_N=policy.log(), ref_logprobs_N=reference.log())).sum()
    torch.testing.assert_close(expected, (policy * (policy / reference).log()).sum())  # E[k3] is the KL itself


def test_importance_weight_is_capped_above_only() -> None:
    weight = importance_weight(tensor(math.log(3), math.log(0.1)), cap=2.0)
    torch.testing.assert_close(weight, tensor(2.0, 0.1))


def test_importance_weights_outside_the_band_are_masked() -> None:
    weight = importance_weight(tensor(math.log(3), math.log(0.1), math.log(1.5)), cap=2.0, floor=0.5, mode="mask")
    torch.testing.assert_close(weight, tensor(0.0, 0.0, 1.5))


def test_the_off_policy_mask_leaves_out_negative_completions_far_from_the_rollout() -> None:
    mask = off_policy_mask(
        gap_N=tensor(0.9, 0.3, 0.9, 0.3, 0.4),  # means 0.6, 0.6, 0.4
        advantages_N=tensor(-1.0, -1.0, 1.0, 1.0, -1.0),
        sequence_N=torch.tensor([0, 0, 1, 1, 2]),
        num_sequences=3,
        max_gap=0.5,
    )
    torch.testing.assert_close(mask, tensor(0.0, 0.0, 1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("aggregation", "weights", "denominator"),
    [("sequence", [1 / 2, 1 / 4], 2.0), ("token", [1.0, 1.0], 6.0), ("fixed", [1 / 8, 1 / 8], 2.0)],
)
def test_aggregations_by_hand(aggregation, weights: list[float], denominator: float) -> None:
    assert [token_weight(aggregation, length=length, max_tokens=8) for length in (2, 4)] == weights
    assert batch_denominator(aggregation, [2, 4]) == denominator


# -- the whole loss ---------------------------------------------------------------------------------------------------


def columns(**changed) -> dict:
    """Two completions, one of one token and one of two, and settings of the objective."""
    return {
        "num_sequences": 2,
        "kl_coef": 0.0,
        "logprobs_N": tensor(math.log(0.6), math.log(0.3), math.log(0.5)),
        "policy_logprobs_N": tensor(math.log(0.4), math.log(0.3), math.log(0.5)),
        "rollout_logprobs_N": tensor(math.log(0.4), math.log(0.3), math.log(0.5)),
        "ref_logprobs_N": None,
        "advantages_N": tensor(1.0, -1.0, -1.0),
        "weights_N": tensor(1.0, 0.5, 0.5),
        "sequence_N": torch.tensor([0, 1, 1]),
        **changed,
    }


def loss_of(batch: dict) -> LossOutput:
    tokens = {name: value for name, value in batch.items() if name in PolicyTokens._fields}
    settings = {name: value for name, value in batch.items() if name not in tokens}
    return grpo_loss(PolicyTokens(**tokens), ObjectiveConfig(**settings), denominator=2.0)


def test_the_loss_by_hand() -> None:
    # completion 0: min(1.5 * 1, 1.2 * 1) = 1.2; completion 1: mean(-1, -1) = -1; -(1.2 - 1) / 2
    assert loss_of(columns()).loss.item() == pytest.approx(-0.1, abs=1e-12)


def test_the_loss_with_divergence_by_hand() -> None:
    reference = tensor(math.log(0.3), math.log(0.3), math.log(0.25))
    output = loss_of(columns(ref_logprobs_N=reference, kl_coef=0.1))
    kl = [0.5 - math.log(0.5) - 1, 0.0, 0.5 - math.log(0.5) - 1]  # pi_ref / pi = 1/2, 1, 1/2
    expected = -((1.2 - 0.1 * kl[0]) + 0.5 * (-1 - 0.1 * kl[1]) + 0.5 * (-1 - 0.1 * kl[2])) / 2
    assert output.loss.item() == pytest.approx(expected, abs=1e-12)
    assert output.sums["loss/kl_mean"].item() == pytest.approx(sum(kl), abs=1e-12)


def test_the_printed_loss_of_whole_completions_by_hand() -> None:
    """DeepSeek-V2 eq. 32-33: ratio and divergence of completions, without a mean over their tokens."""
    reference = tensor(math.log(0.3), math.log(0.15), math.log(0.25))
    policy = tensor(math.log(0.4), math.log(0.2), math.log(0.5))
    output = loss_of(columns(ratio="completion", policy_logprobs_N=policy, ref_logprobs_N=reference, kl_coef=0.1))
    # completion 0: ratio 1.5, A = 1, pi_ref/pi = 1/2; completion 1: ratio 1.5 * 1, A = -1, pi_ref/pi = 1/2 * 1/2
    divergences = [0.5 - math.log(0.5) - 1, 0.25 - math.log(0.25) - 1]
    expected = -((1.2 - 0.1 * divergences[0]) + (-1.5 - 0.1 * divergences[1])) / 2
    assert output.loss.item() == pytest.approx(expected, abs=1e-12)


def test_the_printed_loss_gives_every_token_its_completions_whole_gradient() -> None:
    """The first update: ratio 1, gradient A for each token, where the mean over tokens gives A / |o_i|."""
    logprobs = tensor(-1.0, -2.0, -0.5).requires_grad_()
    loss_of(columns(logprobs_N=logprobs, policy_logprobs_N=logprobs.detach(), ratio="completion")).loss.backward()
    torch.testing.assert_close(logprobs.grad, tensor(-0.5, 0.5, 0.5))  # -A / G


def test_the_unbiased_divergence_has_the_gradient_of_the_exact_one() -> None:
    """E over pi_old of the gradient of ratio * k3 is the gradient of KL(pi_theta || pi_ref); that of k3 is not."""
    logits = tensor(0.3, -0.5, 1.0, 0.1).requires_grad_()
    old, reference = tensor(0.4, 0.3, 0.2, 0.1), tensor(0.1, 0.2, 0.3, 0.4)

    def expected_gradient(kl: str) -> torch.Tensor:
        logits.grad = None
        tokens = PolicyTokens(
            logprobs_N=logits.log_softmax(0),
            policy_logprobs_N=old.log(),
            rollout_logprobs_N=old.log(),
            ref_logprobs_N=reference.log(),
            advantages_N=torch.zeros(4),
            weights_N=torch.ones(4),
            sequence_N=torch.arange(4),
            num_sequences=4,
        )
        (old * divergence(tokens, ObjectiveConfig(kl=kl, kl_coef=1.0))).sum().backward()
        return logits.grad.clone()

    logits.grad = None
    policy = logits.softmax(0)
    (policy * (policy / reference).log()).sum().backward()
    exact = logits.grad.clone()
    torch.testing.assert_close(expected_gradient("unbiased"), exact)
    assert not torch.allclose(expected_gradient("k3"), exact, atol=1e-2)


def test_the_off_policy_mask_keeps_the_divergence() -> None:
    reference = tensor(-1.0, -1.0, -1.0)
    rollout = columns()["logprobs_N"] + 1.0
    batch = columns(rollout_logprobs_N=rollout, ref_logprobs_N=reference, kl_coef=0.1, off_policy_mask=0.5)
    output = loss_of(batch)
    divergences = [math.exp(-1 - x) + 1 + x - 1 for x in batch["logprobs_N"].tolist()]
    expected = -((1.2 - 0.1 * divergences[0]) - 0.5 * 0.1 * (divergences[1] + divergences[2])) / 2
    assert output.loss.item() == pytest.approx(expected, abs=1e-12)
    assert output.sums["loss/off_policy_masked_mean"].item() == 2


def test_beta_of_a_token_replaces_that_of_the_objective() -> None:
    reference = tensor(-1.0, -1.0, -1.0)
    by_token = loss_of(columns(ref_logprobs_N=reference, kl_coef=0.5, kl_coef_N=tensor(0.1, 0.1, 0.1))).loss
    torch.testing.assert_close(by_token, loss_of(columns(ref_logprobs_N=reference, kl_coef=0.1)).loss)


def test_mismatch_is_measured_on_every_token_whatever_its_weight() -> None:
    rollout = tensor(math.log(0.4) + 0.5, math.log(0.3), math.log(0.5) - 0.25)
    output = loss_of(columns(rollout_logprobs_N=rollout, weights_N=tensor(0.0, 0.5, 0.5), importance_cap=2.0))
    assert output.sums["mismatch/abs_mean"].item() == pytest.approx(0.75)
    assert output.maxima["mismatch/abs_max"].item() == pytest.approx(0.5)
    assert output.maxima["mismatch/sequence_max"].item() == pytest.approx(0.5)  # of 0.5, and 0 + 0.25


def test_weight_zero_gives_a_gradient_of_exactly_zero_even_with_divergence() -> None:
    logprobs = columns()["logprobs_N"].requires_grad_()
    reference = tensor(-3.0, -3.0, -3.0)
    loss_of(
        columns(logprobs_N=logprobs, ref_logprobs_N=reference, kl_coef=0.1, weights_N=tensor(0.0, 0.5, 0.5))
    ).loss.backward()
    assert logprobs.grad is not None and logprobs.grad[0].item() == 0.0
    assert (logprobs.grad[1:] != 0).all()


FAR = [120.0, 1e4, -120.0, float("inf"), float("-inf"), float("nan")]
"""How far a log-probability may be off where a token is not trained."""
COLUMNS = ("logprobs_N", "policy_logprobs_N", "rollout_logprobs_N", "ref_logprobs_N", "advantages_N")


OPTIONS = [
    {"importance_cap": 2.0},
    {"ratio": "sequence", "importance_cap": 2.0, "importance_level": "sequence"},
    {"ratio": "completion", "importance_cap": 2.0, "importance_level": "completion", "importance_mode": "mask"},
    {"surrogate": "cispo", "kl": "unbiased"},
    {"clip_dual": 3.0, "off_policy_mask": 0.5, "kl": "unbiased"},
]


@pytest.mark.parametrize("settings", OPTIONS)
@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("far", FAR)
def test_a_token_of_weight_zero_changes_nothing_however_far_it_is_off(column, far, settings) -> None:
    options = {"kl_coef": 0.1, **settings}
    options["weights_N"] = torch.tensor([0.0, 0.5, 0.5])

    def step(value: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        batch = columns(ref_logprobs_N=tensor(-1.0, -1.5, -0.5), **options)
        batch |= {name: batch[name].float() for name in COLUMNS}
        if value is not None:
            batch[column] = torch.cat([torch.tensor([value]), batch[column][1:]])
        batch["logprobs_N"].requires_grad_()
        loss = loss_of(batch).loss
        loss.backward()
        return loss.detach(), batch["logprobs_N"].grad

    loss, gradient = step(far)
    expected_loss, expected_gradient = step(None)
    assert torch.equal(loss, expected_loss) and torch.equal(gradient, expected_gradient)
    assert gradient[0] == 0 and (gradient[1:] != 0).all()


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_ratio_past_float32_that_the_clip_bounds_has_no_gradient(ratio: str) -> None:
    batch = columns(ratio=ratio, advantages_N=torch.ones(3), weights_N=torch.ones(3))
    batch |= {name: batch[name].float() for name in COLUMNS if batch[name] is not None}
    batch["logprobs_N"] = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    batch["policy_logprobs_N"] = torch.tensor([-130.0, -130.0, -130.0])
    output = loss_of(batch)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(-3 * 1.2 / 2)
    assert torch.equal(batch["logprobs_N"].grad, torch.zeros(3))
    assert all(value.isfinite() for value in output.sums.values())


def test_a_reference_far_above_the_policy_still_stops_the_run() -> None:
    """A trained token: there no number is the honest answer, and the ranks refuse a gradient that is not finite."""
    batch = columns(ref_logprobs_N=torch.tensor([-1.0, -1.0, -1.0]), kl_coef=0.1)
    batch |= {name: batch[name].float() for name in COLUMNS}
    batch["logprobs_N"] = torch.tensor([-130.0, -1.0, -1.0], requires_grad=True)
    batch["policy_logprobs_N"] = batch["logprobs_N"].detach()
    loss_of(batch).loss.backward()
    assert not batch["logprobs_N"].grad.isfinite().all()


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_batch_in_two_parts_has_the_gradient_of_the_whole(ratio: str) -> None:
    whole = columns()["logprobs_N"].requires_grad_()
    loss_of(columns(logprobs_N=whole, ratio=ratio)).loss.backward()
    parts = columns()["logprobs_N"].requires_grad_()
    for chosen, count in ((slice(0, 1), 1), (slice(1, 3), 1)):
        part = {name: value[chosen] for name, value in columns().items() if isinstance(value, torch.Tensor)}
        part |= {
            "logprobs_N": parts[chosen],
            "sequence_N": torch.zeros_like(part["sequence_N"]),
            "num_sequences": count,
        }
        loss_of(columns(**part, ratio=ratio)).loss.backward()
    torch.testing.assert_close(parts.grad, whole.grad, rtol=0, atol=0)


def test_sft_loss_by_hand() -> None:
    output = sft_loss(logprobs_N=tensor(math.log(0.5), math.log(0.25)), denominator=4.0)
    assert output.loss.item() == pytest.approx(3 * math.log(2) / 4)
