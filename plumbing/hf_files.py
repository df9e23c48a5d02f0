"""Hugging Face checkpoint folders, in and out.

This file knows bytes, tensor names and config keys. It knows no model: tensors come and go in
dictionaries, under the names that llama.py and rora.py give their parameters. Nothing here runs
code found in a file: safetensors cannot carry any, and pickles are opened with weights_only=True
(safe since torch 2.6, hence the declared minimum).

Formats as written by transformers 4 and 5, PEFT 0.21, NVlabs/DoRA and AGI-Edgerunners/LLM-Adapters.
"""

import contextlib
import hashlib
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file as write_file
from torch import Tensor

TOKENIZER_FILES = "tokenizer.model", "tokenizer.json", "original/tokenizer.model"  # first one found
COMPANIONS = (  # what goes with the weights when they are written elsewhere
    *("config.json", "generation_config.json", *TOKENIZER_FILES, "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
)
SHARD_BYTES = 5_000_000_000  # what transformers puts into one file


class CheckpointError(ValueError):
    """A checkpoint, adapter or config file that cannot be used; the message says which, why, and
    what to do."""


def refuse_pointer(path: Path) -> None:
    """Raise CheckpointError where git-lfs has left its note of a big file in place of the file, and
    where the file cannot be opened at all."""
    if re.search("[\ud800-\udfff]", str(path)):
        raise CheckpointError(f"{path}: safetensors opens no path that is not UTF-8: rename it")
    try:
        with path.open("rb") as file:
            begin = file.read(24)
    except PermissionError:
        raise CheckpointError(f"{path}: permission denied: it belongs to another user") from None
    except OSError:  # whoever reads the file says so
        return
    if begin == b"version https://git-lfs.":
        raise CheckpointError(
            f"{path}: a git-lfs pointer, not the file itself: `git lfs pull` in that folder "
            "fetches it, as ./weights_download.sh does"
        )


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as e:  # not UTF-8 and not JSON are ValueErrors
        raise CheckpointError(f"{path}: not readable as JSON ({e})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a .bin or .pth file, mapped rather than read where the file allows. Never
    executes code."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about a file that is refused anyhow
            state = torch.load(
                path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True
            )
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path}: refused: it holds more than tensors, or is damaged"
        ) from None
    except Exception as e:  # a damaged archive raises whatever its reader trips over
        raise CheckpointError(f"{path}: not a readable torch file ({first_line(e)})") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path}: expected a dictionary of tensors")
    return state


def first_line(e: BaseException) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0][:200]


def save_file(tensors: dict[str, Tensor], path: Path, metadata: dict | None = None) -> None:
    """safetensors', readable by whom the umask lets read: it makes files that are private."""
    write_file(tensors, path, metadata)
    umask = os.umask(0)
    os.umask(umask)
    with contextlib.suppress(OSError):  # some file systems have no modes
        path.chmod(0o666 & ~umask)


def finite(tensor: Tensor) -> Tensor:
    """Whether no number is NaN or infinite, as a tensor on its device: ten times isfinite's speed,
    2 GB a second on one CPU core."""
    return torch.stack(torch.aminmax(tensor.detach())).isfinite().all()


def some(names) -> str:
    """A list short enough for one line."""
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# --- base checkpoints -----------------------------------------------------------------------------

FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
WANTED = "weights must be fp16, bf16 or fp32"


WEIGHTS = [  # one file, or the index of several
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
]


def has_weights(folder: Path) -> bool:
    return any((folder / name).exists() for names in WEIGHTS for name in names)


