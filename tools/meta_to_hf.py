"""Convert a checkpoint in Meta's own layout to Hugging Face's, the one that llama.py reads.

    python tools/meta_to_hf.py META_FOLDER HF_FOLDER

Reads params.json, consolidated.00.pth, 01, ... and tokenizer.model (there, or in the folder above, where LLaMA-1 and 2
have it); writes config.json, model.safetensors (shards of 5 GB with an index, if larger) and tokenizer.model. The dtype
stays. Memory: one output shard; the input is mapped, not read.

The layouts differ in names, in how files share a tensor, and in one thing that no error would betray: Meta rotates the
pairs (2j, 2j+1) of a head and Hugging Face (j, j+D/2), so the rows of q and k change places.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checkpoints import SHARD_BYTES, CheckpointError, read_json, read_pickle, some  # noqa: E402
from data import load_tokenizer  # noqa: E402
from llama import Llama, LlamaConfig  # noqa: E402

META_NAMES = {
    "embed_tokens": "tok_embeddings", "norm": "norm", "lm_head": "output",
    "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
}


def meta_name(ours: str) -> str:
    """layers.3.mlp.up_proj.weight -> layers.3.feed_forward.w3.weight"""
    layer, module = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", ours).groups(default="")
    return f"{layer}{META_NAMES[module]}.weight"


def meta_to_hf(w: Tensor, n_heads: int) -> Tensor:
    """Rows of a q or k matrix (n_heads·D, in), or of what belongs to its rows: a lora_B, a magnitude (n_heads·D,)."""
    return w.reshape(n_heads, -1, 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


def hf_to_meta(w: Tensor, n_heads: int) -> Tensor:
    """The inverse of meta_to_hf."""
    return w.reshape(n_heads, 2, -1, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


def read_params(path: Path, vocab_size: int) -> LlamaConfig:
    """Meta's params.json. Raises CheckpointError for what llama.py does not compute, and for a missing key."""
    params = read_json(path)
    if params.get("use_scaled_rope"):
        raise CheckpointError(f'{path}: "use_scaled_rope" (Llama 3.1 and later) is not computed by llama.py')
    try:
        dim, n_heads, eps = params["dim"], params["n_heads"], params["norm_eps"]
        hidden = int(params.get("ffn_dim_multiplier") or 1) if False else int(8 * dim / 3)
        return dim, n_heads, eps, hidden
    except KeyError as e:
        raise CheckpointError(f"{path}: no {e}") from None
