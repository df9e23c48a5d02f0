"""tools/meta_to_hf.py against a forward pass written the way Meta writes it."""

import base64
import io
import json
import math
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
import torch.nn.functional as F

from llama import load_llama
from tools.meta_to_hf import hf_to_meta, main, meta_to_hf, read_params

LLAMA_1 = {
    "dim": 32,
    "multiple_of": 8,
    "n_heads": 4,
    "n_layers": 2,
    "norm_eps": 1e-6,
    "vocab_size": -1,
}
LLAMA_3 = {
    "dim": 32,
    "multiple_of": 16,
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 2,
    "norm_eps": 1e-5,
    "vocab_size": 512,
    "ffn_dim_multiplier": 1.3,
    "rope_theta": 500000.0,
}
LLAMA_3_1 = LLAMA_3 | {"use_scaled_rope": True}
FFN = {
    "LLAMA_1": 88,
    "LLAMA_3": 112,
}  # int(8·32/3) = 85, to a multiple of 8; int(1.3·85) = 110, to a multiple of 16
COLUMNS = ("wo", "w2")  # a second file continues these to the right, all others downwards


@pytest.fixture(scope="session")
def sentencepiece_model() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the crow eats roots"] * 9),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return model.getvalue()


def write_meta(folder, params: dict, hidden: int, tokenizer: bytes, n_files: int) -> dict:
    """A random checkpoint as Meta distributes it; returns its tensors, whole."""
    V = params["vocab_size"]
    if V < 0:
        V = sentencepiece.SentencePieceProcessor(model_proto=tokenizer).vocab_size()
    C, D = params["dim"], params["dim"] // params["n_heads"]
    kv = params.get("n_kv_heads", params["n_heads"]) * D
    shapes = {"tok_embeddings": (V, C), "norm": (C,), "output": (V, C)}
    for i in range(params["n_layers"]):
        shapes |= {
            f"layers.{i}.{name}": shape
            for name, shape in {
                "attention.wq": (C, C),
                "attention.wk": (kv, C),
                "attention.wv": (kv, C),
                "attention.wo": (C, C),
                "feed_forward.w1": (hidden, C),
                "feed_forward.w2": (C, hidden),
                "feed_forward.w3": (hidden, C),
                "attention_norm": (C,),
                "ffn_norm": (C,),
            }.items()
        }
    generator = torch.Generator().manual_seed(0)
    whole = {
        f"{name}.weight": torch.randn(shape, generator=generator) * 0.2 + (len(shape) == 1)
        for name, shape in shapes.items()
    }
    folder.mkdir(parents=True)
    for n in range(n_files):
        part = {"rope.freqs": torch.ones(D // 2)}
        for name, w in whole.items():
            right = (
                name.split(".")[-2] in COLUMNS
                or name.startswith("tok_embeddings")
                and "rope_theta" not in params
            )
            part[name] = w if w.dim() == 1 else w.chunk(n_files, 1 if right else 0)[n].clone()
        torch.save(part, folder / f"consolidated.{n:02}.pth")
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "tokenizer.model").write_bytes(tokenizer)
    return whole


def scaled_as_meta_does(f: torch.Tensor, factor: float) -> torch.Tensor:
    """Llama 3.1's frequencies, one at a time: 8192 positions first, low factor 1, high factor 4."""
    new = []
    for frequency in f.tolist():
        wave_length = 2 * math.pi / frequency
        if wave_length > 8192 / 1:
            frequency /= factor
        elif wave_length > 8192 / 4:
            smooth = (8192 / wave_length - 1) / (4 - 1)
            frequency = (1 - smooth) * frequency / factor + smooth * frequency
        new.append(frequency)
    return torch.tensor(new).double()


def meta_forward(params: dict, w: dict, ids: torch.Tensor) -> torch.Tensor:  # (T,) -> (T, V)
    """LLaMA with Meta's rotation: neighbours are one complex number, turned by e^(i·t·f)."""
    T, H, D = len(ids), params["n_heads"], params["dim"] // params["n_heads"]
    G = params.get("n_kv_heads", H)
    f = params.get("rope_theta", 10000.0) ** (-torch.arange(0, D, 2).double() / D)
    if params.get("use_scaled_rope"):
        tied = torch.equal(w["output.weight"], w["tok_embeddings.weight"])
        f = scaled_as_meta_does(f, 32 if tied else 8)
    turn = torch.polar(torch.ones(T, D // 2).double(), torch.outer(torch.arange(T).double(), f))[
        :, None
    ]

    def norm(x, g):
        return x / (x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]).sqrt() * g

    def rotate(x):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(
            -2
        )

    w = {name: t.double() for name, t in w.items()}
    x = w["tok_embeddings.weight"][ids]
    hidden_from_past = torch.full((T, T), float("-inf")).triu(1)
    for i in range(params["n_layers"]):

        def linear(name, y):
            return y @ w[f"layers.{i}.{name}.weight"].T

        y = norm(x, w[f"layers.{i}.attention_norm.weight"])
        q = rotate(linear("attention.wq", y).view(T, H, D))
        k = rotate(linear("attention.wk", y).view(T, G, D)).repeat_interleave(H // G, dim=1)
        v = linear("attention.wv", y).view(T, G, D).repeat_interleave(H // G, dim=1)
        scores = torch.einsum("thd,shd->hts", q, k) / D**0.5 + hidden_from_past
        x = x + linear(
            "attention.wo", torch.einsum("hts,shd->thd", scores.softmax(-1), v).flatten(1)
        )
        y = norm(x, w[f"layers.{i}.ffn_norm.weight"])
        x = x + linear(
            "feed_forward.w2", F.silu(linear("feed_forward.w1", y)) * linear("feed_forward.w3", y)
        )
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


def byte_tokenizer() -> bytes:
    """The smallest tokenizer.model of Llama-3's kind: 256 bytes and 256 specials, 512 ids."""
    return b"\n".join(base64.b64encode(bytes([i])) + b" %d" % i for i in range(256))


@pytest.mark.parametrize("n_files", [1, 2])
@pytest.mark.parametrize("family", ["LLAMA_1", "LLAMA_3"])
def test_the_converted_checkpoint_gives_the_logits_of_metas_own_forward(
    family, n_files, sentencepiece_model, tmp_path
):
    params, tokenizer = {
        "LLAMA_1": (LLAMA_1, sentencepiece_model),
        "LLAMA_3": (LLAMA_3, byte_tokenizer()),
    }[family]
    w = write_meta(tmp_path / "meta", params, FFN[family], tokenizer, n_files)
    assert main([str(tmp_path / "meta"), str(tmp_path / "hf")]) == 0
    ids = torch.randint(len(w["output.weight"]), (12,), generator=torch.Generator().manual_seed(1))
    logits = load_llama(tmp_path / "hf", dtype=torch.float32)(ids[None])[0]
    torch.testing.assert_close(logits.double(), meta_forward(params, w, ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", ["its own", "a copy", "absent"])
def test_llama_3_1_scales_by_8_and_3_2_whose_embeddings_are_tied_by_32(head, tmp_path):
    w = write_meta(tmp_path / "meta", LLAMA_3_1, FFN["LLAMA_3"], byte_tokenizer(), 1)
    if head != "its own":
        w["output.weight"] = w["tok_embeddings.weight"]
        stored = {k: v for k, v in w.items() if k != "output.weight" or head == "a copy"}
        torch.save(stored, tmp_path / "meta/consolidated.00.pth")
    assert main([str(tmp_path / "meta"), str(tmp_path / "hf")]) == 0
    model = load_llama(tmp_path / "hf", dtype=torch.float32)
    assert model.cfg.tie_embeddings == (head != "its own") and model.cfg.max_positions == 131072
    ids = torch.randint(512, (40,), generator=torch.Generator().manual_seed(1))
    logits = model(ids[None])[0].double()
    torch.testing.assert_close(logits, meta_forward(LLAMA_3_1, w, ids), rtol=1e-5, atol=1e-5)
    plain = meta_forward(LLAMA_3, w, ids)
    assert (logits - plain).abs().max() > 1e-3


def test_the_converted_config_names_the_tokenizers_own_begin_and_end(tmp_path):
    write_meta(tmp_path / "meta", LLAMA_3, FFN["LLAMA_3"], byte_tokenizer(), 1)
    assert main([str(tmp_path / "meta"), str(tmp_path / "hf")]) == 0
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (256, 257)


def test_neighbouring_rows_of_a_head_end_up_half_a_head_apart():
    rows = torch.arange(16)[:, None]  # two heads of width 8
    assert meta_to_hf(rows, 2).flatten().tolist() == [
        0,
        2,
        4,
        6,
        1,
        3,
        5,
        7,
        8,
        10,
        12,
        14,
        9,
        11,
        13,
        15,
    ]


@pytest.mark.parametrize("shape", [(24, 5), (24,)], ids=["matrix", "magnitude"])
def test_hf_to_meta_undoes_meta_to_hf(shape):
    w = torch.randn(shape)
    assert torch.equal(hf_to_meta(meta_to_hf(w, 3), 3), w)


@pytest.mark.parametrize(
    "name, params, hidden",
    [
        (
            "LLaMA-7B",
            {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-6},
            11008,
        ),
        (
            "LLaMA-13B",
            {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-6},
            13824,
        ),
        (
            "Llama-3-8B",
            {
                "dim": 4096,
                "multiple_of": 1024,
                "n_heads": 32,
                "n_layers": 32,
                "norm_eps": 1e-5,
                "n_kv_heads": 8,
                "ffn_dim_multiplier": 1.3,
                "rope_theta": 500000.0,
                "vocab_size": 128256,
            },
            14336,
        ),
        (
            "Llama-3.2-1B",
            {
                "dim": 2048,
                "multiple_of": 256,
                "n_heads": 32,
                "n_layers": 16,
                "norm_eps": 1e-5,
                "n_kv_heads": 8,
                "ffn_dim_multiplier": 1.5,
                "rope_theta": 500000.0,
                "vocab_size": 128256,
                "use_scaled_rope": True,
            },
            8192,
        ),
    ],
)
def test_the_published_widths_follow_from_params_json(name, params, hidden, tmp_path):
    (tmp_path / "params.json").write_text(json.dumps(params))
    cfg = read_params(tmp_path / "params.json", SimpleNamespace(vocab_size=32000, bos=1, eos=2))
    assert (cfg.hidden_dim, cfg.vocab_size) == (hidden, params.get("vocab_size", 32000))


def spoil_params(folder):
    (folder / "params.json").write_text(json.dumps({"dim": 32}))


def spoil_tokenizer(folder):
    (folder / "tokenizer.model").unlink()


def spoil_numbering(folder):
    (folder / "consolidated.01.pth").rename(folder / "consolidated.02.pth")


def spoil_width(folder):
    state = torch.load(folder / "consolidated.01.pth", weights_only=True)
    torch.save(state | {"output.weight": torch.zeros(3, 32)}, folder / "consolidated.01.pth")


def spoil_names(folder):
    state = torch.load(folder / "consolidated.01.pth", weights_only=True)
    torch.save(state | {"layers.0.attention.bias": torch.zeros(3)}, folder / "consolidated.01.pth")


@pytest.mark.parametrize(
    "spoil, named",
    [
        (spoil_params, "multiple_of"),
        (spoil_tokenizer, "tokenizer.model"),
        (spoil_numbering, "consolidated.02.pth"),
        (spoil_width, "output.weight"),
        (spoil_names, "layers.0.attention.bias"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_checkpoint_that_cannot_be_converted_gets_one_line_and_leaves_no_folder(
    spoil, named, tmp_path, capsys
):
    write_meta(tmp_path / "meta", LLAMA_3, FFN["LLAMA_3"], byte_tokenizer(), 2)
    spoil(tmp_path / "meta")
    assert main([str(tmp_path / "meta"), str(tmp_path / "hf")]) == 3
    message = capsys.readouterr().err
    assert named in message and message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["meta"]


def test_an_existing_folder_is_never_written_into(tmp_path, capsys):
    (tmp_path / "hf").mkdir()
    assert main([str(tmp_path), str(tmp_path / "hf")]) == 2
    assert "exists" in capsys.readouterr().err
