"""The house: which file may know which."""

import ast
import subprocess
import sys

from conftest import ROOT

MAY_IMPORT = {
    "data": set(), "runs": set(), "checkpoints": set(), "ranks": set(),
    "llama": {"checkpoints"},
    "baselines": {"llama"},
    "flags": {"checkpoints", "data", "ranks", "runs"},
    "memory": {"data", "llama", "ranks"},
    "rora": {"flags", "memory", "ranks", "runs", "baselines", "checkpoints", "data", "llama"},
    "eval": {"flags", "memory", "ranks", "runs", "checkpoints", "data", "llama", "rora"},
}
RUN_TIME = {"torch", "sentencepiece", "safetensors", "tqdm"}


def imports(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_imports_point_one_way():
    for name, allowed in MAY_IMPORT.items():
        ours = {module for module in imports(name) if module in MAY_IMPORT} - {name}  # a script re-imports itself at its end
        assert ours <= allowed, f"{name}.py imports {ours - allowed}"


def test_four_packages_are_enough_to_run():
    for name in MAY_IMPORT:
        foreign = set(imports(name)) - sys.stdlib_module_names - MAY_IMPORT.keys()
        assert foreign <= RUN_TIME, f"{name}.py imports {foreign - RUN_TIME}"


def test_importing_does_nothing_and_needs_no_transformers():
    code = "import rora, eval, sys; assert 'transformers' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_run_as_a_script_there_is_still_one_class_called_LoRALinear():
    """Python loads a script as __main__; imported again as rora, its classes would exist twice."""
    for name in ("rora", "eval"):
        last = ast.parse((ROOT / f"{name}.py").read_text()).body[-1]
        assert isinstance(last, ast.If) and f"from {name} import main" in ast.unparse(last)
