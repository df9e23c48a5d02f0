"""Files and names: Hugging Face checkpoint folders in and out, PEFT adapter files in and out.

This file knows bytes, tensor names and config keys. It knows no model: tensors come and go in dictionaries, under the
names that llama.py and rora.py give their parameters. Nothing here runs code found in a file: safetensors cannot carry
any, and pickles are opened with weights_only=True (safe since torch 2.6, hence the declared minimum).

Formats as written by transformers 4 and 5, PEFT 0.21, NVlabs/DoRA and AGI-Edgerunners/LLM-Adapters.
"""

import hashlib
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

SHARD_BYTES = 5_000_000_000  # what transformers puts into one file


class CheckpointError(ValueError):
    """A checkpoint, adapter or config file that cannot be used; the message says which, why, and what to do."""


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as e:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"{path}: not readable as JSON ({e})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a .bin or .pth file, mapped rather than read where the file allows. Never executes code."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about a file that is refused anyhow
            state = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path}: refused: it holds more than tensors, or is damaged") from None
    except Exception as e:  # a damaged archive raises whatever its reader trips over
        raise CheckpointError(f"{path}: not a readable torch file ({_first_line(e)})") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path}: expected a dictionary of tensors")
    return state


def _first_line(e: BaseException) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0][:200]


def some(names) -> str:
    """A list short enough for one line."""
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


# --- base checkpoints ------------------------------------------------------------------------------

FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


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
        for path in self.files:
            for name, shape, dtype in self._headers(path):
                ours = name.removeprefix("model.")
                if ours.endswith("rotary_emb.inv_freq"):  # old conversions store it; we compute it
                    continue
                if ours in self.shapes:
                    raise CheckpointError(f"{path}: {name} stands in another shard too")
                self.shapes[ours], self.dtypes[ours], self._where[ours] = shape, dtype, (path, name)
        if listed is not None and (absent := listed - {name for _, name in self._where.values()}):
            absent = {n for n in absent if not n.endswith("rotary_emb.inv_freq")}
            if absent:
                raise CheckpointError(f"{self.folder}: the index lists tensors that no shard holds: {some(absent)}")

    def _find(self) -> tuple[list[Path], set[str] | None]:
        """(weight files, names the index promises), in the order in which transformers looks for them."""
        for single, index in [("model.safetensors", "model.safetensors.index.json"),
                              ("pytorch_model.bin", "pytorch_model.bin.index.json")]:
            if (self.folder / single).exists():
                return [self.folder / single], None
            if (self.folder / index).exists():
                where = read_json(self.folder / index).get("weight_map")
                if not isinstance(where, dict) or not where or not all(isinstance(f, str) for f in where.values()):
                    raise CheckpointError(f"{self.folder / index}: no \"weight_map\" from tensor names to file names")
                files = sorted(set(where.values()))
                for file in files:
                    if not file or Path(file).name != file or file in (".", ".."):
                        raise CheckpointError(f"{self.folder / index}: {file!r} is not a bare file name")
                    if not (self.folder / file).exists():
                        raise CheckpointError(f"{self.folder / file}: absent, but named in {index}: download it again")
                return [self.folder / file for file in files], set(where)
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}: no such checkpoint folder")
        raise CheckpointError(f"{self.folder}: no model.safetensors, pytorch_model.bin or index of shards in it")

    def _headers(self, path: Path):
        if path.suffix != ".safetensors":
            self._pickles[path] = read_pickle(path)
            for name, t in self._pickles[path].items():
                if t.dtype not in FLOATS.values():
                    raise CheckpointError(f"{path}: {name} is {t.dtype}; weights must be fp16, bf16 or fp32")
                yield name, tuple(t.shape), t.dtype
            return
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    view = file.get_slice(name)
                    if view.get_dtype() not in FLOATS:
                        raise CheckpointError(f"{path}: {name} is {view.get_dtype()}; weights must be fp16, bf16 or fp32")
                    yield name, tuple(view.get_shape()), FLOATS[view.get_dtype()]
        except (SafetensorError, OSError) as e:
            raise CheckpointError(f"{path}: not a readable safetensors file ({_first_line(e)}): download it again") from None

    def require(self, want: dict[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError unless names and shapes are exactly these."""
        problems = []
        if missing := want.keys() - self.shapes.keys():
            problems.append(f"missing {some(missing)}")
        if extra := self.shapes.keys() - want.keys():
            problems.append(f"unexpected {some(extra)}")
        if wrong := [f"{n} expected {want[n]} found {self.shapes[n]}" for n in want.keys() & self.shapes.keys()
                     if want[n] != self.shapes[n]]:
            problems.append(f"wrong shape: {some(wrong)}")
        if problems:
            raise CheckpointError(f"{self.folder}: the tensors do not fit config.json: {'; '.join(problems)} "
                                  f"({len(want)} expected, {len(self.shapes)} found)")

    def read(self, name: str, device, dtype: torch.dtype | None) -> Tensor:
        """One tensor, straight to its device and dtype (None: as on disk)."""
        path, stored = self._where[name]
        if path in self._pickles:
            return self._pickles[path][stored].to(device, dtype or self.dtypes[name], copy=True)
        with safe_open(path, "pt", device=str(device)) as file:
            return file.get_tensor(stored).to(dtype or self.dtypes[name])

    def fingerprint(self) -> str:
        """sha256 over config.json, the tokenizer, and each weight file's name, size and safetensors header: quick, and tells apart
        any two checkpoints that differ in shape, precision or layout."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        if (self.folder / "tokenizer.model").is_file():
            digest.update((self.folder / "tokenizer.model").read_bytes())
        for path in self.files:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            if path.suffix == ".safetensors":
                with path.open("rb") as file:
                    digest.update(file.read(int.from_bytes(file.read(8), "little")))
        return digest.hexdigest()


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int = SHARD_BYTES) -> None:
    """model.safetensors, or shards of about `shard_bytes` with their index, under Hugging Face's names.

    `tensors` is asked for each tensor twice, once for its size and once to be written, so a mapping that makes them
    on demand keeps one shard in memory.
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
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file({theirs(n): tensors[n].detach().cpu().contiguous() for n in shard}, folder / file, {"format": "pt"})
        where |= {theirs(n): file for n in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


# --- adapters --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterSettings:
    """All that is needed to rebuild an adapter on its base, as adapter_config.json holds it."""

    method: str              # a row of METHODS in rora.py
    size: int                # rank, bottleneck width, or number of prefix tokens
    targets: tuple[str, ...]
    alpha: float | None = None
    scale: str | None = None  # a row of SCALES in rora.py
    dropout: float = 0.0
    base: str | None = None   # the base checkpoint's folder
    scaling: float | None = None  # what that rule gives; needed where PEFT has no name for the rule


KNOWN = ("lora", "rora", "dora", "series", "parallel", "prefix")  # methods that PEFT's and LLM-Adapters' keys can tell

# Our parameter -> what follows the layer's name in a file. The first spelling is written; all are read.
SPELLINGS = {
    "lora_A": ["lora_A.weight"],
    "lora_B": ["lora_B.weight"],
    "magnitude": ["lora_magnitude_vector", "lora_magnitude_vector.weight", "weight_m_wdecomp.weight"],
    "adapter_down": ["adapter_down.weight"],
    "adapter_up": ["adapter_up.weight"],
}
# Keys that may hold anything: they do not change what an adapter computes once it is trained.
NEUTRAL = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
           "megatron_core", "qalora_group_size", "layers_pattern", "dora_simple", "merge_weights", "encoder_hidden_size",
           "init_weights"}
# Keys that may only hold what this project computes; any other key must be empty or false.
FIXED = {"bias": ["none"], "init_lora_weights": [True, False, "gaussian"], "non_linearity": ["tanh"], "scaling": [1, 1.0],
         "num_transformer_submodules": [1, None]}
READ = {"LORA": {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora"},
        "DORA": {"r", "lora_alpha", "lora_dropout", "target_modules"},
        "PREFIX_TUNING": {"num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"},
        "BOTTLENECK": {"bottleneck_size", "adapter_dropout", "target_modules", "use_parallel_adapter"}}


def write_adapter(folder: str | Path, s: AdapterSettings, tensors: dict[str, Tensor], plain_scale: bool = False) -> None:
    """adapter_config.json and adapter_model.safetensors, as PEFT (and, for bottlenecks, LLM-Adapters) reads them.

    plain_scale: write α·√r without `use_rslora`, for readers that ignore the flag and always divide by r. So are scales
    written that PEFT does not know; a method of your own is named in the tensor file, where PEFT does not look.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    common = {"task_type": "CAUSAL_LM", "base_model_name_or_path": s.base, "inference_mode": True}
    if s.method == "prefix":
        k = [tensors[f"layers.{i}.self_attn.prefix_{kv}"] for i in range(len(tensors) // 2) for kv in "kv"]  # (G, P, D)
        G, P, D = k[0].shape
        config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": P, "token_dim": G * D, "num_attention_heads": G,
                  "num_layers": len(k) // 2, "num_transformer_submodules": 1, "encoder_hidden_size": G * D,
                  "prefix_projection": False}
        named = {"prompt_embeddings": torch.stack([x.transpose(0, 1) for x in k], 1).reshape(P, -1)}  # (P, L·2·G·D)
    else:
        if s.method in ("series", "parallel"):
            config = {"peft_type": "BOTTLENECK", "bottleneck_size": s.size, "adapter_dropout": s.dropout, "bias": "none",
                      "non_linearity": "tanh", "scaling": 1.0, "init_weights": "bert",
                      "use_parallel_adapter": s.method == "parallel"}
        else:
            plain = plain_scale or s.scale not in ("linear", "sqrt")
            config = {"peft_type": "LORA", "r": s.size, "lora_alpha": s.scaling * s.size if plain else s.alpha,
                      "lora_dropout": s.dropout, "use_rslora": s.scale == "sqrt" and not plain,
                      "use_dora": any(name.endswith(".magnitude") for name in tensors), "bias": "none", "fan_in_fan_out": False,
                      "init_lora_weights": True}
        config["target_modules"] = list(s.targets)
        named = {}
        for name, tensor in tensors.items():
            layer, _, parameter = name.rpartition(".")
            named[f"base_model.model.model.{layer}.{SPELLINGS[parameter][0]}"] = tensor
    own = {} if s.method in KNOWN else {"method": s.method, "scale": s.scale, "alpha": repr(s.alpha)}
    save_file({n: t.detach().cpu().contiguous() for n, t in named.items()}, folder / "adapter_model.safetensors", {"format": "pt"} | own)
    (folder / "adapter_config.json").write_text(json.dumps(common | config, indent=2) + "\n")


def adapter_file(folder: Path) -> Path:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder}: no adapter_model.safetensors or adapter_model.bin in it")


def read_adapter(folder: str | Path) -> tuple[AdapterSettings, dict[str, Tensor]]:
    """(settings, fp32 tensors by our names) of any adapter folder written by us, PEFT, NVlabs/DoRA or LLM-Adapters.

    Stricter than PEFT: a key whose meaning is not computed here, or that does not fit the tensors, is a CheckpointError
    that names it.
    """
    folder = Path(folder)
    path, where = adapter_file(folder), folder / "adapter_config.json"
    config = read_json(where)

    def bad(what: str) -> CheckpointError:
        return CheckpointError(f"{where}: {what}")

    def number(key: str, kind: type, least: float, default=None):
        value = config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < 1e9 or kind(value) != value:
            raise bad(f'"{key}" is {value!r}')
        return kind(value)

    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in READ:
        raise bad(f'"peft_type" is {kind!r}; this project reads {", ".join(READ)}')
    for key in ("use_rslora", "use_dora", "use_parallel_adapter"):
        if config.get(key) not in (None, True, False):
            raise bad(f'"{key}" is {config[key]!r}, expected true or false')
    for key, value in config.items():
        if key in FIXED and value not in FIXED[key] or key not in READ[kind] | NEUTRAL | FIXED.keys() and value:
            raise bad(f'"{key}" is {value!r}: not computed here')

    try:
        raw = load_file(path) if path.suffix == ".safetensors" else read_pickle(path)
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{path}: not a readable safetensors file ({_first_line(e)})") from None
    for name, t in raw.items():
        if t.dtype not in FLOATS.values():
            raise CheckpointError(f"{path}: {name} is {t.dtype}, expected floating point")
        if not torch.isfinite(t).all():
            raise CheckpointError(f"{path}: {name} holds NaN or infinity")
    base = config.get("base_model_name_or_path")
    base = base if isinstance(base, str) else None

    if kind == "PREFIX_TUNING":
        P, width = number("num_virtual_tokens", int, 1), number("token_dim", int, 1)
        G, L = number("num_attention_heads", int, 1), number("num_layers", int, 1)
        found = {n: tuple(t.shape) for n, t in raw.items()}
        if found != {"prompt_embeddings": (P, L * 2 * width)} or width % G:
            raise CheckpointError(f"{path}: expected prompt_embeddings {(P, L * 2 * width)} in {G} heads, found {found}")
        kv = raw["prompt_embeddings"].float().view(P, 2 * L, G, width // G).permute(1, 2, 0, 3)  # (2L, G, P, D)
        tensors = {f"layers.{i // 2}.self_attn.prefix_{'kv'[i % 2]}": kv[i].contiguous() for i in range(2 * L)}
        return AdapterSettings("prefix", P, ("self_attn",), base=base), tensors

    tensors = {}
    for name, tensor in raw.items():
        match = re.fullmatch(r"base_model\.model\.model\.(layers\.\d+\.\w+\.\w+)\.(.+)", name)
        ours = [p for p, spellings in SPELLINGS.items() if match and match[2] in spellings]
        if not ours:
            raise CheckpointError(f"{path}: unexpected tensor {name}")
        tensors[f"{match[1]}.{ours[0]}"] = tensor.float().reshape(-1) if ours[0] == "magnitude" else tensor.float()
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not all(isinstance(t, str) and re.fullmatch(r"\w+", t) for t in targets):
        raise bad(f'"target_modules" is {targets!r}; expected a list of layer names')
    found = {name.split(".")[-2] for name in tensors}
    if found != set(targets):
        raise bad(f'"target_modules" is {sorted(targets)}, but the tensors sit on {sorted(found)}')
    order = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    targets = tuple(sorted(found, key=lambda t: (order.index(t) if t in order else 9, t)))

    if kind == "BOTTLENECK":
        size, key = number("bottleneck_size", int, 1), "bottleneck_size"
        method, alpha, scale = "parallel" if config.get("use_parallel_adapter") else "series", None, None
        if method == "series" and targets != ("down_proj",):
            raise bad(f'"target_modules" is {list(targets)}: series adapters are computed on down_proj alone')
        dropout, allowed = number("adapter_dropout", float, 0, 0.0), {"adapter_down": 0, "adapter_up": 1}
    else:
        size, key, alpha = number("r", int, 1), "r", number("lora_alpha", float, 0)
        dora, scale = kind == "DORA" or bool(config.get("use_dora")), "sqrt" if config.get("use_rslora") else "linear"
        method = "dora" if dora else "rora" if scale == "sqrt" else "lora"
        dropout, allowed = number("lora_dropout", float, 0, 0.0), {"lora_A": 0, "lora_B": 1} | ({"magnitude": None} if dora else {})
    for name, tensor in tensors.items():
        parameter = name.rpartition(".")[2]
        if parameter not in allowed:
            raise bad(f"describes {method}, but the file holds {name}" + (': is "use_dora" missing?' if parameter == "magnitude" else ""))
        if tensor.dim() != (1 if parameter == "magnitude" else 2):
            raise CheckpointError(f"{path}: {name} has shape {tuple(tensor.shape)}")
        if parameter != "magnitude" and tensor.shape[allowed[parameter]] != size:
            raise bad(f'"{key}" is {size}, but {name} has shape {tuple(tensor.shape)}')
    if dropout >= 1:
        raise bad(f"dropout is {dropout}")
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            own = file.metadata() or {}
        if own.keys() >= {"method", "scale", "alpha"}:
            method, scale, alpha = own["method"], own["scale"], float(own["alpha"])
    return AdapterSettings(method, size, targets, alpha, scale, dropout, base), tensors
