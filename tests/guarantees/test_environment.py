"""What the surroundings bring: variables meant for others, terminals that cannot show all, odd
names. A run starts right or says which variable is wrong; no print ends it."""

import io
import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, flags, judge, make_world, outcome, refused, rora, run, score

SHORT = {"max_steps": 2, "epochs": None, "save_every": None, "eval_every": None}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(*flags(world, folder, **SHORT)).code == 0
    return folder


# --- variables ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, "1"])
def test_RANK_alone_is_somebody_else_s_variable(world, whole, tmp_path, monkeypatch, size):
    monkeypatch.setenv("RANK", "8")
    if size:
        monkeypatch.setenv("WORLD_SIZE", size)
    assert run(*flags(world, tmp_path / "run", **SHORT)).code == 0
    assert outcome(tmp_path / "run") == outcome(whole)


GOOD = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1'"),
        ({"RANK": "2"}, "RANK is 2, but WORLD_SIZE only 2"),
        ({"RANK": None}, "RANK is not set"),
        ({"RANK": "first"}, "RANK is 'first'"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is not set"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
    ],
)
@pytest.mark.parametrize("program", [rora, judge])
def test_processes_that_could_not_meet_are_refused_by_the_variable_s_name(
    monkeypatch, program, wrong, named
):
    for name, value in (GOOD | wrong).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    refused(run("--ckpt", "tiny", program=program), 2, named, "torchrun")
    assert run("--help", program=program).code == 0  # help is not a matter of processes


# --- what a terminal can show ---------------------------------------------------------------------


def on_terminal(monkeypatch, encoding: str, program, *argv, typed: bytes = b"") -> tuple[int, str]:
    """(exit code, what was shown) where the terminal knows this encoding alone."""
    out, err = io.BytesIO(), io.BytesIO()
    with monkeypatch.context() as m:
        for name, stream in [("stdin", io.BytesIO(typed)), ("stdout", out), ("stderr", err)]:
            m.setattr(sys, name, io.TextIOWrapper(stream, encoding=encoding, errors="strict"))
        code = program.main([str(word) for word in argv])
        sys.stdout.flush()
        sys.stderr.flush()
        return code, (out.getvalue() + err.getvalue()).decode(encoding)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_that_cannot_show_a_sign_shows_another(world, tmp_path, monkeypatch, encoding):
    run_flags = flags(world, tmp_path / "run", **SHORT)
    code, said = on_terminal(monkeypatch, encoding, rora, *run_flags)
    assert code == 0 and "s = 8/?4" in said  # the root
    for program in (rora, judge):
        assert on_terminal(monkeypatch, encoding, program, "--help")[0] == 0
    assert (
        on_terminal(monkeypatch, encoding, judge, tmp_path / "run", "--data", world.tests)[0] == 0
    )
    assert on_terminal(monkeypatch, encoding, judge, "--table", tmp_path / "run")[0] == 0
    code, said = on_terminal(monkeypatch, encoding, rora, "--ckpt", "naïve-√")
    assert code == 3 and "na" in said


@pytest.mark.parametrize("script", ["findings", "details", "tables"])
def test_a_page_is_utf_8_whatever_the_terminal_is_and_says_what_the_results_say(script):
    """It goes into a file: a ? in the place of α would stay there."""
    command = [sys.executable, str(ROOT / "lessons" / f"{script}.py")]
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    printed = subprocess.run(command, env=env, capture_output=True, check=True).stdout
    assert printed == (ROOT / "lessons" / "results" / f"{script}.md").read_bytes()


def test_a_name_whose_bytes_are_not_utf_8_is_refused_where_it_could_not_be_read_back(
    world, tmp_path, monkeypatch
):
    """safetensors writes such a path and does not open it."""
    odd = os.fsdecode(b"r\xff")
    code, said = on_terminal(monkeypatch, "utf-8", rora, *flags(world, tmp_path / odd, **SHORT))
    assert code == 2 and "/r?: no path that is not UTF-8" in said
    shutil.copytree(world.base, tmp_path / odd)
    changed = SHORT | {"ckpt": tmp_path / odd}
    code, said = on_terminal(monkeypatch, "utf-8", rora, *flags(world, tmp_path / "run", **changed))
    assert code == 3 and "rename it" in said
    assert list(tmp_path.iterdir()) == [tmp_path / odd]
    shutil.copyfile(world.data, tmp_path / odd / "records.json")  # records are read all the same
    changed = SHORT | {"data": tmp_path / odd / "records.json"}
    code, _ = on_terminal(monkeypatch, "utf-8", rora, *flags(world, tmp_path / "run", **changed))
    assert code == 0
    tests = tmp_path / odd / "tests"
    shutil.copytree(world.tests, tests)
    code, said = on_terminal(monkeypatch, "utf-8", judge, tmp_path / "run", "--data", tests)
    assert code == 0


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_question_whose_bytes_are_not_utf_8_is_answered(world, monkeypatch, encoding):
    question = b"Is \xff so?\n\n"
    code, _ = on_terminal(
        monkeypatch, encoding, judge, "--ckpt", world.base, "--ask", typed=question
    )
    assert code == 0
    assert score("--ckpt", world.base, "--ask", os.fsdecode(question)).code == 0
