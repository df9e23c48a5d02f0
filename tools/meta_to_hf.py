"""Convert a checkpoint in Meta's own layout to Hugging Face's, the one that llama.py reads.

    python tools/meta_to_hf.py META_FOLDER HF_FOLDER

Reads params.json, consolidated.00.pth, 01, ... and tokenizer.model (there, or in the folder above,
where LLaMA-1 and 2 have it); writes config.json, model.safetensors (shards of 5 GB with an index,
if larger) and tokenizer.model. The dtype stays. The input is mapped, and each tensor is made whole
only when it is written.

The layouts differ in names, in how files share a tensor, and in one thing that no error would
betray: Meta rotates the pairs (2j, 2j+1) of a head and Hugging Face (j, j+D/2), so the rows of q
and k change places.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's root

from plumbing.hf_files import CheckpointError, read_json, read_pickle, some, write_tensors  # noqa: E402
from data import load_tokenizer  # noqa: E402
from llama import Llama, LlamaConfig, RopeScaling  # noqa: E402
from plumbing.run_folder import new_folder  # noqa: E402
from plumbing.tokenizer_json import write_tokenizer_json  # noqa: E402

META_NAMES = {
    "embed_tokens": "tok_embeddings",
    "norm": "norm",
    "lm_head": "output",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}


def meta_name(ours: str) -> str:
    """layers.3.mlp.up_proj.weight -> layers.3.feed_forward.w3.weight"""
    layer, module = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", ours).groups(default="")
    return f"{layer}{META_NAMES[module]}.weight"


def meta_to_hf(w: Tensor, n_heads: int) -> Tensor:
    """Rows of a q or k matrix (n_heads·D, in), or what belongs to them: lora_B, magnitude."""
    return w.reshape(n_heads, -1, 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


def hf_to_meta(w: Tensor, n_heads: int) -> Tensor:
    """The inverse of meta_to_hf."""
    return w.reshape(n_heads, 2, -1, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


def read_params(path: Path, tokenizer, tied: bool = False) -> LlamaConfig:
    """Meta's params.json, whose vocab_size -1 means the tokenizer's.

    Raises CheckpointError for what is absent or absurd.
    """
    absent = {"vocab_size": -1, "n_kv_heads": None, "ffn_dim_multiplier": None}
    params = absent | {"rope_theta": 10000.0, "use_scaled_rope": False} | read_json(path)
    try:
        dim, multiple, n_heads = params["dim"], params["multiple_of"], params["n_heads"]
        hidden = int(8 * dim / 3)
        if params["ffn_dim_multiplier"]:
            hidden = int(params["ffn_dim_multiplier"] * hidden)
        theta, eps = float(params["rope_theta"]), float(params["norm_eps"])
        scaled = bool(params["use_scaled_rope"])
        return LlamaConfig(
            dim=dim,
            n_layers=params["n_layers"],
            n_heads=n_heads,
            n_kv_heads=params["n_kv_heads"] or n_heads,
            hidden_dim=-(-hidden // multiple) * multiple,
            vocab_size=params["vocab_size"] if params["vocab_size"] > 0 else tokenizer.vocab_size,
            norm_eps=eps,
            rope_theta=theta,
            rope_scaling=scaling(params, tied) if scaled else None,
            bos=tokenizer.bos,
            eos=tokenizer.eos,
            tie_embeddings=tied,
            max_positions=131072 if scaled else first_length(theta, eps),
        )
    except KeyError as e:
        raise CheckpointError(f"{path}: no {e}") from None
    except (TypeError, ValueError, ZeroDivisionError) as e:
        raise CheckpointError(f"{path}: not Meta's params.json ({e})") from None


def scaling(params: dict, tied: bool) -> RopeScaling:
    """What "use_scaled_rope" means, which most params.json leave to Meta's code.

    In the published config.json of Llama 3.1 (8B, 70B, 405B) the factor is 8, in those of Llama 3.2
    (1B, 3B) it is 32, and the rest is the same. Only 3.2's embeddings are tied.
    """
    factor = params.get("rope_scaling_factor") or (32.0 if tied else 8.0)
    return RopeScaling(float(factor), low=1.0, high=4.0, original_positions=8192)


def first_length(theta: float, eps: float) -> int:
    """No file says it. Theta and eps tell LLaMA, Llama-2 and Llama-3 apart."""
    if theta > 10000:
        return 8192
    return 2048 if eps < 1e-5 else 4096


def open_files(folder: Path) -> dict[str, dict[str, Tensor]]:
    """{name: its tensors, mapped} of consolidated.00.pth, 01, ... Raises CheckpointError."""
    found = sorted(path.name for path in folder.glob("consolidated.*.pth"))
    if not found or found != [f"consolidated.{i:02}.pth" for i in range(len(found))]:
        raise CheckpointError(
            f"{folder}: expected consolidated.00.pth, 01, ..., found {some(found) or 'none'}"
        )
    return {name: read_pickle(folder / name) for name in found}


def is_tied(files: dict[str, dict[str, Tensor]]) -> bool:
    """Whether the output matrix is the embedding: absent, or a copy."""
    for tensors in files.values():
        head, embedding = (tensors.get(f"{n}.weight") for n in ("output", "tok_embeddings"))
        if head is not None and (embedding is None or not torch.equal(head, embedding)):
            return False
    return True


class MetaTensors(Mapping):
    """The tensors of several files by our names, each made whole when it is asked for, not kept."""

    def __init__(self, folder: Path, files: dict[str, dict[str, Tensor]], cfg: LlamaConfig):
        self.folder, self.cfg, self.files = folder, cfg, list(files.values())
        with torch.device("meta"):
            self.shapes = {name: p.shape for name, p in Llama(cfg).state_dict().items()}
        if cfg.tie_embeddings:
            del self.shapes["lm_head.weight"]
        want = {meta_name(name) for name in self.shapes}
        not_read = {"rope.freqs"} | ({meta_name("lm_head.weight")} if cfg.tie_embeddings else set())
        for name, tensors in files.items():
            if wrong := (tensors.keys() - not_read) ^ want:
                raise CheckpointError(f"{folder / name}: missing or unexpected: {some(wrong)}")
        self.dtype = self.files[0][meta_name("norm.weight")].dtype

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, name: str) -> Tensor:
        """Files divide a tensor along one dimension, found from the shapes, or each hold all of it.

        tok_embeddings is cut across its width in LLaMA-1 and 2, across the vocabulary in Llama-3.
        """
        parts, whole = [file[meta_name(name)] for file in self.files], self.shapes[name]
        short = {
            d
            for part in parts
            for d, (some_of_it, all_of_it) in enumerate(zip(part.shape, whole))
            if some_of_it != all_of_it
        }
        if len(short) > 1 or any(sum(part.shape[d] for part in parts) != whole[d] for d in short):
            found = " and ".join(str(tuple(part.shape)) for part in parts)
            raise CheckpointError(
                f"{self.folder}: {meta_name(name)} is {found}, "
                f"which does not make up {tuple(whole)}"
            )
        w = torch.cat(parts, short.pop()) if short else parts[0]
        for module, n_heads in (("q_proj", self.cfg.n_heads), ("k_proj", self.cfg.n_kv_heads)):
            if module in name:
                w = meta_to_hf(w, n_heads)
        return w


def convert(source: Path, target: Path) -> None:
    model = next(
        (p for p in (source / "tokenizer.model", source.parent / "tokenizer.model") if p.exists()),
        None,
    )
    if model is None:
        raise CheckpointError(f"{source}: no tokenizer.model, there or in the folder above")
    tokenizer, files = load_tokenizer(model), open_files(source)
    cfg = read_params(source / "params.json", tokenizer, is_tied(files))
    tensors = MetaTensors(source, files, cfg)
    with new_folder(target) as folder:
        write_tensors(folder, tensors)
        (folder / "config.json").write_text(json.dumps(cfg.to_json(tensors.dtype), indent=2) + "\n")
        shutil.copyfile(model, folder / "tokenizer.model")
        lacking = write_tokenizer_json(folder, folder)
    if lacking:
        print(f"note: {lacking}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Meta's checkpoint layout -> Hugging Face's.", allow_abbrev=False
    )
    parser.add_argument(
        "source", type=Path, metavar="META_FOLDER", help="params.json and consolidated.*.pth"
    )
    parser.add_argument("target", type=Path, metavar="HF_FOLDER", help="must not exist")
    args = parser.parse_args(argv)
    if args.target.exists():
        print(f"{args.target}: exists; give a new folder", file=sys.stderr)
        return 2
    try:
        convert(args.source, args.target)
    except (ValueError, OSError) as e:
        print(e, file=sys.stderr)
        return 3 if isinstance(e, ValueError) else 1
    print(f"wrote {args.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
