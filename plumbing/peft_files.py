"""Adapter folders, in and out: PEFT's and LLM-Adapters' formats, and one of our own.

This file knows file names, tensor names and config keys. It knows no model, no scale rule and no
method's name: a method says in its row of METHODS (rora.py) how PEFT's config names it. A method
that PEFT has no name for is written in a format of our own, tensors by our names and all settings
in the config, under a peft_type that PEFT does not know and so refuses.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from plumbing.hf_files import (
    FLOATS,
    CheckpointError,
    finite,
    first_line,
    read_json,
    read_pickle,
    refuse_pointer,
    save_file,
    some,
)


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
    file_format: str | None = None  # a row of FORMATS, if others have a name for the method

    @property
    def build(self) -> tuple:
        """What attach() takes after the model."""
        return self.method, self.rank, self.alpha, self.dropout, self.targets, self.scale


MOST_ALPHA = 1e9  # of an alpha that is set, written or read, and of any other number in a config
OWN = "RORA_"  # begins a peft_type of ours
FORMATS: dict[str, dict] = {  # what a config says beside the numbers
    "lora": {"peft_type": "LORA"},
    "dora": {"peft_type": "LORA", "use_dora": True},
    "bottleneck": {"peft_type": "BOTTLENECK", "use_parallel_adapter": False},
    "parallel bottleneck": {"peft_type": "BOTTLENECK", "use_parallel_adapter": True},
    "prefix": {"peft_type": "PREFIX_TUNING"},
}
PEFT_SCALES = {"linear": False, "sqrt": True}  # PEFT's use_rslora
LINEAR_LAYERS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)

# Our parameter -> what follows the layer's name in a file. The first is written; all are read.
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
    "eva_config",
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
# Keys that may only hold what this project computes; any other key must be empty or false, or one
# that ConfigFile finds to say nothing that the tensors do not say.
FIXED = {
    "bias": ["none"],
    # How lora_A and lora_B began. PiSSA, OLoRA, LoftQ and CorDA change the base as well.
    "init_lora_weights": [True, False, "gaussian", "orthogonal", "eva"],
    "non_linearity": ["tanh"],
    "scaling": [1, 1.0],
    "num_transformer_submodules": [1, None],
}
EXCEPTIONS = {"rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform"}
LORA = {"r", "lora_alpha", "lora_dropout", "target_modules"} | EXCEPTIONS
READ = {
    "LORA": LORA | {"use_rslora", "use_dora"},
    "DORA": LORA,  # NVlabs/DoRA's
    "PREFIX_TUNING": {"num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"},
    "BOTTLENECK": {"bottleneck_size", "adapter_dropout", "target_modules", "use_parallel_adapter"},
    OWN: {"method", "rank", "alpha", "scale", "dropout", "target_modules"},
}

# --- writing --------------------------------------------------------------------------------------


def peft_type(settings: AdapterSettings) -> str:
    """PEFT's name for such an adapter; ours where PEFT has none for the method or its scale."""
    known = settings.scale is None or settings.scale in PEFT_SCALES
    if settings.file_format is None or not known:
        return own_type(settings.method)
    return FORMATS[settings.file_format]["peft_type"]


def own_type(method: str) -> str:
    return OWN + method.upper()


def format_words(settings: AdapterSettings) -> str:
    """How other programs call what is saved, for the start line."""
    kind = peft_type(settings)
    if kind == "LORA":
        dora = "use_dora=true, " if "use_dora" in FORMATS[settings.file_format] else ""
        return f"PEFT: {dora}use_rslora={str(PEFT_SCALES[settings.scale]).lower()}"
    if kind.startswith(OWN):
        return f"saved as {kind}, which PEFT does not read"
    return f"{'LLM-Adapters' if kind == 'BOTTLENECK' else 'PEFT'}: {kind}"


