"""PEFT's DoRA: magnitudes without their flag, and where dropout acts."""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from kit import KIT, deviates, off, relative, trace
from peft import PeftModel
from transformers import LlamaForCausalLM

ids = trace("dora")["ids"]


def model(folder: Path) -> torch.nn.Module:
    base = LlamaForCausalLM.from_pretrained(KIT / "model").float().eval()
    return PeftModel.from_pretrained(base, folder).eval()


def merged(folder: Path) -> torch.Tensor:
    """The first block's q_proj, adapter merged."""
    return model(folder).merge_and_unload().model.layers[0].self_attn.q_proj.weight


with tempfile.TemporaryDirectory() as temporary:
    folder = Path(shutil.copytree(KIT / "dora", Path(temporary) / "dora"))
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["use_dora"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    difference = off(merged(KIT / "dora"), merged(folder))
    deviates(
        "an adapter_config.json without `use_dora` beside magnitudes: they are dropped without a "
        "word (we refuse the folder)",
        difference,
        seen="0.21.2",
        shown=f"weights {difference:.0%} off",
    )

# DoRA's layer with dropout: everything of A's input is dropped, so what is left is g·W x or W x.
layer = model(KIT / "dora").base_model.model.model.layers[0].self_attn.q_proj
layer.lora_dropout["default"] = dropped = torch.nn.Dropout(0.5).train()
x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
torch.manual_seed(1)
mask = dropped(torch.ones_like(x))
torch.manual_seed(1)
with torch.no_grad():
    theirs = layer(x)
    W, s = layer.base_layer.weight, layer.scaling["default"]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    g = layer.lora_magnitude_vector["default"].weight / (W + s * B @ A).norm(dim=1)
    on_the_branch = g * (x @ W.T + s * (x * mask) @ A.T @ B.T)
deviates(
    "DoRA drops inside (g − 1) W x too, as the original does; torchtune, MLX and we drop on the "
    "adapter's branch alone (equal at dropout 0)",
    relative(on_the_branch, theirs),
    seen="0.21.2",
    shown=f"one layer, dropout 0.5: {off(on_the_branch, theirs):.0%} off",
)
