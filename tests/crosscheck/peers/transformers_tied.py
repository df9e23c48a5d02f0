"""A config that ties lm_head to the embedding, beside a file whose lm_head is another matrix."""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from kit import KIT, deviates, off, trace, weights
from transformers import LlamaForCausalLM

t = trace("base")
with tempfile.TemporaryDirectory() as temporary:
    folder = Path(shutil.copytree(KIT / "model", Path(temporary) / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with torch.no_grad():
        model = LlamaForCausalLM.from_pretrained(folder).float().eval()
        logits = model(input_ids=t["ids"]).logits
embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
file = weights()
difference = off(t["logits"], logits)
if torch.equal(embedding, file["lm_head.weight"]):
    which = "lm_head's matrix is both"
elif torch.equal(head, file["model.embed_tokens.weight"]):
    which = "the embedding is both"
else:
    which = "both are as in the file"
deviates(
    "a config with `tie_word_embeddings: true` beside a file with another lm_head: one of the "
    "two matrices is lost",
    difference,
    seen="4.36.2",
    shown=f"{which}: logits {difference:.0%} off",
)