def write_adapter(
    folder: str | Path,
    settings: AdapterSettings,
    tensors: dict[str, Tensor],
    plain_scale: bool = False,
) -> None:
    """adapter_config.json and adapter_model.safetensors. The same adapter gives the same bytes.

    plain_scale: as PEFT's LoRA, with the alpha that gives the same scale as alpha / r, whatever the
    method's own rule is: for readers that ignore `use_rslora`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    kind = "LORA" if plain_scale else peft_type(settings)
    if kind.startswith(OWN):
        config, named = own_files(settings, tensors)
    elif kind == "PREFIX_TUNING":
        config, named = prefix_files(tensors)
    else:
        config = lora_config(settings, plain_scale) if kind == "LORA" else width_config(settings)
        config["target_modules"] = list(settings.targets)
        named = dict(map(peft_named, tensors.items()))
    if not kind.startswith(OWN):
        config |= FORMATS[settings.file_format or "lora"]
    common = {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": settings.base,
        "inference_mode": True,
    }
    named = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    # One key alone in its metadata: safetensors does not keep the order of several.
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
    if kind == "BOTTLENECK":  # LLM-Adapters reads nothing else
        torch.save(named, folder / "adapter_model.bin")
    text = json.dumps(common | config, indent=2) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def lora_config(settings: AdapterSettings, plain_scale: bool) -> dict:
    alpha = settings.scaling * settings.rank if plain_scale else settings.alpha
    config = {
        "r": settings.rank,
        "lora_alpha": alpha,
        "lora_dropout": settings.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
    # use_rslora, and use_dora of FORMATS, only where true: PEFT before 0.8 and 0.9 fails on a key
    # that it does not know.
    if PEFT_SCALES.get(settings.scale) and not plain_scale:
        config["use_rslora"] = True
    return config


def width_config(settings: AdapterSettings) -> dict:
    """LLM-Adapters' bottlenecks."""
    return {
        "bottleneck_size": settings.rank,
        "adapter_dropout": settings.dropout,
        "bias": "none",
        "non_linearity": "tanh",
        "scaling": 1.0,
        "init_weights": "bert",
    }


def peft_named(item: tuple[str, Tensor]) -> tuple[str, Tensor]:
    layer, _, parameter = item[0].rpartition(".")
    return f"base_model.model.model.{layer}.{SPELLINGS[parameter][0]}", item[1]


