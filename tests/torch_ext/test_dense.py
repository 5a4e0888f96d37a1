"""What may become an expert: MLPs are recognised by what they compute, and refused where that is not an expert."""

import pytest
import torch
from torch import nn

from mmbal import MoEMLP
from mmbal.dense import describe_mlp


def mlp(*between, after=()):
    return nn.Sequential(nn.Linear(6, 10), *between, nn.Linear(10, 6), *after)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.SiLU(inplace=True), "silu"),
    ],
)
def test_an_activation_is_recognised_by_its_values(module, name):
    assert describe_mlp(mlp(module), "block").activation == name


@pytest.mark.parametrize("module", [nn.ReLU6(), nn.Hardtanh(-6, 6), nn.Mish(inplace=True), nn.LeakyReLU(0.1, True)])
def test_an_unknown_activation_is_refused_also_when_it_works_in_place(module):
    with pytest.raises(ValueError, match="block: its activation was not recognised"):
        describe_mlp(mlp(module), "block")


def test_dropouts_are_taken_from_where_they_stand():
    parts = describe_mlp(mlp(nn.GELU(), nn.Dropout(0.1), after=[nn.Dropout(0.2)]), "block")
    assert (parts.dropout, parts.output_dropout) == (0.1, 0.2)


def test_a_dropout_of_the_input_is_refused():
    with pytest.raises(ValueError, match=r"nn\.Dropout"):
        describe_mlp(nn.Sequential(nn.Dropout(0.1), *mlp(nn.GELU())), "block")


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6)

    def forward(self, x):
        return x + self.fc2(self.act(self.fc1(x)))


def test_an_mlp_that_computes_something_else_is_refused():
    with pytest.raises(ValueError, match=r"must compute fc2\(gelu\(fc1\(x\)\)\), Residual computes something else"):
        MoEMLP.from_mlps([Residual(), Residual()])


def test_a_wrong_activation_said_by_hand_is_refused():
    with pytest.raises(ValueError, match="something else"):
        describe_mlp(mlp(nn.GELU()), "block", activation="relu")


def test_looking_at_an_mlp_leaves_it_as_it_was():
    block = mlp(nn.GELU(), nn.Dropout(0.1)).train()
    before = {name: value.clone() for name, value in block.state_dict().items()}
    describe_mlp(block, "block")
    assert block.training and block[2].training
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
