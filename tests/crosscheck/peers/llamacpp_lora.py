"""llama.cpp's convert_lora_to_gguf.py: what its reader will multiply B A with.

The scripts lie where run.py unpacked them, beside this environment's bin/; the model that reads the
file computes adapter.lora.alpha / r · B A.
"""

import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from kit import KIT, SCALE, adapter, agrees, deviates, off

SCRIPTS = Path(sys.prefix) / "llama.cpp"
sys.path.insert(0, str(SCRIPTS / "gguf-py"))

from gguf import GGUFReader  # noqa: E402

from plumbing.peft_files import read_adapter, write_adapter  # noqa: E402
from rora import METHODS  # noqa: E402
from tools.meta_to_hf import hf_to_meta  # noqa: E402


def converted(folder: Path) -> torch.Tensor:
    """s B A of the first block's q_proj, in Meta's row order, as the GGUF file has it."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "adapter.gguf"
        done = subprocess.run(
            [sys.executable, SCRIPTS / "convert_lora_to_gguf.py", folder]
            + ["--base", KIT / "model", "--outfile", out, "--outtype", "f32"],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        file = GGUFReader(out)
        tensors = {t.name: torch.tensor(t.data) for t in file.tensors}
        A, B = (tensors[f"blk.0.attn_q.weight.lora_{x}"] for x in "ab")
        alpha = float(file.fields["adapter.lora.alpha"].contents())
        return alpha / len(A) * B @ A


def ours(case: str) -> torch.Tensor:
    A, B = (adapter(case)[f"layers.0.self_attn.q_proj.lora_{x}"] for x in "AB")
    return hf_to_meta(SCALE[case] * B @ A, 4)


agrees(
    "lora: s B A of q_proj, as convert_lora_to_gguf.py writes it",
    off(ours("lora"), converted(KIT / "lora")),
)
with tempfile.TemporaryDirectory() as plain:
    settings, tensors = read_adapter(KIT / "rora", METHODS)
    write_adapter(plain, replace(settings, scaling=SCALE["rora"]), tensors, plain_scale=True)
    agrees(
        "rora: the same, exported with `--export-scale plain`",
        off(ours("rora"), converted(Path(plain))),
    )
difference = off(ours("rora"), converted(KIT / "rora"))
deviates(
    "convert_lora_to_gguf.py does not read `use_rslora`: it divides by r",
    difference,
    seen="b11434",
    shown=f"at r = 4 the update is {difference:.0%} off",
)
