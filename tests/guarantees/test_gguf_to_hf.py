"""tools/gguf_to_hf.py on a small file written here, byte by byte."""

import dataclasses
import struct

import pytest
import torch
from conftest import SMALL

from data import load_tokenizer
from llama import Llama, load_llama
from plumbing.tokenizer_files import BYTE_OF
from tools.gguf_to_hf import STORED, gguf_name, main
from tools.meta_to_hf import hf_to_meta

F32, Q4_0, Q4_1, Q8_0, Q6_K = 0, 2, 3, 8, 14
LETTERS = sorted(BYTE_OF, key=BYTE_OF.get)
TOKENS = ["<|end|>", *LETTERS, "th", "the"]
CFG = dataclasses.replace(
    SMALL, vocab_size=len(TOKENS), tie_embeddings=True, bos=0, eos=0, norm_eps=1e-5
)
FACTS = {
    "general.architecture": "llama",
    "llama.embedding_length": CFG.dim,
    "llama.block_count": CFG.n_layers,
    "llama.attention.head_count": CFG.n_heads,
    "llama.attention.head_count_kv": CFG.n_kv_heads,
    "llama.feed_forward_length": CFG.hidden_dim,
    "llama.context_length": CFG.max_positions,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3] + [1] * (len(TOKENS) - 1),
    "tokenizer.ggml.merges": ["t h", "th e"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 0,
}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def typed(value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, list):
        kind = 8 if isinstance(value[0], str) else 4
        items = [text(v) if kind == 8 else struct.pack("<I", v) for v in value]
        return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(items)
    return struct.pack("<II", 4, value)


def write_gguf(path, facts: dict, tensors: dict) -> None:
    """`tensors`: {name: (shape, type, bytes)}."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(facts))
    head += b"".join(text(key) + typed(value) for key, value in facts.items())
    offset, data = 0, b""
    for name, (shape, kind, raw) in tensors.items():
        head += text(name) + struct.pack(
            f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset
        )
        raw += bytes(-len(raw) % 32)
        data, offset = data + raw, offset + len(raw)
    path.write_bytes(head + bytes(-len(head) % 32) + data)


def as_stored(model) -> dict:
    """llama.cpp has Meta's order of rows in q and k."""
    found = {}
    for name, w in model.state_dict().items():
        if name != "lm_head.weight":
            heads = {"q_proj": CFG.n_heads, "k_proj": CFG.n_kv_heads}.get(name.split(".")[-2])
            w = hf_to_meta(w, heads) if heads else w
            found[gguf_name(name)] = tuple(w.shape), F32, w.contiguous().numpy().tobytes()
    return found


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Llama(CFG).requires_grad_(False)


def test_a_converted_file_is_the_same_model_and_the_same_tokenizer(model, tmp_path):
    write_gguf(tmp_path / "m.gguf", FACTS, as_stored(model))
    assert main([str(tmp_path / "m.gguf"), str(tmp_path / "hf")]) == 0
    converted = load_llama(tmp_path / "hf", dtype=torch.float32)
    assert converted.cfg == CFG
    for name, w in model.state_dict().items():
        assert torch.equal(converted.state_dict()[name], w.bfloat16().float())
    tokenizer = load_tokenizer(tmp_path / "hf")
    ids = tokenizer.encode("the 12", bos=True, eos=False)
    assert [TOKENS[i] for i in ids] == ["<|end|>", "the", "Ġ", "1", "2"]


def test_quantised_weights_are_what_their_formats_say():
    """32 weights share a scale: bytes, or halves of bytes, the first 16 in the lower halves."""
    scale, least = (struct.pack("<e", x) for x in (0.5, -3.0))
    whole = torch.arange(-16, 16).to(torch.int8)
    halves = torch.arange(16, dtype=torch.uint8)  # lower: 0..15, upper: 15..0
    packed = bytes((halves | (15 - halves) << 4).tolist())
    lower_then_upper = torch.cat([halves, 15 - halves]).float()
    for kind, raw, expected in [
        (Q8_0, scale + whole.numpy().tobytes(), whole * 0.5),
        (Q4_0, scale + packed, (lower_then_upper - 8) * 0.5),
        (Q4_1, scale + least + packed, lower_then_upper * 0.5 - 3),
    ]:
        n_bytes, n_weights, read = STORED[kind]
        assert (n_bytes, n_weights) == (len(raw), 32)
        assert torch.equal(read(torch.tensor(list(raw), dtype=torch.uint8)).flatten(), expected)


def k_quantised(facts, tensors):
    shape, _, raw = tensors["output_norm.weight"]
    tensors["output_norm.weight"] = shape, Q6_K, raw


@pytest.mark.parametrize(
    "spoil, named",
    [
        (lambda facts, tensors: facts.update({"general.architecture": "qwen2"}), "qwen2"),
        (lambda facts, tensors: facts.update({"llama.rope.scaling.type": "yarn"}), "yarn"),
        (
            lambda facts, tensors: tensors.update({"rope_freqs.weight": ((4,), F32, b"")}),
            "rope_freqs",
        ),
        (lambda facts, tensors: facts.update({"tokenizer.ggml.model": "llama"}), "gpt2"),
        (lambda facts, tensors: facts.update({"tokenizer.ggml.pre": "qwen2"}), "qwen2"),
        (lambda facts, tensors: facts.pop("llama.block_count"), "llama.block_count"),
        (lambda facts, tensors: tensors.pop("output_norm.weight"), "output_norm"),
        (k_quantised, "type 14"),
    ],
)
def test_a_file_that_cannot_be_converted_gets_one_line_and_leaves_no_folder(
    spoil, named, model, tmp_path, capsys
):
    facts, tensors = dict(FACTS), as_stored(model)
    spoil(facts, tensors)
    write_gguf(tmp_path / "m.gguf", facts, tensors)
    assert main([str(tmp_path / "m.gguf"), str(tmp_path / "hf")]) == 3
    message = capsys.readouterr().err
    assert named in message and message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a GGUF file", "cut"], ids=str)
def test_a_file_that_is_no_gguf_or_ends_too_early_is_refused(content, model, tmp_path, capsys):
    path = tmp_path / "m.gguf"
    write_gguf(path, FACTS, as_stored(model))
    path.write_bytes(path.read_bytes()[:-4000] if content == "cut" else content)
    assert main([str(path), str(tmp_path / "hf")]) == 3
    assert "m.gguf" in capsys.readouterr().err and not (tmp_path / "hf").exists()
