"""A checkpoint's config.json, in and out: the checks and the two spellings of the same facts.

transformers 4 writes rope_theta, rope_scaling and torch_dtype; transformers 5 gathers the first two
in rope_parameters.
This file knows keys and values. It computes nothing: what the facts mean is written in llama.py.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from plumbing.hf_files import CheckpointError, read_json

# What a rotary scaling of each type has to state. "llama3" is Llama 3.1's and 3.2's.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
ROPE_TYPE_NAMES = "rope_type", "type"  # transformers before 4.43 knew only "type"


class Reader:
    """The keys of one JSON object, checked as they are taken; `where` it stands."""

    def __init__(self, hf: dict, where: str):
        self.hf, self.where = hf, where

    def bad(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: {what}")

    def number(self, key: str, kind: Callable = int, most: float = 1e7) -> int | float:
        value = self.hf.get(key)
        if value is None:
            raise self.bad(f'no "{key}"')
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.bad(f'"{key}" is {value!r}, expected a number')
        if not 0 < value <= most:  # NaN and infinity, which Python reads in JSON, are not either
            raise self.bad(f'"{key}" is {value!r}, out of range')
        if kind is int and value != int(value):
            raise self.bad(f'"{key}" is {value!r}, expected a whole number')
        return kind(value)

    def object(self, key: str) -> dict:
        value = self.hf.get(key)
        if not isinstance(value, dict | None):
            raise self.bad(f'"{key}" must be an object')
        return value or {}

    def only(self, key: str, value: object, supported: object) -> None:
        if value != supported:
            raise self.bad(f'"{key}" is {value!r}; this model computes only {supported!r}')


def read_config(path: str | Path) -> dict:
    """{field of LlamaConfig: value}; a fact that the file does not state is left out.

    Raises CheckpointError for a missing or absurd value, and for every key that would make the
    model compute something that llama.py does not: such a checkpoint would load and be quietly
    wrong.
    """
    hf = read_json(Path(path))
    take = Reader(hf, str(path))
    n_heads, dim = take.number("num_attention_heads"), take.number("hidden_size")
    take.only("model_type", hf.get("model_type", "llama"), "llama")
    if hf.get("hidden_act") != "swish":  # silu's other name
        take.only("hidden_act", hf.get("hidden_act", "silu"), "silu")
    take.only("quantization_config", hf.get("quantization_config"), None)
    if dim % n_heads:
        raise take.bad(f'"hidden_size" is {dim}, no multiple of "num_attention_heads", {n_heads}')
    take.only("head_dim", hf.get("head_dim") or dim // n_heads, dim // n_heads)
    facts = {
        "dim": dim,
        "n_layers": take.number("num_hidden_layers", most=1000),
        "n_heads": n_heads,
        "n_kv_heads": n_heads,  # LLaMA-1 knew nothing else
        "hidden_dim": take.number("intermediate_size"),
        "vocab_size": take.number("vocab_size"),
        "tie_embeddings": bool(hf.get("tie_word_embeddings")),
        **read_rope(take),
    }
    for field, key, kind, most in [
        ("n_kv_heads", "num_key_value_heads", int, 1e7),
        ("norm_eps", "rms_norm_eps", float, 0.1),
        ("max_positions", "max_position_embeddings", int, 1e7),
    ]:
        if hf.get(key) is not None:
            facts[field] = take.number(key, kind, most)
    for field in ("bos", "eos"):
        if (token := first_id(hf.get(f"{field}_token_id"))) is not None:
            facts[field] = token
    n_kv_heads = facts["n_kv_heads"]
    if n_heads % n_kv_heads or (dim // n_heads) % 2:
        raise take.bad(
            f"{n_heads} heads of width {dim // n_heads} in groups of {n_kv_heads}: "
            "heads must be a multiple of key/value heads, and their width even"
        )
    return facts


def first_id(value: object) -> int | None:
    """Chat models list several end tokens; the first is the one that ends a text."""
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def read_rope(take: Reader) -> dict:
    """rope_theta and rope_scaling, each where it is stated, from either spelling."""
    key, stated = stated_rope(take)
    rope = Reader(stated, f'{take.where}: "{key}"')
    types = [stated[name] for name in ROPE_TYPE_NAMES if stated.get(name) is not None]
    kind = types[0] if types else "default"
    if not isinstance(kind, str) or kind not in ROPE_TYPES or types[1:] not in ([], [kind]):
        raise rope.bad(f"{' and '.join(map(repr, types))} is not one of {', '.join(ROPE_TYPES)}")
    whole = stated.get("partial_rotary_factor", take.hf.get("partial_rotary_factor"))
    rope.only("partial_rotary_factor", 1.0 if whole is None else whole, 1.0)
    needed = ROPE_TYPES[kind]
    known = {*needed, *ROPE_TYPE_NAMES, "rope_theta", "partial_rotary_factor"}
    for name in stated:
        if name not in known and stated[name] is not None:
            raise rope.bad(f'"{name}" means nothing to the type {kind!r}')
    facts = {}
    thetas = [r for r in (rope, take) if r.hf.get("rope_theta") is not None]
    values = [reader.number("rope_theta", float, 1e12) for reader in thetas]
    if len(set(values)) > 1:
        raise rope.bad('"rope_theta" is {:g}, but {:g} outside of it'.format(*values))
    if values:
        facts["rope_theta"] = values[0]
    scaling = read_scaling(rope, take, needed)
    if scaling and (kind, scaling["factor"]) != ("linear", 1.0):
        facts["rope_scaling"] = scaling
    return facts


def stated_rope(take: Reader) -> tuple[str, dict]:
    """(key, its object): of rope_parameters and rope_scaling the one that says something."""
    new, old = (take.object(key) for key in ("rope_parameters", "rope_scaling"))
    for name in sorted(new.keys() & old.keys()):
        if new[name] != old[name]:
            raise take.bad(
                f'"rope_parameters" and "rope_scaling" state different "{name}": '
                f"{new[name]!r} and {old[name]!r}"
            )
    says_type = [not o.keys().isdisjoint(ROPE_TYPE_NAMES) for o in (new, old)]
    if all((new, old)) and not all(says_type):
        raise take.bad('"rope_scaling" beside "rope_parameters", and only one names a rope_type')
    return ("rope_parameters", new | old) if new else ("rope_scaling", old)


def read_scaling(rope: Reader, take: Reader, needed: tuple[str, ...]) -> dict:
    """The numbers of a rotary scaling, named as LlamaConfig's RopeScaling names them."""
    if not needed:
        return {}
    numbers = {"factor": rope.number("factor", float)}
    if numbers["factor"] < 1:
        raise rope.bad(f'"factor" is {numbers["factor"]!r}, expected at least 1')
    if "low_freq_factor" in needed:
        low, high = (rope.number(f"{end}_freq_factor", float) for end in ("low", "high"))
        if not low < high:
            raise rope.bad(f'"low_freq_factor" {low:g} must be below "high_freq_factor" {high:g}')
        original = rope.number("original_max_position_embeddings")
        outside = take.hf.get("original_max_position_embeddings")
        if outside not in (None, original):
            raise rope.bad(
                f'"original_max_position_embeddings" is {original}, but {outside!r} outside of it'
            )
        numbers |= {"low": low, "high": high, "original_positions": original}
    return numbers


def rope_json(scaling) -> dict | None:
    """A RopeScaling as transformers 4 and 5 both read it."""
    if scaling is None:
        return None
    if scaling.low is None:
        return {"type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low,
        "high_freq_factor": scaling.high,
        "original_max_position_embeddings": scaling.original_positions,
    }


def config_json(cfg, dtype: torch.dtype) -> dict:
    """A LlamaConfig as transformers 4 spells it; transformers 5 reads both."""
    facts = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": cfg.dim,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "intermediate_size": cfg.hidden_dim,
        "vocab_size": cfg.vocab_size,
        "rms_norm_eps": cfg.norm_eps,
        "rope_theta": cfg.rope_theta,
        "max_position_embeddings": cfg.max_positions,
        "tie_word_embeddings": cfg.tie_embeddings,
        "bos_token_id": cfg.bos,
        "eos_token_id": cfg.eos,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    scaling = rope_json(cfg.rope_scaling)
    return facts | ({"rope_scaling": scaling} if scaling else {})
