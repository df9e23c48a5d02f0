"""The page for a class of two hours shows what its commands do."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

CLASS = ROOT / "lessons" / "class"
PAGE = (CLASS / "README.md").read_text()


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True
    )


def test_the_ten_lines_are_those_of_the_script_and_print_what_the_page_shows():
    shown, printed = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", PAGE, re.S).groups()
    script = (CLASS / "gradient.py").read_text()
    assert script.endswith(shown) and len(shown.split("\n\n")) == 2
    lines = [line.rsplit(" ", 1) for line in run("lessons/class/gradient.py").stdout.splitlines()]
    expected = [line.rsplit(" ", 1) for line in printed.splitlines()]
    assert [name for name, _ in lines] == [name for name, _ in expected]
    norms = [float(norm) for _, norm in lines]
    assert norms == pytest.approx([float(norm) for _, norm in expected], abs=0.0011)


def test_the_readme_shows_the_same_ten_lines_if_it_shows_them():
    shown = re.search(r"```python\n(.*?)```", PAGE, re.S)[1]
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert all(block == shown for block in blocks if "lora_B.grad.norm" in block)


def test_the_pictures_of_the_class_are_drawn_or_the_runs_that_they_lack_are_named(tmp_path):
    named = re.findall(r"`python (lessons/plot\.py) (.*?) --out runs/class`", PAGE)
    assert named
    pictures = [name for _, names in named for name in names.split()]
    told = run("lessons/plot.py", *pictures, "--out", str(tmp_path)).stderr
    assert any(tmp_path.iterdir())
    for name in pictures:
        drawn = (tmp_path / f"{name}.png").is_file()
        assert drawn or f"plot: {name} needs several lrs: python lessons/sweep.py grid" in told
    for name in re.findall(r"runs/class/(\w+)\.png", PAGE):
        assert name in pictures


def test_the_minutes_of_the_plan_follow_one_another_to_two_hours():
    times = re.findall(r"^\| (\d+)–(\d+) \|", PAGE, re.M)
    assert times[0][0] == "0" and times[-1][1] == "120"
    assert all(before[1] == after[0] for before, after in zip(times, times[1:]))
    headings = re.findall(r"^## (\d+)–(\d+):", PAGE, re.M)
    assert headings == times
