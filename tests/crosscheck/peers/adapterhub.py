"""AdapterHub's LoRA, DoRA and prefix tuning on LLaMA."""

import adapters
import torch
import transformers
from kit import ALPHA, KIT, RANK, adapter, agrees, deviates, off, relative, trace
from transformers import LlamaForCausalLM

from llama import load_llama
from rora import attach, trainable

transformers.logging.set_verbosity_error()
ids = trace("base")["ids"]


def model(config, attention: str = "eager", name: str = "a", **how) -> LlamaForCausalLM:
    how |= {"attn_implementation": attention, "dtype": torch.float32}
    model = LlamaForCausalLM.from_pretrained(KIT / "model", **how)
    adapters.init(model)
    if config is not None:
        model.add_adapter(name, config=config)
        model.set_active_adapters(name)
    return model.eval()


def lora_layers(model):
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "v_proj")):
            yield name.removeprefix("model."), module.loras["a"]


@torch.no_grad()
def lora() -> None:
    """q and v alone: AdapterHub does not reach the others by their names."""
    ours = load_llama(KIT / "model", dtype=torch.float32)
    attach(ours, "lora", RANK, ALPHA, targets=["q_proj", "v_proj"])
    theirs = model(adapters.LoRAConfig(r=RANK, alpha=ALPHA, attn_matrices=["q", "v"]))
    tensors, params = adapter("lora"), trainable(ours)
    for name, layer in lora_layers(theirs):
        for part in ("lora_A", "lora_B"):
            params[f"{name}.{part}"].copy_(tensors[f"{name}.{part}"])
            getattr(layer, part).copy_(tensors[f"{name}.{part}"])
    agrees("lora on q and v: logits", relative(ours(ids), theirs(ids).logits))


@torch.no_grad()
def dora() -> None:
    """Its forward against its own merge, at s = 1, where nothing can be left out, and at s = 4."""
    for alpha in (RANK, ALPHA):
        config = adapters.LoRAConfig(r=RANK, alpha=alpha, use_dora=True, attn_matrices=["q", "v"])
        theirs, tensors = model(config), adapter("dora")
        for name, layer in lora_layers(theirs):
            for part in ("lora_A", "lora_B"):
                getattr(layer, part).copy_(tensors[f"{name}.{part}"])
        forward = theirs(ids).logits
        theirs.merge_adapter("a")
        difference = off(forward, theirs(ids).logits)
        if alpha == RANK:
            agrees("dora with s = 1: logits before and after its own merge", difference)
        else:
            deviates(
                "DoRA's norm and merge leave out the scale s",
                difference,
                seen="1.3.0",
                shown=f"s = 4: merged {difference:.0%} off its own forward",
            )


@torch.no_grad()
def prefix() -> None:
    """Under torch's fused attention, which is the default, against eager attention."""
    made = []
    for attention in ("eager", "sdpa"):
        config = adapters.PrefixTuningConfig(prefix_length=5, flat=True)
        theirs = model(config, attention)
        generator = torch.Generator().manual_seed(0)
        for name, p in theirs.named_parameters():
            if "control_trans" in name:
                p.copy_(3 * torch.randn(p.shape, generator=generator))
        made.append(theirs)
    eager, sdpa = made
    other = ids.clone()
    other[:, 5] = (other[:, 5] + 1) % 96

    def moved(model) -> list[int]:
        change = (model(ids).logits - model(other).logits).abs().amax((0, 2))
        return (change > 1e-5).nonzero().flatten().tolist()

    difference = off(eager(ids).logits, sdpa(ids).logits)
    deviates(
        "prefix tuning under sdpa, the default: the causal mask is misaligned",
        difference,
        seen="1.3.0",
        shown=f"logits {difference:.0%} off eager; token 5 of 0 … 15 moves the logits at "
        f"{', '.join(map(str, moved(sdpa)))} alone",
    )
    mask = torch.ones_like(ids)
    mask[1, 0] = 0  # one padded row, and the other row's prefix is gone
    with_prefix = sdpa(ids, attention_mask=mask).logits[0]
    right = eager(ids, attention_mask=mask).logits[0]
    without = model(None, "sdpa")(ids, attention_mask=mask).logits[0]
    deviates(
        "prefix tuning under sdpa with a padding mask: the prefix is masked out",
        off(right, with_prefix),
        seen="1.3.0",
        shown=f"logits {off(right, with_prefix):.0%} off eager, {off(without, with_prefix):.0e} "
        "off the model without a prefix",
    )


lora()
dora()
prefix()
