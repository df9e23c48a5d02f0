"""The exercises, performed. exercises/README.md is taken at its word: each answer fits the tree,
turns red what the exercise says and nothing else, and passes with its own tests.

The slow ones run each exercise's tests twice in a copy of the tree: make exercises.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT

PAGE = (ROOT / "exercises/README.md").read_text()


class Exercise(NamedTuple):
    name: str
    patch: Path
    red: set[str]  # tests
    files: list[str]  # of tests


def read(section: str) -> Exercise:
    """An exercise as the page has it. Paragraphs begin with **Red**, **Run** and **Answer**."""
    parts = dict(re.findall(r"^\*\*(\w+)\.\*\* (.*?)(?=\n\n|\Z)", section, re.M | re.S))
    patch = re.search(r"\((.+?\.patch)\)", parts["Answer"])[1]
    red = set(re.findall(r"`(test_\w+)`", parts["Red"]))
    files = re.findall(r"tests/\w+\.py", parts["Run"])
    return Exercise(patch.removesuffix(".patch"), ROOT / "exercises" / patch, red, files)


EXERCISES = [read(section) for section in re.split(r"^## (?=\d)", PAGE, flags=re.M)[1:]]
each_exercise = pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)


def apply(tree: Path, patch: Path, *flags: str) -> None:
    above = os.environ | {"GIT_CEILING_DIRECTORIES": str(tree.parent)}
    done = subprocess.run(
        ["git", "apply", *flags, str(patch)], cwd=tree, env=above, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stderr}: python exercises/remake.py fits it again"


def failures(tree: Path, files: list[str]) -> set[str]:
    """The names of the tests that fail."""
    command = [sys.executable, "-m", "pytest", "--tb=no", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return set(re.findall(r"^(?:FAILED|ERROR) \S+?::(\w+)", done.stdout, re.M))


def test_every_answer_belongs_to_an_exercise():
    assert {e.patch for e in EXERCISES} == set((ROOT / "exercises").glob("*.patch"))


@each_exercise
def test_the_answer_fits_the_tree_as_it_is(exercise):
    apply(ROOT, exercise.patch, "--check")


@pytest.fixture
def tree(tmp_path) -> Path:
    def left_out(folder: str, names: list[str]) -> list[str]:
        large = ["runs", "checkpoints", "data"] if Path(folder) == ROOT else []
        return [n for n in names if n.startswith(".") or n in ("__pycache__", *large)]

    return shutil.copytree(ROOT, tmp_path / "tree", ignore=left_out)


@pytest.mark.slow
@each_exercise
def test_the_answer_turns_red_what_the_page_says_and_is_right_with_its_tests(exercise, tree):
    apply(tree, exercise.patch, "--exclude=tests/*")
    assert failures(tree, exercise.files) == exercise.red
    apply(tree, exercise.patch, "--include=tests/*")
    assert failures(tree, exercise.files) == set()
