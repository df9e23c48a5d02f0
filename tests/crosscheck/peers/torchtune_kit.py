"""torchtune's LoRA and DoRA on the conformance kit, and its way out to PEFT's format."""

import re
from pathlib import Path

import torch
import torch.nn.functional as F
import torchtune
from kit import ALPHA, RANK, SCALE, adapter, conforms, deviates, off, trace, weights
from torchtune.models.convert_weights import (
    hf_to_tune,
    tune_to_hf,
    tune_to_peft_adapter_weights,
)
from torchtune.models.llama2 import lora_llama2
from torchtune.modules.peft import get_adapter_params, get_merged_lora_ckpt

from tools.meta_to_hf import hf_to_meta

SHAPE = {"num_heads": 4, "num_kv_heads": 2, "dim": 32}
NAMES = {
    "self_attn": "attn",
    "o_proj": "output_proj",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "lora_A": "lora_a.weight",
    "lora_B": "lora_b.weight",
    "lora_magnitude_vector": "magnitude",
}


def model(case: str, alpha: float = ALPHA) -> torch.nn.Module:
    """torchtune rotates the pairs (2j, 2j+1), as Meta does: rows of q and k change places."""
    model = lora_llama2(
        ["q_proj", "k_proj", "v_proj", "output_proj"],
        apply_lora_to_mlp=True,
        vocab_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=32,
        max_seq_len=64,
        intermediate_dim=64,
        lora_rank=RANK,
        lora_alpha=alpha,
        use_dora=case.startswith("dora"),
    )
    state = hf_to_tune(weights(), **SHAPE)
    for name, tensor in adapter(case).items():
        if not name.endswith("lora_A"):
            heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
            tensor = hf_to_meta(tensor, heads) if heads else tensor
        state[".".join(NAMES.get(part, part) for part in name.split("."))] = tensor
    model.load_state_dict(state)
    return model.eval()


def run(case: str, alpha: float) -> dict[str, torch.Tensor]:
    t = trace(case)
    logits = model(case, alpha)(t["ids"])
    loss = F.cross_entropy(logits.flatten(0, 1), t["targets"].flatten())
    return {"logits": logits, "loss": loss}


for case, s in SCALE.items():  # torchtune always divides by r: for √r it is given s·r
    conforms(case, run(case, s * RANK))

# Out to PEFT and back to one matrix, against torchtune's own merge of the same adapter.
theirs = model("dora")
state = {name: t.detach().clone() for name, t in theirs.state_dict().items()}
merged = tune_to_hf(get_merged_lora_ckpt(dict(state), rank=RANK, alpha=ALPHA), **SHAPE)
exported = tune_to_peft_adapter_weights(
    {name: p.detach() for name, p in get_adapter_params(theirs).items()}, **SHAPE
)
base, layer = weights(), "model.layers.0.self_attn.q_proj"
A, B, m = (
    exported[f"base_model.model.{layer}.{part}"]
    for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
)
V = base[f"{layer}.weight"] + ALPHA / RANK * B @ A
difference = off(merged[f"{layer}.weight"], (m / V.norm(dim=1))[:, None] * V)
deviates(
    "`tune_to_peft_adapter_weights` brings lora_B of q and k to Hugging Face's row order, not the "
    "DoRA magnitude",
    difference,
    seen="0.6.1",
    shown=f"exported q_proj {difference:.0%} off its own merge",
)
# What its recipes write as adapter_config.json, read off their source.
recipe = Path(torchtune.__file__).parents[1] / "recipes/lora_finetune_single_device.py"
written = re.search(r"adapter_config = \{\n.*?\n +\}\n", recipe.read_text(), re.S)[0]
deviates(
    "its recipes' adapter_config.json has no `use_dora`: PEFT then drops the magnitudes",
    float("use_dora" not in written),
    seen="0.6.1",
    shown="keys " + ", ".join(re.findall(r'"(\w+)":', written)),
)
