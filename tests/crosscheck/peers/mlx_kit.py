"""mlx-lm's LoRA and DoRA on the conformance kit, gradients included."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import torch
from kit import KIT, RANK, SCALE, adapter, conforms, trace
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

ARGS = ModelArgs(
    model_type="llama",
    hidden_size=32,
    num_hidden_layers=2,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    vocab_size=96,
    tie_word_embeddings=False,
)


def array(tensor: torch.Tensor) -> mx.array:
    return mx.array(tensor.numpy())


def model(case: str) -> Model:
    """mlx-lm has no alpha: it is given the scale itself, and keeps A and B transposed."""
    model = Model(ARGS)
    model.load_weights(str(KIT / "model/model.safetensors"))
    tensors = adapter(case)
    for i, block in enumerate(model.layers):
        for parent, names in {"self_attn": "qkvo", "mlp": ("gate", "up", "down")}.items():
            for name in (f"{x}_proj" for x in names):
                kind = DoRALinear if case.startswith("dora") else LoRALinear
                linear = getattr(getattr(block, parent), name)
                layer = kind.from_base(linear, r=RANK, scale=SCALE[case])
                path = f"layers.{i}.{parent}.{name}."
                layer.lora_a = array(tensors[path + "lora_A"].T)
                layer.lora_b = array(tensors[path + "lora_B"].T)
                if kind is DoRALinear:
                    layer.m = array(tensors[path + "lora_magnitude_vector"])
                setattr(getattr(block, parent), name, layer)
    model.freeze()
    model.apply_to_modules(
        lambda _, m: (
            m.unfreeze(keys=["lora_a", "lora_b", "m"], recurse=False, strict=False)
            if isinstance(m, (LoRALinear, DoRALinear))
            else None
        )
    )
    return model


def tensor(x: mx.array) -> torch.Tensor:
    return torch.from_numpy(np.array(x))


for case in SCALE:
    t, theirs = trace(case), model(case)
    ids, targets = array(t["ids"]), array(t["targets"])
    loss_of = lambda m, ids=ids, targets=targets: nn.losses.cross_entropy(
        m(ids), targets, reduction="mean"
    )
    loss, gradients = nn.value_and_grad(theirs, loss_of)(theirs)
    told = {"logits": tensor(theirs(ids)), "loss": tensor(loss)}
    names = {"lora_a": "lora_A", "lora_b": "lora_B", "m": "magnitude"}
    for name, g in tree_flatten(gradients):
        layer, _, part = name.removeprefix("model.").rpartition(".")
        g = tensor(g)
        told[f"grad.{layer}.{names[part]}"] = g if part == "m" else g.T
    conforms(case, told)
