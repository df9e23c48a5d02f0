"""PEFT's add_weighted_adapter keeps use_rslora: what it combines is √(new rank) too large."""

import torch
from kit import deviates
from peft import LoraConfig, get_peft_model

torch.manual_seed(0)
config = LoraConfig(
    r=8, lora_alpha=16, target_modules=["0"], use_rslora=True, init_lora_weights=False
)
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(32, 32)), config, adapter_name="one")
model.add_adapter("two", config)
model.add_weighted_adapter(["one", "two"], [0.7, 0.4], "sum", combination_type="cat")
layer = model.base_model.model[0]
want = 0.7 * layer.get_delta_weight("one") + 0.4 * layer.get_delta_weight("two")
ratio = (layer.get_delta_weight("sum").norm() / want.norm()).item()
deviates(
    "`add_weighted_adapter` of two rsLoRA adapters of rank 8: the sum keeps `use_rslora`, and is "
    "√(new rank) too large",
    abs(ratio - 1),
    seen="0.21.2",
    shown=f"× {ratio:.3f}",
)
