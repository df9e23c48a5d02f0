"""--compile and --graphs where they are not to be had, and in run.json."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from conftest import SMALL
from helpers import flags, make_world, refused, run

import llama
import rora
from data import Record, collate
from llama import Llama, compile_blocks
from plumbing import faster

SHORT = {"max_steps": 2, "epochs": None}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def test_without_a_compiler_compile_is_refused_before_a_folder_is_made(
    world, tmp_path, monkeypatch
):
    def fails(device):
        raise RuntimeError("no working C++ compiler found\n" + "trace\n" * 50)

    monkeypatch.setattr(faster.torch, "compile", lambda f: fails)
    for job in ([], ["--check"]):
        out = None if job else tmp_path / "run"
        result = run(*flags(world, out, **SHORT), "--compile", *job)
        refused(result, 2, "--compile", "no working C++ compiler", "leave it out")
    assert list(tmp_path.iterdir()) == []


def test_graphs_on_a_cpu_are_left_out_with_a_word_and_change_no_bit(world, tmp_path):
    assert run(*flags(world, tmp_path / "plain", **SHORT)).code == 0
    result = run(*flags(world, tmp_path / "run", **SHORT), "--graphs")
    assert result.code == 0 and "--graphs is left out: they are for a GPU" in result.out
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["graphs"] is True and facts["compile"] is False
    losses = [
        [json.loads(line).get("loss") for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("plain", "run")
    ]
    assert losses[0] == losses[1]


def test_compiled_blocks_are_compiled_once_for_all_lengths(monkeypatch):
    """backend="eager": what is recorded and when is Dynamo's part, and needs no compiler."""
    import torch._dynamo as dynamo

    dynamo.reset()
    monkeypatch.setattr(llama, "attend_in_turn", llama.attend_in_turn)  # put back afterwards
    logging.getLogger("torch.__trace").setLevel(logging.ERROR)  # or pytest keeps all it says
    torch.manual_seed(0)
    model = Llama(replace(SMALL, n_layers=1))
    rora.attach(model, "rora", 4, dropout=0.1)
    compile_blocks(model.train(), backend="eager")

    def step(lengths: list[int]) -> None:
        records = [Record([3] * n, 1, n) for n in lengths]
        sum(rora.backward(model, [collate(records)], rora.targets_in(records), 0))

    step([7, 9, 12])
    with dynamo.config.patch(error_on_recompile=True):
        for lengths in ([5, 6], [20, 3, 8, 9], [14, 13]):
            step(lengths)
    dynamo.reset()
