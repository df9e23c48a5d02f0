"""The conformance kit: this code goes on computing it, and tools/conform.py judges others by it."""

import copy

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from llama import load_llama
from rora import load_adapter
from tests.golden.make_kit import CASES, trace
from tools.conform import AGREES, differences, main, suspects

KIT = ROOT / "tests/golden/kit"


def model_of(case: str):
    model = load_llama(KIT / "model", dtype=torch.float32).eval().requires_grad_(False)
    if CASES[case]:
        load_adapter(model, KIT / case)
    return model


@pytest.mark.parametrize("case", CASES)
def test_this_code_computes_what_the_kit_holds(case):
    want = load_file(KIT / case / "trace.safetensors")
    told = differences(want, trace(model_of(case), want["ids"], want["targets"]))
    assert told.keys() == want.keys() - {"ids", "targets"}
    assert max(told.values()) < AGREES


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case]])
def test_each_known_mistake_is_seen_and_called_by_its_name(case, tmp_path, capsys):
    ids = load_file(KIT / case / "trace.safetensors")["ids"]
    model, method = model_of(case), CASES[case]["method"]
    right = {"lora": "the scale α/r", "rora": "the scale α/√r"}.get(case)
    if case in ("dora", "dora-sqrt"):
        right = "the scale α/√r" if case == "dora-sqrt" else "the scale α/r"
    for what, change in suspects(method).items():
        if what == right:
            continue
        wrong = copy.deepcopy(model)
        with torch.no_grad():
            change(wrong)
            save_file({"logits": wrong(ids)}, tmp_path / "theirs.safetensors")
        assert main([str(KIT / case), "--logits", str(tmp_path / "theirs.safetensors")]) == 4
        assert what in capsys.readouterr().out
        with torch.no_grad():
            moved = (wrong(ids) - model(ids)).abs().max() / model(ids).abs().max()
        assert moved > 0.3, what


def test_bare_fp32_numbers_will_do(tmp_path, capsys):
    logits = load_file(KIT / "rora/trace.safetensors")["logits"]
    (tmp_path / "logits.bin").write_bytes(logits.numpy().tobytes())
    assert main([str(KIT / "rora"), "--logits", str(tmp_path / "logits.bin")]) == 0
    assert "agrees" in capsys.readouterr().out
    (tmp_path / "logits.bin").write_bytes(logits.numpy().tobytes()[:-4])
    assert main([str(KIT / "rora"), "--logits", str(tmp_path / "logits.bin")]) == 3


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda logits: logits.bfloat16(), "the logits are bfloat16"),
        (lambda logits: logits * float("nan"), "the logits hold NaN or infinity"),
    ],
)
def test_logits_that_cannot_be_judged_are_told_why(tmp_path, capsys, change, said):
    logits = load_file(KIT / "rora" / "trace.safetensors")["logits"]
    save_file({"logits": change(logits)}, tmp_path / "theirs.safetensors")
    assert main([str(KIT / "rora"), "--logits", str(tmp_path / "theirs.safetensors")]) == 4
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("size", [0, 6])
def test_bare_logits_of_another_size_are_refused_with_the_size_they_should_have(
    tmp_path, capsys, size
):
    (tmp_path / "theirs.bin").write_bytes(bytes(size))
    assert main([str(KIT / "rora"), "--logits", str(tmp_path / "theirs.bin")]) == 3
    assert f"{size} bytes" in capsys.readouterr().err
