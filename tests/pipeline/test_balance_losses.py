"""Formulas of the balance of experts: by hand, and what must not change them."""

import pytest
import torch

from pipeline.models.attention import Layout
from pipeline.models.balance_losses import (
    Sequences,
    bias_steps,
    communication_balance,
    device_balance,
    expert_balance,
    kept_tokens,
    load_entropy,
    load_fractions,
    max_violation,
    sequence_balance,
)

CPU = torch.device("cpu")
ONE = Sequences(Layout((2,), (-1,)), CPU)
EXPERTS_TK = torch.tensor([[0, 1], [2, 0]])
SCORES_TE = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.5, 0.1, 0.3, 0.1]])


def test_losses_of_v2_by_hand() -> None:
    """T = 2 tokens, E = 4 experts, K = 2; f = 4 / (2 x 2) [2, 1, 1, 0], P = the mean of the two rows."""
    fractions_SE, scores_SE = load_fractions(EXPERTS_TK, 4, ONE), ONE.means(SCORES_TE)
    assert fractions_SE.tolist() == [[2, 1, 1, 0]]
    torch.testing.assert_close(scores_SE, torch.tensor([[0.45, 0.2, 0.25, 0.1]]))
    assert expert_balance(fractions_SE, scores_SE).item() == pytest.approx(2 * 0.45 + 0.2 + 0.25)
    # groups {0, 1} and {2, 3}: f' = [1.5, 0.5], P' = [0.65, 0.35]
    assert device_balance(fractions_SE, scores_SE, 2).item() == pytest.approx(1.5 * 0.65 + 0.5 * 0.35)
    # both tokens go to the first group, one to the second: f'' = 2 / (M x 2) [2, 1], here with M = 2
    found = communication_balance(EXPERTS_TK, scores_SE, ONE, num_groups=2, top_groups=2)
    assert found.item() == pytest.approx(1 * 0.65 + 0.5 * 0.35)
    # two experts of one group are one message to it
    both = communication_balance(torch.tensor([[0, 1], [0, 1]]), scores_SE, ONE, num_groups=2, top_groups=1)
    assert both.item() == pytest.approx(2 * 0.65)


def test_sequence_loss_of_v3_by_hand() -> None:
    """Scores 0.8 0.6 0.4 0.2 are 0.4 0.3 0.2 0.1 of their sum, 0.9 0.1 0.6 0.2 are 9/18 1/18 6/18 2/18."""
    scores_TE = torch.tensor([[0.8, 0.6, 0.4, 0.2], [0.9, 0.1, 0.6, 0.2]])
    expected = 2 * (0.4 + 9 / 18) / 2 + (0.3 + 1 / 18) / 2 + (0.2 + 6 / 18) / 2
    assert sequence_balance(scores_TE, 2, ONE).item() == pytest.approx(expected)


def test_an_even_load_has_losses_of_one() -> None:
    experts_TK, scores_TE = torch.tensor([[0, 2], [1, 3]]), torch.full((2, 4), 0.25)
    fractions_SE, scores_SE = load_fractions(experts_TK, 4, ONE), ONE.means(scores_TE)
    assert expert_balance(fractions_SE, scores_SE).tolist() == [1]
    assert device_balance(fractions_SE, scores_SE, 2).tolist() == [1]
    assert communication_balance(experts_TK, scores_SE, ONE, num_groups=2, top_groups=2).tolist() == [1]


def test_a_packed_row_is_its_sequences_alone() -> None:
    """Segments 0 and 1 share nothing, 2 and 3 continue 1: three sequences, of which two have the tokens of 1."""
    generator = torch.Generator().manual_seed(0)
    layout = Layout((4, 3, 2, 5), (-1, -1, 1, 1))
    scores_TE = torch.rand(14, 8, generator=generator)
    packed = Sequences(layout, CPU)
    found_S = sequence_balance(scores_TE, 3, packed)
    for place, rows in enumerate([range(4), [4, 5, 6, 7, 8], [4, 5, 6, *range(9, 14)]]):
        alone = Sequences(Layout((len(rows),), (-1,)), CPU)
        assert found_S[place].item() == pytest.approx(sequence_balance(scores_TE[list(rows)], 3, alone).item())
    order_T = torch.cat([torch.randperm(4, generator=generator), 4 + torch.randperm(3), torch.arange(7, 14)])
    torch.testing.assert_close(sequence_balance(scores_TE[order_T], 3, packed), found_S)


def test_dropped_pairs_by_hand() -> None:
    """Six pairs of three tokens, three a group: five want the first group, so its two lowest affinities go."""
    experts_TK = torch.tensor([[0, 1], [0, 1], [0, 2]])
    scores_TK = torch.tensor([[0.5, 0.1], [0.4, 0.2], [0.3, 0.6]])
    nobody = torch.zeros(3, dtype=torch.bool)
    groups = {"num_experts": 4, "num_groups": 2}
    kept_TK = kept_tokens(scores_TK, experts_TK, nobody, **groups, capacity=1.0)
    assert kept_TK.tolist() == [[True, False], [True, False], [True, True]]
    # what is protected fills the budget first
    kept_TK = kept_tokens(scores_TK, experts_TK, torch.tensor([True, False, False]), **groups, capacity=1.0)
    assert kept_TK.tolist() == [[True, True], [True, False], [False, True]]
    assert kept_tokens(scores_TK, experts_TK, ~nobody, **groups, capacity=0.1).all()
    assert kept_tokens(scores_TK, experts_TK, nobody, **groups, capacity=5 / 3).all()
    assert kept_tokens(scores_TK, experts_TK, nobody, **groups, capacity=1 / 3).sum(0).tolist() == [1, 1]


def test_the_order_of_tokens_does_not_say_which_are_dropped() -> None:
    generator = torch.Generator().manual_seed(0)
    scores_TK, protected_T = torch.rand(40, 2, generator=generator), torch.rand(40, generator=generator) < 0.1
    experts_TK = torch.randint(0, 8, (40, 2), generator=generator) // 2
    settings = {"num_experts": 8, "num_groups": 4, "capacity": 0.7}
    kept_TK = kept_tokens(scores_TK, experts_TK, protected_T, **settings)
    order_T = torch.randperm(40, generator=generator)
    again_TK = kept_tokens(scores_TK[order_T], experts_TK[order_T], protected_T[order_T], **settings)
    assert torch.equal(again_TK, kept_TK[order_T])
    assert 0 < kept_TK.sum() < kept_TK.numel() and kept_TK[protected_T].all()


def test_the_bias_moves_against_the_load_by_hand() -> None:
    load_LE = torch.tensor([[3, 1, 2, 2], [8, 0, 0, 0]])
    r = 0.001
    expected = torch.tensor([[-r, r, 0, 0], [-r, r, r, r]])
    assert torch.equal(bias_steps(load_LE, r), expected)


def test_figures_of_the_load_by_hand() -> None:
    load_LE = torch.tensor([[3, 1, 2, 2], [8, 0, 0, 0], [2, 2, 2, 2]])
    assert max_violation(load_LE).tolist() == [0.5, 3, 0]
    entropy_L = load_entropy(load_LE).tolist()
    assert entropy_L == pytest.approx([0.952820, 0, 1], abs=1e-6)  # (3/8 log2 8/3 + 1/8 3 + 2 x 1/4 2) / 2
