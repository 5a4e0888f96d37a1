"""AlignLoss: the loss of a direction against plain torch; what it leaves out."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmbal import AlignLoss, ConnectorOut, TargetOut
from oracles import assert_near


def outputs(B=7, d=5, C=4, seed=0, valid=(None, None)):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(B, n, generator=generator, dtype=torch.float64).requires_grad_() for n in (d, C, d, C)]
    return ConnectorOut(*tensors[:2], (), valid[0]), TargetOut(*tensors[2:], valid[1])


def leaves(out, target):
    return [out.reg, out.cl, target.reg, target.cl]


REGRESSIONS = {
    "smooth_l1": lambda a, b: F.smooth_l1_loss(a, b, beta=0.3),
    "mse": F.mse_loss,
    "l2": lambda a, b: (a - b).square().sum(1).mean(),
    "cosine": lambda a, b: 1 - F.cosine_similarity(a, b).mean(),
}


def info_nce(x, y, tau, symmetric):
    similarity = F.normalize(x, dim=1) @ F.normalize(y, dim=1).T / tau
    own = torch.arange(len(x))
    one = F.cross_entropy(similarity, own)
    return (one + F.cross_entropy(similarity.T, own)) / 2 if symmetric else one


@pytest.mark.parametrize("regression", REGRESSIONS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_it_is_regression_and_info_nce_with_their_gradients(regression, symmetric):
    out, target = outputs()
    found = AlignLoss(tau=0.2, alpha=0.3, regression=regression, beta=0.3, symmetric=symmetric)(out, target)
    reg, cl = REGRESSIONS[regression](out.reg, target.reg), info_nce(out.cl, target.cl, 0.2, symmetric)
    assert_near(found.reg, reg, 1e-12)
    assert_near(found.cl, cl, 1e-12)
    expected = 0.3 * reg + 0.7 * cl
    assert_near(found.loss, expected, 1e-12)
    ours, theirs = (torch.autograd.grad(loss, leaves(out, target)) for loss in (found.loss, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert_near(a, b, 1e-11)


def test_the_defaults_are_those_of_the_authors_code():
    out, target = outputs()
    expected = 0.5 * F.smooth_l1_loss(out.reg, target.reg) + 0.5 * info_nce(out.cl, target.cl, 0.03, True)
    assert_near(AlignLoss()(out, target).loss, expected, 1e-12)


def test_items_that_lack_tokens_on_either_side_are_left_out():
    first, second = torch.ones(7, dtype=torch.bool), torch.ones(7, dtype=torch.bool)
    first[2], second[5] = False, False
    kept = first & second
    for valid, rows in (((first, None), first), ((None, second), second), ((first, second), kept)):
        out, target = outputs(valid=valid)
        inner = ConnectorOut(out.reg[rows], out.cl[rows], ()), TargetOut(target.reg[rows], target.cl[rows])
        assert_near(AlignLoss()(out, target).loss, AlignLoss()(*inner).loss, 1e-12)


def test_items_of_one_group_are_no_negatives_of_each_other():
    out, target = outputs(B=4)
    ids = torch.tensor([3, 1, 3, 2])
    similarity = F.normalize(out.cl, dim=1) @ F.normalize(target.cl, dim=1).T / 0.03
    similarity = similarity.masked_fill((ids[:, None] == ids) & ~torch.eye(4, dtype=torch.bool), -math.inf)
    own = torch.arange(4)
    expected = (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2
    assert_near(AlignLoss()(out, target, ids).cl, expected, 1e-12)


def test_one_item_has_no_contrastive_loss_and_equal_ones_the_logarithm_of_their_number():
    out, target = outputs(B=1)
    found = AlignLoss(alpha=0)(out, target)
    assert found.loss == 0 and not torch.autograd.grad(found.loss, out.cl)[0].any()
    same = torch.ones(6, 3, dtype=torch.float64)
    found = AlignLoss()(ConnectorOut(same, same, ()), TargetOut(same, same))
    assert found.cl.item() == pytest.approx(math.log(6)) and found.reg == 0


def test_wrong_arguments_are_named():
    for message, options in {
        r"tau must be finite and greater than 0, got 0": {"tau": 0},
        r"alpha must be from 0 to 1, got 2": {"alpha": 2},
        r"beta must be finite and not negative, got -1": {"beta": -1},
        r"regression must be one of smooth_l1, mse, l2, cosine, got 'l1'": {"regression": "l1"},
        r"negatives must be one of local, gathered, got 'all'": {"negatives": "all"},
    }.items():
        with pytest.raises(ValueError, match=message):
            AlignLoss(**options)
