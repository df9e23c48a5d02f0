"""The committed trace: what this code computed for the embedded model, and goes on computing."""

import json

import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors import safe_open

from llama import load_llama
from rora import attach, trainable

TRACE = ROOT / "tests/golden/trace.safetensors"


def test_logits_loss_and_gradients_are_those_of_the_committed_trace():
    with safe_open(TRACE, "pt") as file:
        trace = {name: file.get_tensor(name) for name in file.keys()}
        how = json.loads(file.metadata()["settings"])
    model = load_llama(ROOT / "tiny", dtype=torch.float32)
    attach(
        model,
        how["method"],
        how["rank"],
        how["alpha"],
        targets=how["targets"],
        scale=how["scale"],
    )
    for name, p in trainable(model).items():
        p.data.copy_(trace[f"adapter.{name}"])
    logits = model(trace["ids"])
    loss = F.cross_entropy(logits.flatten(0, 1), trace["targets"].flatten())
    loss.backward()
    assert torch.allclose(logits, trace["logits"], atol=1e-4)
    assert torch.allclose(loss, trace["loss"], atol=1e-5)
    for name, p in trainable(model).items():
        want = trace[f"grad.{name}"]
        # Processors round in different places: the difference is relative to the largest entry.
        assert (p.grad - want).abs().max() <= 1e-4 * want.abs().max(), name
