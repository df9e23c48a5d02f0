"""litgpt's LoRA on the conformance kit: q, k and v are one matrix there."""

import torch
import torch.nn.functional as F
from kit import RANK, SCALE, adapter, conforms, trace, weights
from litgpt.lora import GPT, Config
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama

PLACES = {
    "self_attn.o_proj": "attn.proj",
    "mlp.gate_proj": "mlp.fc_1",
    "mlp.up_proj": "mlp.fc_2",
    "mlp.down_proj": "mlp.proj",
}


def model(case: str) -> torch.nn.Module:
    config = Config(
        block_size=64,
        vocab_size=96,
        padded_vocab_size=96,
        n_layer=2,
        n_head=4,
        n_query_groups=2,
        n_embd=32,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=1e-5,
        mlp_class_name="LLaMAMLP",
        intermediate_size=64,
        lora_r=RANK,
        lora_alpha=SCALE[case] * RANK,  # litgpt always divides by r
        lora_dropout=0.0,
        **{f"lora_{part}": True for part in ("query", "key", "value", "projection", "mlp")},
    )
    model, state = GPT(config), {}
    copy_weights_hf_llama(config, {}, state, weights())
    state = {
        name.replace(".weight", ".linear.weight")
        if "attn" in name or "mlp" in name or "lm_head" in name
        else name: tensor
        for name, tensor in state.items()
    }
    tensors = adapter(case)
    for i in range(config.n_layer):
        for part in ("lora_A", "lora_B"):
            qkv = [tensors[f"layers.{i}.self_attn.{x}_proj.{part}"] for x in "qkv"]
            state[f"transformer.h.{i}.attn.qkv.{part}"] = torch.cat(qkv)
            for ours, theirs in PLACES.items():
                state[f"transformer.h.{i}.{theirs}.{part}"] = tensors[f"layers.{i}.{ours}.{part}"]
    model.load_state_dict(state)
    return model.eval()


for case in ("lora", "rora"):
    t = trace(case)
    logits = model(case)(t["ids"])
    loss = F.cross_entropy(logits.flatten(0, 1), t["targets"].flatten())
    conforms(case, {"logits": logits, "loss": loss})
