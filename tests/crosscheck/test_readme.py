"""The README's recipe for checking another framework, run as it is printed there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

pytestmark = pytest.mark.crosscheck


def test_the_recipe_in_the_readme_works_as_printed_and_finds_peft_in_agreement():
    recipe = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    done = subprocess.run(
        [sys.executable, "-c", recipe],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    logits, loss, gradients = map(float, re.findall(r"[\d.]+(?:e-?\d+)?(?=\s|$)", done.stdout))
    assert logits < 1e-4 and loss < 1e-5 and gradients < 1e-4