def prefix_files(tensors: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """PEFT keeps all layers' keys and values in one table, a row a token: (P, L·2·G·D)."""
    layers = range(len(tensors) // 2)
    kv = [tensors[f"layers.{i}.self_attn.prefix_{x}"] for i in layers for x in "kv"]  # (G, P, D)
    G, P, D = kv[0].shape
    config = {
        "num_virtual_tokens": P,
        "token_dim": G * D,
        "num_attention_heads": G,
        "num_layers": len(layers),
        "num_transformer_submodules": 1,
        "encoder_hidden_size": G * D,
        "prefix_projection": False,
    }
    table = torch.stack([x.transpose(0, 1) for x in kv], 1).reshape(P, -1)
    return config, {"prompt_embeddings": table}


def own_files(
    settings: AdapterSettings, tensors: dict[str, Tensor]
) -> tuple[dict, dict[str, Tensor]]:
    """Tensors by our names. Copies, as safetensors does not write one tensor under two names."""
    config = {
        "method": settings.method,
        "rank": settings.rank,
        "alpha": settings.alpha,
        "scale": settings.scale,
        "dropout": settings.dropout,
        "target_modules": list(settings.targets),
    }
    return config, {name: tensor.detach().clone() for name, tensor in tensors.items()}


# --- reading --------------------------------------------------------------------------------------


def adapter_file(folder: Path) -> Path:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder}: no adapter_model.safetensors or adapter_model.bin in it")


class ConfigFile:
    """adapter_config.json, its values taken with the checks that they need."""

    def __init__(self, path: Path):
        self.path, self.values = path, read_json(path)
        kind = self.values.get("peft_type")
        self.own = isinstance(kind, str) and kind.startswith(OWN)
        if not self.own and kind not in list(READ):
            readable = [name for name in READ if name != OWN]
            raise self.bad(f'"peft_type" is {kind!r}; this project reads {", ".join(readable)}')
        self.kind: str = OWN if self.own else kind
        for key in ("use_rslora", "use_dora", "use_parallel_adapter"):
            if self.values.get(key) not in (None, True, False):
                raise self.bad(f'"{key}" is {self.values[key]!r}, expected true or false')
        for key, value in self.values.items():
            known = key in READ[self.kind] | NEUTRAL
            if key in FIXED and value not in FIXED[key] or not (known or key in FIXED) and value:
                raise self.bad(f'"{key}" is {value!r}: not computed here')

    def bad(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}")

    def number(self, key: str, kind: type, least: float, default: float | None = None):
        value = self.values.get(key)
        value = default if value is None else value
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not least <= value < MOST_ALPHA or kind(value) != value:
            raise self.bad(f'"{key}" is {value!r}')
        return kind(value)

    def dropout(self, key: str) -> float:
        value = self.number(key, float, 0, 0.0)
        if value >= 1:
            raise self.bad(f"dropout is {value}")
        return value

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        return value if isinstance(value, str) else None

    def targets(self, places: set[str]) -> tuple[str, ...]:
        """The names of the layers that the tensors sit on, in our order.

        places: layers.0.self_attn.q_proj, ... target_modules, in any of PEFT's spellings, must
        choose the same names, and no other key may say anything else about any of them.
        """
        stated = self.values.get("target_modules")
        texts = [stated] if isinstance(stated, str) else stated
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise self.bad(f'"target_modules" is {stated!r}; expected the names of layers')
        sat_on = {place.rpartition(".")[2] for place in places}
        blocks = [f"layers.{i}" for i in block_numbers(places)]
        possible = places | {f"{block}.{name}" for block in blocks for name in LINEAR_LAYERS}
        chosen = {p for p in possible if self.matches("target_modules", stated, p)}
        named = {place.rpartition(".")[2] for place in chosen}
        idle = [t for t in texts if not any(matches_end(t, p) for p in possible)]
        if named != sat_on or places - chosen or (idle and isinstance(stated, list)):
            said = stated if isinstance(stated, str) else sorted(texts)
            tensors = f"but the tensors sit on {sorted(sat_on)}"
            raise self.bad(f'"target_modules" is {said!r}, {tensors}')
        self.refuse_exceptions(places)
        return in_order(sat_on)

    def matches(self, key: str, stated: str | list[str], place: str) -> bool:
        """PEFT's rule: a text is a regular expression for the whole name, an item of a list is a
        name or the end of one, dot by dot."""
        if isinstance(stated, list):
            return any(matches_end(name, place) for name in stated)
        if stated.lower() == "all-linear":
            return True
        try:
            return re.fullmatch(stated, f"model.{place}") is not None
        except re.error as e:
            raise self.bad(f'"{key}" is {stated!r}, not a regular expression ({e})') from None

    def refuse_exceptions(self, places: set[str]) -> None:
        """Keys that make exceptions of some layers pass where they say nothing new."""
        excluded = self.values.get("exclude_modules") or []
        if not isinstance(excluded, str | list):
            raise self.bad(f'"exclude_modules" is {excluded!r}')
        if any(self.matches("exclude_modules", excluded, place) for place in places):
            raise self.bad(f'"exclude_modules" is {excluded!r}, but the tensors sit there')
        layers = self.values.get("layers_to_transform")
        layers = layers if isinstance(layers, list) else [layers]
        there = block_numbers(places)
        if layers not in ([], [None]) and layers != there:
            raise self.bad(f'"layers_to_transform" is {layers}, but the tensors sit on {there}')
        for key, usual in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            pattern = self.values.get(key) or {}
            same = self.values.get(usual)
            if not isinstance(pattern, dict) or any(v != same for v in pattern.values()):
                one = f'only one "{usual}" for all'
                raise self.bad(f'"{key}" is {pattern!r}: not computed here, {one}')


def matches_end(name: object, place: str) -> bool:
    """Whether `name` is a place's whole name, or its end."""
    return f".model.{place}".endswith(f".{name}")


def block_numbers(places: set[str]) -> list[int]:
    found = [re.match(r"layers\.(\d+)\.", place) for place in places]
    return sorted({int(match[1]) for match in found if match})


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    place = {name.rpartition(".")[2]: i for i, name in enumerate(LINEAR_LAYERS)}
    return tuple(sorted(names, key=lambda name: (place.get(name, len(place)), name)))


def read_adapter(folder: str | Path, methods: Mapping) -> tuple[AdapterSettings, dict[str, Tensor]]:
    """(settings, fp32 tensors by our names) of any adapter folder written by us, PEFT, NVlabs/DoRA
    or LLM-Adapters. methods: METHODS of rora.py, whose rows say which method a config names.

    Stricter than PEFT: a key whose meaning is not computed here, or that does not fit the tensors,
    is a CheckpointError that names it.
    """
    folder = Path(folder)
    path = adapter_file(folder)
    config = ConfigFile(folder / "adapter_config.json")
    readers: dict[str, Callable] = {
        "LORA": read_lora,
        "DORA": read_lora,
        "BOTTLENECK": read_width,
        "PREFIX_TUNING": read_prefix,
        OWN: read_own,
    }
    return readers[config.kind](config, path, read_tensors(path), methods)


def read_tensors(path: Path) -> dict[str, Tensor]:
    refuse_pointer(path)
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else read_pickle(path)
    except (SafetensorError, OSError) as e:
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({first_line(e)})"
        ) from None
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS.values():
            raise CheckpointError(f"{path}: {name} is {tensor.dtype}, expected floating point")
        if tensor.numel() and not finite(tensor):
            raise CheckpointError(f"{path}: {name} holds NaN or infinity")
    return {name: tensor.float() for name, tensor in tensors.items()}


