"""The mode of a file that safetensors writes."""

import os
import tempfile
from pathlib import Path

import torch
from kit import deviates
from safetensors.torch import save_file

os.umask(0o022)
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "file.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    mode = path.stat().st_mode & 0o777
deviates(
    "files are readable by their owner alone, whatever the umask",
    float(mode != 0o644),
    seen="0.8.0",
    shown=f"{mode:04o} in place of 0644",
)
