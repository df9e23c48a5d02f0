"""The README's recipe for checking another framework, run as it is printed there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

pytestmark = pytest.mark.crosscheck


def test_the_recipe_in_the_readme_works_as_printed_and_finds_peft_in_agreement(tmp_path):
    page = (ROOT / "README.md").read_text()
    recipes = re.findall(r"```python\n(.*?)```", page, re.S)
    recipe = next(text for text in recipes if "peft" in text)
    check, printed = re.search(r"python (tools/conform\.py .*)\n\nIt prints `(.*?)`", page).groups()
    for name in ("tests", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1"}
    made = run(tmp_path, quiet, "-c", recipe)
    assert made.returncode == 0, made.stderr
    checked = run(tmp_path, quiet, *check.split())
    assert checked.returncode == 0 and printed.split(",")[0] in checked.stdout


def run(folder: Path, env: dict, *command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, env=env
    )