def method_named(config: ConfigFile, file_format: str, scale: str | None, methods: Mapping) -> str:
    """The row that is saved like this; of several the one whose own scale it is."""
    rows = {name: row for name, row in methods.items() if row.file_format == file_format}
    own = [name for name, row in rows.items() if row.layer.scale == scale]
    other = [name for name, row in rows.items() if scale in row.other_scales]
    if not own + other:
        raise config.bad("no method here is saved like this; see METHODS in rora.py")
    return (own + other)[0]


def read_prefix(config: ConfigFile, path: Path, raw: dict[str, Tensor], methods: Mapping):
    P, width = config.number("num_virtual_tokens", int, 1), config.number("token_dim", int, 1)
    G, L = config.number("num_attention_heads", int, 1), config.number("num_layers", int, 1)
    found, want = {n: tuple(t.shape) for n, t in raw.items()}, (P, L * 2 * width)
    if found != {"prompt_embeddings": want} or width % G:
        raise CheckpointError(
            f"{path}: expected prompt_embeddings {want} in {G} heads, found {found}"
        )
    kv = raw["prompt_embeddings"].view(P, 2 * L, G, width // G).permute(1, 2, 0, 3)  # (2L, G, P, D)
    tensors = {}
    for i in range(2 * L):
        tensors[f"layers.{i // 2}.self_attn.prefix_{'kv'[i % 2]}"] = kv[i].contiguous()
    kind = "prefix"
    settings = AdapterSettings(
        method=method_named(config, kind, None, methods),
        rank=P,
        targets=("self_attn",),
        base=config.text("base_model_name_or_path"),
        file_format=kind,
    )
    return settings, tensors


def read_layers(path: Path, raw: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that sit on layers, by our names."""
    tensors = {}
    for name, tensor in raw.items():
        match = re.fullmatch(r"base_model\.model\.model\.(layers\.\d+\.\w+\.\w+)\.(.+)", name)
        ours = [p for p, spellings in SPELLINGS.items() if match and match[2] in spellings]
        if not ours:
            raise CheckpointError(f"{path}: unexpected tensor {name}")
        flat = ours[0] == "magnitude"
        tensors[f"{match[1]}.{ours[0]}"] = tensor.reshape(-1) if flat else tensor
    return tensors


def layers_of(tensors: dict[str, Tensor]) -> set[str]:
    return {name.rpartition(".")[0] for name in tensors}


def check_shapes(
    config: ConfigFile, path: Path, tensors: dict, kind: str, key: str, allowed: dict
) -> None:
    """allowed: parameter -> the axis that is as long as config[key], or None for a vector."""
    for name, tensor in tensors.items():
        parameter = name.rpartition(".")[2]
        if parameter not in allowed:
            hint = ': is "use_dora" missing?' if parameter == "magnitude" else ""
            raise config.bad(f"describes {kind}, but the file holds {name}{hint}")
        axis = allowed[parameter]
        if tensor.dim() != (1 if axis is None else 2):
            raise CheckpointError(f"{path}: {name} has shape {tuple(tensor.shape)}")
        if axis is not None and tensor.shape[axis] != config.values[key]:
            what = f"{name} has shape {tuple(tensor.shape)}"
            raise config.bad(f'"{key}" is {config.values[key]}, but {what}')


def read_lora(config: ConfigFile, path: Path, raw: dict[str, Tensor], methods: Mapping):
    tensors = read_layers(path, raw)
    targets = config.targets(layers_of(tensors))
    rank, alpha = config.number("r", int, 1), config.number("lora_alpha", float, 0)
    allowed: dict[str, int | None] = {"lora_A": 0, "lora_B": 1}
    kind, scale = "lora", "sqrt" if config.values.get("use_rslora") else "linear"
    if config.kind == "DORA" or config.values.get("use_dora"):
        kind = "dora"
        allowed["magnitude"] = None
    method = method_named(config, kind, scale, methods)
    check_shapes(config, path, tensors, method, "r", allowed)
    settings = AdapterSettings(
        method=method,
        rank=rank,
        targets=targets,
        alpha=alpha,
        scale=scale,
        dropout=config.dropout("lora_dropout"),
        base=config.text("base_model_name_or_path"),
        file_format=kind,
    )
    return settings, tensors


def read_width(config: ConfigFile, path: Path, raw: dict[str, Tensor], methods: Mapping):
    tensors = read_layers(path, raw)
    targets = config.targets(layers_of(tensors))
    rank = config.number("bottleneck_size", int, 1)
    kind = "parallel bottleneck" if config.values.get("use_parallel_adapter") else "bottleneck"
    method = method_named(config, kind, None, methods)
    layer = methods[method].layer
    if not layer.any_target and set(targets) != set(layer.targets):
        alone = f"{method} adapters are computed on {some(layer.targets)} alone"
        raise config.bad(f'"target_modules" is {list(targets)}: {alone}')
    allowed = {"adapter_down": 0, "adapter_up": 1}
    check_shapes(config, path, tensors, method, "bottleneck_size", allowed)
    settings = AdapterSettings(
        method=method,
        rank=rank,
        targets=targets,
        dropout=config.dropout("adapter_dropout"),
        base=config.text("base_model_name_or_path"),
        file_format=kind,
    )
    return settings, tensors


def read_own(config: ConfigFile, path: Path, raw: dict[str, Tensor], methods: Mapping):
    method, alpha = config.text("method"), config.values.get("alpha")
    if method not in methods or config.values["peft_type"] != own_type(method):
        raise config.bad(f"METHODS in rora.py has no row for the method {method!r}")
    settings = AdapterSettings(
        method=method,
        rank=config.number("rank", int, 1),
        targets=config.targets(layers_of(raw)),
        alpha=None if alpha is None else config.number("alpha", float, 0),
        scale=config.text("scale"),
        dropout=config.dropout("dropout"),
        base=config.text("base_model_name_or_path"),
        file_format=methods[method].file_format,
    )
    return settings, raw
