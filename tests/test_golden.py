"""The committed trace: what this code computed once for the embedded checkpoint, and must go on computing."""

import json

import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors import safe_open

from llama import load_llama
from rora import attach, trainable

TRACE = ROOT / "tests/golden/trace.safetensors"


def test_the_golden_trace_is_what_this_code_computes():
    with safe_open(TRACE, "pt") as file:
        t, settings = (
            {name: file.get_tensor(name) for name in file.keys()},
            json.loads(file.metadata()["settings"]),
        )
    model = load_llama(ROOT / "tiny", dtype=torch.float32)
    attach(
        model,
        settings["method"],
        settings["size"],
        settings["alpha"],
        targets=settings["targets"],
        scale=settings["scale"],
    )
    for name, p in trainable(model).items():
        p.data.copy_(t[f"adapter.{name}"])
    logits = model(t["ids"])
    loss = F.cross_entropy(logits.flatten(0, 1), t["targets"].flatten())
    loss.backward()
    assert torch.allclose(logits, t["logits"], atol=1e-4) and torch.allclose(
        loss, t["loss"], atol=1e-5
    )
    for name, p in trainable(model).items():
        want = t[f"grad.{name}"]  # processors round in different places: relative to the largest
        assert (p.grad - want).abs().max() <= 1e-4 * want.abs().max(), name
