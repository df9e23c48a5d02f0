"""How tests/golden/kit was made: a small random LLaMA, adapters on it, and what they compute.

    python tests/golden/make_kit.py

The kit is fixed: an implementation that once agreed with it must go on agreeing. It is made anew
only where a file's format changes, never to make a test pass.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root

from llama import Llama, LlamaConfig, load_llama, save_llama  # noqa: E402
from rora import attach, save_adapter, trainable  # noqa: E402

KIT = Path(__file__).parent / "kit"
CONFIG = LlamaConfig(
    dim=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    hidden_dim=64,
    vocab_size=96,
    norm_eps=1e-5,
    max_positions=64,
)
EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "base": None,
    "lora": {"method": "lora"},
    "rora": {"method": "rora"},
    "dora": {"method": "dora"},
    "dora-sqrt": {"method": "dora", "scale": "sqrt"},
    "prefix": {"method": "prefix"},
}


def random_model(generator: torch.Generator) -> Llama:
    """Weights wide enough for logits of order 1; norms that are not all one."""
    model = Llama(CONFIG)
    for name, p in model.named_parameters():
        mean, std = (1.0, 0.2) if "norm" in name else (0.0, 0.15)
        p.data.copy_(mean + std * torch.randn(p.shape, generator=generator))
    return model


def trace(model: Llama, ids: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Every block's output, the logits, the loss, and its gradient to every adapter tensor."""
    B, T = ids.shape
    kept = {}
    for i, block in enumerate(model.layers):
        block.register_forward_hook(
            lambda _, __, y, i=i: kept.update({f"layers.{i}": y.detach().view(B, T, -1)})
        )
    logits = model(ids)  # (B, T, V)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    adapters = trainable(model)
    if adapters:
        gradients = torch.autograd.grad(loss, list(adapters.values()))
        kept |= {f"grad.{name}": g for name, g in zip(adapters, gradients)}
    return kept | {"logits": logits.detach(), "loss": loss.detach()}


def make() -> None:
    generator = torch.Generator().manual_seed(0)
    save_llama(random_model(generator), KIT / "model")
    tokens = torch.randint(CONFIG.vocab_size, (2, 17), generator=generator)
    inputs = {"ids": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}
    for case, how in CASES.items():
        folder = KIT / case
        folder.mkdir(exist_ok=True)
        model = load_llama(KIT / "model", dtype=torch.float32).eval()
        model.requires_grad_(False)
        if how:
            targets = None if case == "prefix" else EVERY_LINEAR
            attach(model, rank=4, alpha=16, targets=targets, **how)
            for name, p in trainable(model).items():  # away from the start: all of it must matter
                noise = torch.randn(p.shape, generator=generator)
                if name.endswith("magnitude"):
                    p.data.mul_(1 + 0.2 * noise)
                else:
                    p.data.copy_(noise if case == "prefix" else 0.1 * noise)
            save_adapter(model, folder)
        save_file(inputs | trace(model, **inputs), folder / "trace.safetensors", {"format": "pt"})


if __name__ == "__main__":
    make()
