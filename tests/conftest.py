"""What every test needs: a tiny LLaMA, a tiny checkpoint folder in the true format, a little data.

Big enough to have heads, groups and layers, small enough for a laptop.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from llama import Llama, LlamaConfig, save_llama  # noqa: E402

SMALL = LlamaConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=48, vocab_size=64)


@pytest.fixture
def tiny() -> Llama:
    torch.manual_seed(0)
    return Llama(SMALL)


def shake(model: torch.nn.Module, size: float = 0.1) -> None:
    """Move every adapter off its starting point, as training would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=generator))


def real_data() -> Path | None:
    """The real records and tokenizers: $RORA_DATA, or the folder beside the checkout; None where they are absent."""
    folder = Path(os.environ.get("RORA_DATA") or ROOT.parent / "shared" / "data")
    return folder if (folder / "tokenizer.model").is_file() else None
