"""--compile and --graphs where they are not to be had, and in run.json."""

import json

import pytest
from helpers import flags, make_world, refused, run

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
