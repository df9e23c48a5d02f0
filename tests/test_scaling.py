"""The paper's claim on one layer: what the first step does as the rank grows sixteenfold."""

import pytest
import torch
from torch import nn

from rora import SCALES, LoRALinear, RoRALinear


def first_step(Layer, rank: int, optimizer: str) -> tuple[float, float]:
    """(size of lora_B's gradient, fall of the loss after one small step)."""
    torch.manual_seed(0)
    base = nn.Linear(512, 512, bias=False).requires_grad_(False)
    layer = Layer(base, rank, alpha=16).double()
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


def from_rank_16_to_256(Layer, optimizer: str) -> tuple[float, float]:
    """By what factor gradient and progress change."""
    gradient16, progress16 = first_step(Layer, 16, optimizer)
    gradient256, progress256 = first_step(Layer, 256, optimizer)
    return gradient256 / gradient16, progress256 / progress16


def test_under_gradient_descent_lora_takes_a_sixteenth_of_the_step_at_sixteen_times_the_rank():
    """s = α/r: a quarter of the gradient, a sixteenth of the progress."""
    gradient, progress = from_rank_16_to_256(LoRALinear, "sgd")
    assert gradient == pytest.approx(1 / 4, rel=0.1)
    assert progress == pytest.approx(1 / 16, rel=0.1)


def test_under_gradient_descent_rora_takes_the_same_step_at_every_rank():
    """s = α/√r: the same gradient, the same progress."""
    gradient, progress = from_rank_16_to_256(RoRALinear, "sgd")
    assert gradient == pytest.approx(1, rel=0.1)
    assert progress == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("Layer, factor", [(LoRALinear, 1), (RoRALinear, 4)])
def test_under_adamw_it_is_lora_that_takes_the_same_step_at_every_rank(Layer, factor):
    """AdamW's first step moves each entry of lora_B by lr, whatever its gradient: the progress is
    lr · s times a sum over r rows. At sixteen times the rank, RoRA's is √16 times larger."""
    _, progress = from_rank_16_to_256(Layer, "adamw")
    assert progress == pytest.approx(factor, rel=0.1)


def test_at_rank_1_both_rules_agree_and_from_there_the_root_is_larger():
    assert SCALES["linear"](64, 1) == SCALES["sqrt"](64, 1) == 64
    assert [SCALES["sqrt"](64, r) / SCALES["linear"](64, r) for r in (4, 16, 64)] == [2, 4, 8]
