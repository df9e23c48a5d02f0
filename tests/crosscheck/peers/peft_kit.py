"""transformers and PEFT, of any age, on the conformance kit."""

import inspect

import torch.nn.functional as F
from kit import KIT, RANK, conforms, skip, trace
from peft import LoraConfig, PeftModel
from transformers import LlamaForCausalLM

known = inspect.signature(LoraConfig).parameters
trace_names = {
    "lora_A.default.weight": "lora_A",
    "lora_B.default.weight": "lora_B",
    "lora_magnitude_vector.default.weight": "magnitude",
    "lora_magnitude_vector.default": "magnitude",
}


def our_name(theirs: str) -> str:
    """base_model.model.model.layers.0.….q_proj.lora_A.default.weight -> layers.0.….q_proj.lora_A"""
    theirs = theirs.removeprefix("base_model.model.model.")
    for end, ours in trace_names.items():
        if theirs.endswith(end):
            return theirs.removesuffix(end) + ours
    return theirs


def run(case: str) -> dict:
    t = trace(case)
    model = LlamaForCausalLM.from_pretrained(KIT / "model").float().eval()
    if case != "base":
        model = PeftModel.from_pretrained(model, KIT / case).eval()
    if case == "prefix":
        model.prompt_encoder["default"].embedding.weight.requires_grad_()
    else:
        for name, p in model.named_parameters():
            p.requires_grad_("lora_" in name)
    logits = model(input_ids=t["ids"]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), t["targets"].flatten())
    theirs = {"logits": logits, "loss": loss}
    if case == "base":
        return theirs
    loss.backward()
    if case == "prefix":
        grad = model.prompt_encoder["default"].embedding.weight.grad
        P, G = RANK, model.config.num_key_value_heads
        grad = grad.view(P, -1, G, grad.numel() // P // G // 2 // model.config.num_hidden_layers)
        grad = grad.permute(1, 2, 0, 3)  # (2 L, G, P, D)
        names = [f"layers.{i // 2}.self_attn.prefix_{'kv'[i % 2]}" for i in range(len(grad))]
        return theirs | {f"grad.{name}": g for name, g in zip(names, grad)}
    grads = {our_name(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return theirs | {f"grad.{name}": g for name, g in grads.items()}


for case, flag in {
    "base": None,
    "lora": None,
    "rora": "use_rslora",
    "dora": "use_dora",
    "dora-sqrt": "use_dora",
    "prefix": None,
}.items():
    if flag in known or flag is None:
        conforms(case, run(case))
    else:
        skip(case, f"does not know {flag}")
