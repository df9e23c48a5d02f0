"""transformers' own load_adapter, on a DoRA folder that PEFT reads right."""

import torch
from kit import KIT, deviates, off, trace
from transformers import LlamaForCausalLM

t = trace("dora")
model = LlamaForCausalLM.from_pretrained(KIT / "model").float().eval()
model.load_adapter(str(KIT / "dora"))
with torch.no_grad():
    difference = off(t["logits"], model.eval()(input_ids=t["ids"]).logits)
deviates(
    "`load_adapter` on PEFT's DoRA folder leaves the magnitudes at ‖W‖ (PeftModel reads them)",
    difference,
    seen="5.23.0",
    shown=f"logits {difference:.1%} off",
)
