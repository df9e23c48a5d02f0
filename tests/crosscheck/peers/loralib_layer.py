"""loralib's Linear, the first LoRA there was: one layer, forward, merged and gradients."""

import loralib
import torch
from kit import ALPHA, RANK, adapter, agrees, relative, weights

from rora import LoRALinear

W = weights()["model.layers.0.mlp.up_proj.weight"]  # (O, I)
x = torch.randn(32, W.size(1), generator=torch.Generator().manual_seed(0))
ours = LoRALinear(torch.nn.Linear(*W.T.shape, bias=False), RANK, ALPHA)
theirs = loralib.Linear(*W.T.shape, r=RANK, lora_alpha=ALPHA, bias=False)
tensors = adapter("lora")
with torch.no_grad():
    ours.base.weight.copy_(W)
    theirs.weight.copy_(W)
    for part in ("lora_A", "lora_B"):
        getattr(ours, part).copy_(tensors[f"layers.0.mlp.up_proj.{part}"])
        getattr(theirs, part).copy_(getattr(ours, part))
for layer in (ours, theirs):
    layer(x).square().mean().backward()
told = [relative(ours(x), theirs(x))]
told += [relative(getattr(ours, p).grad, getattr(theirs, p).grad) for p in ("lora_A", "lora_B")]
theirs.eval()  # merges as a side effect
told.append(relative(ours.merged_weight(), theirs.weight))
agrees("one linear layer with α/r: output, gradients, merged weight", max(told))
