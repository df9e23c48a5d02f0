"""What a run says of itself: its source, its name, how to go on, how far it is."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, flags, interrupt, jobs, make_world, refused, run, score

from plumbing import training

SHORT = {"max_steps": 4, "epochs": None}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


# --- the source -----------------------------------------------------------------------------------


def git(folder, *words):
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *who, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """A project in a repository of its own, inside of another one."""
    for folder in (tmp_path, tmp_path / "project"):
        folder.mkdir(exist_ok=True)
        git(folder, "init", "-q")
        (folder / "rora.py").write_text("1\n")
        git(folder, "add", "rora.py")
        git(folder, "commit", "-q", "-m", "a")
    return tmp_path / "project"


def test_the_commit_is_the_project_s_own_and_whether_it_was_changed_stands_beside(repository):
    head = git(repository, "rev-parse", "HEAD")
    assert jobs.source(repository) == {"commit": head, "changed": False}
    (repository / "rora.py").write_text("2\n")
    assert jobs.source(repository) == {"commit": head, "changed": True}


def test_a_repository_that_merely_contains_the_project_is_not_its_own(repository):
    shutil.rmtree(repository / ".git")
    assert jobs.source(repository) == {"commit": None, "changed": None}


def test_a_repository_that_the_environment_names_is_not_its_own(repository, monkeypatch):
    """As under a git hook."""
    monkeypatch.setenv("GIT_DIR", str(repository.parent / ".git"))
    head = jobs.source(repository)["commit"]
    monkeypatch.delenv("GIT_DIR")
    assert head == git(repository, "rev-parse", "HEAD")


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ckpt, name", [(".", "base"), ("../base", "base"), ("deep/..", "base")])
def test_a_base_called_by_dots_gives_its_folder_s_name(world, tmp_path, monkeypatch, ckpt, name):
    base = shutil.copytree(world.base, tmp_path / "base")
    (base / "deep").mkdir()
    monkeypatch.chdir(base)
    assert run(*flags(world, None, ckpt=ckpt, **SHORT)).code == 0
    assert [p.name for p in (base / "runs").iterdir()] == [f"{name}-rora-r4-s0"]
    assert score("--ckpt", ckpt, "--data", world.tests, "--tasks", "piqa").code == 0
    assert (base / "runs" / f"{name}-base" / "eval" / "results.json").is_file()


# --- how to go on ---------------------------------------------------------------------------------


def test_the_hint_to_resume_can_be_followed_from_where_it_was_given(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # whatever python is there, it is not this one
    said = interrupt(2, *flags(world, "a run", **SHORT)).out
    hint = said.rpartition("to go on: ")[2].strip()
    words = shlex.split(hint)
    assert words[0] == sys.executable and words[1] == str(ROOT / "rora.py")
    assert run(*words[2:]).code == 0
    assert jobs.command(together=2).split()[1:4] == [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
    ]


# --- a log that nobody watches --------------------------------------------------------------------


def test_a_log_tells_the_validation_loss_and_the_time_to_go(world, tmp_path):
    said = run(*flags(world, tmp_path / "run", **SHORT | {"eval_every": 2})).out.splitlines()
    steps = [line for line in said if line.startswith("step ")]
    assert sum("validation loss" in line for line in steps) == 2
    assert sum("to go" in line for line in steps) == 4


def test_a_long_log_has_a_line_a_minute_however_few_steps_that_is(world, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "EVERY", 0)
    said = run(*flags(world, tmp_path / "run", max_steps=25, epochs=None)).out.splitlines()
    assert sum(line.startswith("step ") and "to go" in line for line in said) == 25


def test_the_run_s_folder_keeps_no_path_of_the_embedded_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--max-steps", "1", "--warmup", "0", "--batch-size", "2", "--rank", "1"]
    assert run(*small, "--out", "run").code == 0
    said = (tmp_path / "run" / "run.json").read_text()
    assert str(ROOT) not in said and json.loads(said)["settings"]["data"] == "tiny/data/train.json"


@pytest.mark.parametrize(
    "change",
    [
        *({"processes": None}, {"processes": "2"}, {"steps": "x"}, {"effective_scale": "s"}),
        *({"compile": [[]]}, {"graphs": 1}, {"finished": "no"}),
    ],
)
def test_a_run_json_whose_facts_are_not_what_they_should_be_is_refused(world, tmp_path, change):
    assert interrupt(2, *flags(world, tmp_path / "run", **SHORT)).code == 130
    path = tmp_path / "run" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(run("--resume", tmp_path / "run"), 2, "damaged", next(iter(change)))
