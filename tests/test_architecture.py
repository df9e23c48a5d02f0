"""The house: which file may know which."""

import ast
import subprocess
import sys

import torch
from conftest import ROOT

# First the six files of the paper, then the plumbing. rora.main and eval.main alone reach up, when
# they are called.
MAY_IMPORT = {
    "data": {"plumbing.hf_files", "plumbing.tokenizer_files"},
    "fast": set(),
    "llama": {"fast", "plumbing.hf_config", "plumbing.hf_files"},
    "baselines": {"llama"},
    "rora": {
        "baselines",
        "data",
        "fast",
        "llama",
        "plumbing.peft_files",
        "plumbing.refuse",
        "plumbing.run_folder",
    },
    "eval": {"data", "llama"},
    "plumbing.processes": set(),
    "plumbing.run_folder": set(),
    "plumbing.hf_config": {"plumbing.hf_files"},
    "plumbing.hf_files": set(),
    "plumbing.refuse": {"plumbing.hf_files", "plumbing.peft_files"},
    "plumbing.tokenizer_files": {"plumbing.hf_config", "plumbing.hf_files"},
    "plumbing.peft_files": {"plumbing.hf_files"},
    "plumbing.memory": {"data", "llama", "plumbing.processes"},
    "plumbing.checkpoints": set(),
    "plumbing.flags": {
        "data",
        "rora",
        "plumbing.checkpoints",
        "plumbing.hf_files",
        "plumbing.processes",
        "plumbing.run_folder",
        "plumbing.peft_files",
    },
    "plumbing.finding": {
        "data",
        "llama",
        "rora",
        "plumbing.checkpoints",
        "plumbing.flags",
        "plumbing.hf_files",
        "plumbing.peft_files",
        "plumbing.run_folder",
        "plumbing.tokenizer_files",
    },
    "plumbing.plots": {"data", "eval", "plumbing.finding", "plumbing.flags", "plumbing.run_folder"},
    "plumbing.faster": {
        "data",
        "fast",
        "llama",
        "rora",
        "plumbing.flags",
        "plumbing.hf_files",
        "plumbing.processes",
    },
    "plumbing.training": {
        "data",
        "llama",
        "rora",
        "plumbing.faster",
        "plumbing.flags",
        "plumbing.hf_files",
        "plumbing.peft_files",
        "plumbing.processes",
        "plumbing.refuse",
        "plumbing.run_folder",
    },
    "plumbing.scoring": {
        "data",
        "eval",
        "llama",
        "rora",
        "plumbing.finding",
        "plumbing.flags",
        "plumbing.hf_files",
        "plumbing.memory",
        "plumbing.peft_files",
        "plumbing.plots",
        "plumbing.processes",
        "plumbing.run_folder",
    },
    "plumbing.tokenizer_json": {"plumbing.tokenizer_files"},
    "plumbing.jobs": {
        "data",
        "fast",
        "llama",
        "rora",
        "plumbing.finding",
        "plumbing.flags",
        "plumbing.hf_files",
        "plumbing.memory",
        "plumbing.peft_files",
        "plumbing.processes",
        "plumbing.refuse",
        "plumbing.run_folder",
        "plumbing.faster",
        "plumbing.training",
        "plumbing.tokenizer_files",
        "plumbing.tokenizer_json",
    },
}
RUN_TIME = {"torch", "sentencepiece", "safetensors", "tqdm"}


def imports(name):
    """What a file imports at its top level."""
    for node in ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (
                [f"plumbing.{alias.name}" for alias in node.names]
                if node.module == "plumbing"
                else [node.module]
            )


def test_every_file_has_its_place():
    files = {f"plumbing.{path.stem}" for path in (ROOT / "plumbing").glob("*.py")}
    assert files - {"plumbing.__init__"} <= MAY_IMPORT.keys()


def test_imports_point_one_way():
    for name, allowed in MAY_IMPORT.items():
        ours = {module for module in imports(name) if module in MAY_IMPORT}
        assert ours <= allowed, f"{name} imports {ours - allowed}"


def test_four_packages_are_enough_to_run():
    for name in MAY_IMPORT:
        foreign = (
            {module.split(".")[0] for module in imports(name)}
            - sys.stdlib_module_names
            - {m.split(".")[0] for m in MAY_IMPORT}
        )
        assert foreign <= RUN_TIME, f"{name} imports {foreign - RUN_TIME}"


def test_importing_does_nothing_and_needs_no_compiler_and_no_transformers():
    """torch's compiler alone takes as long to import as torch; a GPU's attention needs it."""
    heavy = ["transformers"] if torch.cuda.is_available() else ["transformers", "torch._dynamo"]
    code = f"import rora, eval, sys; assert not sys.modules.keys() & {heavy}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_run_as_a_script_there_is_still_one_class_called_LoRALinear():
    """Python loads a script as __main__; imported again as rora, its classes would exist twice."""
    for name in ("rora", "eval"):
        last = ast.parse((ROOT / f"{name}.py").read_text()).body[-1]
        assert isinstance(last, ast.If) and f"from {name} import main" in ast.unparse(last)
