"""The paper's claim, measured on one layer: what the first step of training does, as the rank grows sixteenfold."""

import pytest
import torch
from torch import nn

from rora import SCALES, LoRALinear, RoRALinear


def first_step(Layer, rank: int, optimizer: str) -> tuple[float, float]:
    """(size of lora_B's gradient, fall of the loss after one small step)."""
    torch.manual_seed(0)
    layer = Layer(nn.Linear(512, 512, bias=False).requires_grad_(False), rank, alpha=16).double()
    x, goal = torch.randn(64, 512).double(), torch.randn(64, 512).double()
    loss = lambda: (layer(x) - goal).pow(2).mean()
    before = loss()
    before.backward()
    gradient = layer.lora_B.grad.norm().item()
    step = {
        "sgd": torch.optim.SGD([layer.lora_B], lr=1e-4),
        "adamw": torch.optim.AdamW([layer.lora_B], lr=1e-7, weight_decay=0),
    }[optimizer]
    step.step()
    return gradient, (before - loss()).item()


@pytest.mark.parametrize(
    "Layer, gradient, progress", [(LoRALinear, 1 / 4, 1 / 16), (RoRALinear, 1, 1)]
)
def test_under_gradient_descent_the_root_makes_the_first_step_the_same_at_every_rank(
    Layer, gradient, progress
):
    """α/r: a quarter of the gradient, a sixteenth of the progress. α/√r: the same of both. (Eq. 14, 15)"""
    (g16, p16), (g256, p256) = first_step(Layer, 16, "sgd"), first_step(Layer, 256, "sgd")
    assert g256 / g16 == pytest.approx(gradient, rel=0.1)
    assert p256 / p16 == pytest.approx(progress, rel=0.1)


@pytest.mark.parametrize("Layer, progress", [(LoRALinear, 1), (RoRALinear, 4)])
def test_under_adamw_it_is_the_plain_rank_that_does(Layer, progress):
    """AdamW's first step moves each entry of lora_B by lr, whatever its gradient: the progress is lr · s times a sum over r rows."""
    assert first_step(Layer, 256, "adamw")[1] / first_step(Layer, 16, "adamw")[1] == pytest.approx(
        progress, rel=0.1
    )


def test_at_rank_one_both_rules_agree_and_from_there_the_root_is_larger():
    assert SCALES["linear"](64, 1) == SCALES["sqrt"](64, 1) == 64
    assert [SCALES["sqrt"](64, r) / SCALES["linear"](64, r) for r in (4, 16, 64)] == [2, 4, 8]
