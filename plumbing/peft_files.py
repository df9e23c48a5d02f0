"""PEFT and LLM-Adapters adapter folders, in and out. Knows names and config keys; no model, no scale rule."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from plumbing.hf_files import (  # noqa: F401
    FLOATS,
    CheckpointError,
    _first_line,
    read_json,
    read_pickle,
    refuse_pointer,
    some,
)

# --- adapters --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterSettings:
    """All that is needed to rebuild an adapter on its base, as adapter_config.json holds it."""

    method: str  # a row of METHODS in rora.py
    rank: int  # of the update; the width of a bottleneck; the number of prefix tokens
    targets: tuple[str, ...]
    alpha: float | None = None
    scale: str | None = None  # a row of SCALES in rora.py
    dropout: float = 0.0
    base: str | None = None  # the base checkpoint's folder
    scaling: float | None = None  # what that rule gives; needed where PEFT has no name for the rule

    @property
    def build(self) -> tuple:
        """What attach() takes after the model."""
        return self.method, self.rank, self.alpha, self.dropout, self.targets, self.scale


KNOWN = (
    "lora",
    "rora",
    "dora",
    "series",
    "parallel",
    "prefix",
)  # methods that PEFT's and LLM-Adapters' keys can tell

# Our parameter -> what follows the layer's name in a file. The first spelling is written; all are read.
SPELLINGS = {
    "lora_A": ["lora_A.weight"],
    "lora_B": ["lora_B.weight"],
    "magnitude": [
        "lora_magnitude_vector",
        "lora_magnitude_vector.weight",
        "weight_m_wdecomp.weight",
    ],
    "adapter_down": ["adapter_down.weight"],
    "adapter_up": ["adapter_up.weight"],
}
# Keys that may hold anything: they do not change what an adapter computes once it is trained.
NEUTRAL = {
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "megatron_core",
    "qalora_group_size",
    "layers_pattern",
    "dora_simple",
    "merge_weights",
    "encoder_hidden_size",
    "init_weights",
}
# Keys that may only hold what this project computes; any other key must be empty or false.
FIXED = {
    "bias": ["none"],
    "init_lora_weights": [True, False, "gaussian"],
    "non_linearity": ["tanh"],
    "scaling": [1, 1.0],
    "num_transformer_submodules": [1, None],
}
READ = {
    "LORA": {"r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora"},
    "DORA": {"r", "lora_alpha", "lora_dropout", "target_modules"},
    "PREFIX_TUNING": {"num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"},
    "BOTTLENECK": {"bottleneck_size", "adapter_dropout", "target_modules", "use_parallel_adapter"},
}


def write_adapter(
    folder: str | Path, s: AdapterSettings, tensors: dict[str, Tensor], plain_scale: bool = False
) -> None:
    """adapter_config.json and adapter_model.safetensors, as PEFT (and, for bottlenecks, LLM-Adapters) reads them.

    plain_scale: write α·√r without `use_rslora`, for readers that ignore the flag and always divide by r. So are scales
    written that PEFT does not know; a method of your own is named in the tensor file, where PEFT does not look.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    common = {"task_type": "CAUSAL_LM", "base_model_name_or_path": s.base, "inference_mode": True}
    if s.method == "prefix":
        k = [
            tensors[f"layers.{i}.self_attn.prefix_{kv}"]
            for i in range(len(tensors) // 2)
            for kv in "kv"
        ]  # (G, P, D)
        G, P, D = k[0].shape
        config = {
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": P,
            "token_dim": G * D,
            "num_attention_heads": G,
            "num_layers": len(k) // 2,
            "num_transformer_submodules": 1,
            "encoder_hidden_size": G * D,
            "prefix_projection": False,
        }
        named = {
            "prompt_embeddings": torch.stack([x.transpose(0, 1) for x in k], 1).reshape(P, -1)
        }  # (P, L·2·G·D)
    else:
        if s.method in ("series", "parallel"):
            config = {
                "peft_type": "BOTTLENECK",
                "bottleneck_size": s.rank,
                "adapter_dropout": s.dropout,
                "bias": "none",
                "non_linearity": "tanh",
                "scaling": 1.0,
                "init_weights": "bert",
                "use_parallel_adapter": s.method == "parallel",
            }
        else:
            plain = plain_scale or s.scale not in ("linear", "sqrt")
            config = {
                "peft_type": "LORA",
                "r": s.rank,
                "lora_alpha": s.scaling * s.rank if plain else s.alpha,
                "lora_dropout": s.dropout,
                "bias": "none",
                "fan_in_fan_out": False,
                "init_lora_weights": True,
            }
            # Only where true: PEFT before 0.7 and 0.9 fails on a key that it does not know.
            if s.scale == "sqrt" and not plain:
                config["use_rslora"] = True
            if any(name.endswith(".magnitude") for name in tensors):
                config["use_dora"] = True
        config["target_modules"] = list(s.targets)
        named = {}
        for name, tensor in tensors.items():
            layer, _, parameter = name.rpartition(".")
            named[f"base_model.model.model.{layer}.{SPELLINGS[parameter][0]}"] = tensor
    own = (
        {} if s.method in KNOWN else {"method": s.method, "scale": s.scale, "alpha": repr(s.alpha)}
    )
    save_file(
        {n: t.detach().cpu().contiguous() for n, t in named.items()},
        folder / "adapter_model.safetensors",
        {"format": "pt"} | own,
    )
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
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not least <= value < 1e9
            or kind(value) != value
        ):
            raise bad(f'"{key}" is {value!r}')
        return kind(value)

    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in READ:
        raise bad(f'"peft_type" is {kind!r}; this project reads {", ".join(READ)}')
    for key in ("use_rslora", "use_dora", "use_parallel_adapter"):
        if config.get(key) not in (None, True, False):
            raise bad(f'"{key}" is {config[key]!r}, expected true or false')
    for key, value in config.items():
        if (
            key in FIXED
            and value not in FIXED[key]
            or key not in READ[kind] | NEUTRAL | FIXED.keys()
            and value
        ):
            raise bad(f'"{key}" is {value!r}: not computed here')

    refuse_pointer(path)
    try:
        raw = load_file(path) if path.suffix == ".safetensors" else read_pickle(path)
    except (SafetensorError, OSError) as e:
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({_first_line(e)})"
        ) from None
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
            raise CheckpointError(
                f"{path}: expected prompt_embeddings {(P, L * 2 * width)} in {G} heads, found {found}"
            )
        kv = (
            raw["prompt_embeddings"].float().view(P, 2 * L, G, width // G).permute(1, 2, 0, 3)
        )  # (2L, G, P, D)
        tensors = {
            f"layers.{i // 2}.self_attn.prefix_{'kv'[i % 2]}": kv[i].contiguous()
            for i in range(2 * L)
        }
        return AdapterSettings("prefix", P, ("self_attn",), base=base), tensors

    tensors = {}
    for name, tensor in raw.items():
        match = re.fullmatch(r"base_model\.model\.model\.(layers\.\d+\.\w+\.\w+)\.(.+)", name)
        ours = [p for p, spellings in SPELLINGS.items() if match and match[2] in spellings]
        if not ours:
            raise CheckpointError(f"{path}: unexpected tensor {name}")
        tensors[f"{match[1]}.{ours[0]}"] = (
            tensor.float().reshape(-1) if ours[0] == "magnitude" else tensor.float()
        )
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not all(
        isinstance(t, str) and re.fullmatch(r"\w+", t) for t in targets
    ):
        raise bad(f'"target_modules" is {targets!r}; expected a list of layer names')
    found = {name.split(".")[-2] for name in tensors}
    if found != set(targets):
        raise bad(f'"target_modules" is {sorted(targets)}, but the tensors sit on {sorted(found)}')
    order = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    targets = tuple(sorted(found, key=lambda t: (order.index(t) if t in order else 9, t)))

    if kind == "BOTTLENECK":
        size, key = number("bottleneck_size", int, 1), "bottleneck_size"
        method, alpha, scale = (
            "parallel" if config.get("use_parallel_adapter") else "series",
            None,
            None,
        )
        if method == "series" and targets != ("down_proj",):
            raise bad(
                f'"target_modules" is {list(targets)}: series adapters are computed on down_proj alone'
            )
        dropout, allowed = (
            number("adapter_dropout", float, 0, 0.0),
            {"adapter_down": 0, "adapter_up": 1},
        )
    else:
        size, key, alpha = number("r", int, 1), "r", number("lora_alpha", float, 0)
        dora, scale = (
            kind == "DORA" or bool(config.get("use_dora")),
            "sqrt" if config.get("use_rslora") else "linear",
        )
        method = "dora" if dora else "rora" if scale == "sqrt" else "lora"
        dropout, allowed = (
            number("lora_dropout", float, 0, 0.0),
            {"lora_A": 0, "lora_B": 1} | ({"magnitude": None} if dora else {}),
        )
    for name, tensor in tensors.items():
        parameter = name.rpartition(".")[2]
        if parameter not in allowed:
            raise bad(
                f"describes {method}, but the file holds {name}"
                + (': is "use_dora" missing?' if parameter == "magnitude" else "")
            )
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