class TensorFiles:
    """The tensors of a Hugging Face folder, by our names, read one at a time.

    Attributes: shapes, dtypes: of every tensor, known without reading any; files: the weight files.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.files, listed = self._find()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._where: dict[str, tuple[Path, str]] = {}
        self._pickles: dict[Path, dict[str, Tensor]] = {}
        self._headers_of: dict[Path, tuple[int, dict]] = {}  # (where the data begins, the header)
        for path in self.files:
            for name, shape, dtype in self._headers(path):
                ours = name.removeprefix("model.")
                if ours.endswith("rotary_emb.inv_freq"):  # old conversions store it; we compute it
                    continue
                if ours.endswith(".bias") and not self._read(path, name).any():
                    continue  # it adds nothing; any other is refused by require()
                if ours in self.shapes:
                    raise CheckpointError(f"{path}: {name} stands in another shard too")
                self.shapes[ours], self.dtypes[ours], self._where[ours] = shape, dtype, (path, name)
        if listed is not None and (absent := listed - {name for _, name in self._where.values()}):
            absent = {n for n in absent if not n.endswith("rotary_emb.inv_freq")}
            if absent:
                raise CheckpointError(
                    f"{self.folder}: the index lists tensors that no shard holds: {some(absent)}"
                )

    def _find(self) -> tuple[list[Path], set[str] | None]:
        """(weight files, names the index promises), in the order in which transformers looks for
        them."""
        for single, index in WEIGHTS:
            if (self.folder / single).exists():
                return [self.folder / single], None
            if (self.folder / index).exists():
                where = read_json(self.folder / index).get("weight_map")
                if (
                    not isinstance(where, dict)
                    or not where
                    or not all(isinstance(f, str) for f in where.values())
                ):
                    raise CheckpointError(
                        f'{self.folder / index}: no "weight_map" from tensor names to file names'
                    )
                files = sorted(set(where.values()))
                for file in files:
                    path = Path(file)
                    if path.is_absolute() or ".." in path.parts or not path.name:
                        raise CheckpointError(
                            f"{self.folder / index}: {file!r} is not a file in this folder"
                        )
                    if not (self.folder / file).exists():
                        raise CheckpointError(
                            f"{self.folder / file}: absent, but named in {index}: download it again"
                        )
                return [self.folder / file for file in files], set(where)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: no such checkpoint folder")
        raise CheckpointError(
            f"{self.folder}: no model.safetensors, pytorch_model.bin or index of shards in it"
        )

    def _headers(self, path: Path):
        refuse_pointer(path)
        if path.suffix != ".safetensors":
            self._pickles[path] = read_pickle(path)
            for name, t in self._pickles[path].items():
                if t.dtype not in FLOATS.values():
                    raise CheckpointError(f"{path}: {name} is {t.dtype}; {WANTED}")
                yield name, tuple(t.shape), t.dtype
            return
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    view = file.get_slice(name)
                    kind = view.get_dtype()
                    if kind not in FLOATS:
                        raise CheckpointError(f"{path}: {name} is {kind}; {WANTED}")
                    yield name, tuple(view.get_shape()), FLOATS[kind]
        except (SafetensorError, OSError) as e:
            raise CheckpointError(
                f"{path}: not a readable safetensors file ({first_line(e)}): download it again"
            ) from None

    def require(self, want: dict[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError unless names and shapes are exactly these."""
        problems = []
        if missing := want.keys() - self.shapes.keys():
            problems.append(f"missing {some(missing)}")
        if extra := self.shapes.keys() - want.keys():
            problems.append(f"unexpected {some(extra)}")
        if wrong := [
            f"{n} expected {want[n]} found {self.shapes[n]}"
            for n in want.keys() & self.shapes.keys()
            if want[n] != self.shapes[n]
        ]:
            problems.append(f"wrong shape: {some(wrong)}")
        if problems:
            raise CheckpointError(
                f"{self.folder}: the tensors do not fit config.json: {'; '.join(problems)} "
                f"({len(want)} expected, {len(self.shapes)} found)"
            )

    def read(self, name: str, device, dtype: torch.dtype | None) -> Tensor:
        """One tensor, straight to its device and dtype (None: as on disk)."""
        path, stored = self._where[name]
        tensor = self._read(path, stored, device)
        return tensor.to(device, dtype or self.dtypes[name], copy=path in self._pickles)

    def _read(self, path: Path, stored: str, device="cpu") -> Tensor:
        if path in self._pickles:
            return self._pickles[path][stored]
        with safe_open(path, "pt", device=str(device)) as file:
            return file.get_tensor(stored)

    def identity(self) -> str:
        """sha256 over every tensor's name, shape, dtype and a sample of its bytes: the same for the
        same weights in .bin, safetensors or other shards. 13.5 GB in 291 tensors: 1.2 MB are read.
        """
        digest = hashlib.sha256()
        head, embedding = self.sample("lm_head.weight"), self.sample("embed_tokens.weight")
        for name in sorted(self.shapes):
            if name == "lm_head.weight" and head == embedding:
                continue  # tied: some files hold it twice
            digest.update(f"{name} {self.shapes[name]} {self.dtypes[name]}\n".encode())
            digest.update(self.sample(name))
        return digest.hexdigest()

    def sample(self, name: str) -> bytes:
        """4 KB of a tensor, in pieces spread evenly over it; all of a smaller one."""
        if name not in self._where:
            return b""
        path, stored = self._where[name]
        if path in self._pickles:
            flat = self._pickles[path][stored].reshape(-1).view(torch.uint8)
            return b"".join(bytes(flat[a:b].tolist()) for a, b in pieces(flat.numel()))
        with path.open("rb") as file:
            if path not in self._headers_of:
                length = int.from_bytes(file.read(8), "little")
                self._headers_of[path] = (8 + length, json.loads(file.read(length)))
            start, header = self._headers_of[path]
            first, end = header[stored]["data_offsets"]
            sampled = b""
            for a, b in pieces(end - first):
                file.seek(start + first + a)
                sampled += file.read(b - a)
            return sampled


def pieces(size: int, number: int = 16, length: int = 256) -> list[tuple[int, int]]:
    """Which bytes of `size` stand for all."""
    if size <= number * length:
        return [(0, size)]
    starts = [i * (size - length) // (number - 1) for i in range(number)]
    return [(start, start + length) for start in starts]


def write_tensors(
    folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int = SHARD_BYTES
) -> None:
    """model.safetensors, or shards of about `shard_bytes` with their index, under Hugging Face's
    names.

    `tensors` is asked for each tensor twice, once for its size and once to be written, so a mapping
    that makes them on demand keeps one shard in memory.
    """
    shards: list[list[str]] = [[]]
    size = total = 0
    for name in tensors:
        nbytes = tensors[name].nbytes
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + nbytes, total + nbytes
    theirs = lambda name: name if name.startswith("lm_head") else f"model.{name}"
    where = {}
    for i, shard in enumerate(shards, 1):
        file = (
            "model.safetensors"
            if len(shards) == 1
            else f"model-{i:05}-of-{len(shards):05}.safetensors"
        )
        save_file(
            {theirs(n): tensors[n].detach().cpu().contiguous() for n in shard},
            folder / file,
            {"format": "pt"},
        )
        where |= {theirs(n): file for n in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
