"""The idea in ten lines: how long is lora_B's first gradient at rank r, under α/r and under α/√r?

    python lessons/class/gradient.py

LoRA's halves whenever the rank grows fourfold, RoRA's stays.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # where rora.py is

# --- the ten lines --------------------------------------------------------------------------------

import torch
from rora import LoRALinear, RoRALinear

torch.manual_seed(0)
base = torch.nn.Linear(512, 512)
x, goal = torch.randn(64, 512), torch.randn(64, 512)
for Layer in (LoRALinear, RoRALinear):  # γ = α/r, γ = α/√r
    for rank in (4, 16, 64, 256):
        layer = Layer(base, rank, alpha=16)
        torch.nn.functional.mse_loss(layer(x), goal).backward()
        print(f"{Layer.__name__}, r = {rank:3}: {layer.lora_B.grad.norm():.3f}")
