"""tokenizer.json and tokenizer_config.json for a folder that has a bare tokenizer.model.

Meta publishes tokenizer.model alone, and this project needs no more. transformers 5 makes a
tokenizer of its own from such a file, whose ids are other ones, and nothing at all from Llama-3's;
from a tokenizer.json every version makes the same. A folder that has its own keeps it.

Both of Meta's files are byte-pair encodings that say only which piece is made before which. A
tokenizer.json wants the pairs that are joined, in order. A piece is made from any two pieces that
give it, so the pairs are all splits of every piece, in the order of the pieces they make.
"""

import json
from pathlib import Path

from plumbing.tokenizer_files import BYTE_OF, LLAMA_3, find_tokenizer_file, read_ranks

Piece = str
LETTER_OF = {byte: letter for letter, byte in BYTE_OF.items()}
UNLIKELY = -1e9
SPACE = "▁"  # what SentencePiece writes for a blank
# What a normalizer would change, were there one: blanks, a ligature, full width, an accent apart.
PROBE = "  a  \ufb01\uff11 \u3000e\u0301\t"
LLAMA_3_NAMED = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id"}
LLAMA_3_NAMED |= {9: "eot_id"}  # place behind the ranks -> name; the others are reserved


def write_tokenizer_json(source: Path, folder: Path) -> str | None:
    """Fill in what `folder` lacks, from the tokenizer.model of `source`. Returns what readers of
    `folder` will lack, where these files cannot say what the tokenizer.model says."""
    if (folder / "tokenizer.json").is_file():
        return None
    path = find_tokenizer_file(source)
    if path.read_bytes()[:1].isalnum() or path.read_bytes()[:1] in b"+/":  # base64, not a proto
        tokenizer, config = llama_3_files(path)
    elif made := sentencepiece_files(path):
        tokenizer, config = made
    else:
        return (
            f"{path.name} is not LLaMA's kind of SentencePiece model (byte pairs, text unchanged): "
            "no tokenizer.json was written, and transformers may read other ids"
        )
    write(folder / "tokenizer.json", tokenizer)
    if not (folder / "tokenizer_config.json").is_file():
        write(folder / "tokenizer_config.json", config)
    return None


def write(path: Path, value: dict) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=1 if len(value) > 8 else None)
    path.write_text(text + "\n", encoding="utf-8")


def every_split(pieces: list[Piece]) -> list[str]:
    """All pairs of pieces that make a piece, "left right". The first of `pieces` is made first."""
    rank = {piece: i for i, piece in enumerate(pieces)}
    pairs = []
    for piece in pieces:
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        known = [(rank[a], rank[b], f"{a} {b}") for a, b in splits if a in rank and b in rank]
        pairs += [pair for *_, pair in sorted(known)]
    return pairs


def added(content: str, i: int) -> dict:
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    return {"id": i, "content": content} | dict.fromkeys(flags, False) | {"special": True}


def begin_before_text(bos: str, i: int) -> dict:
    first, second = (
        [{"SpecialToken": {"id": bos, "type_id": n}}, {"Sequence": {"id": text, "type_id": n}}]
        for n, text in enumerate("AB")
    )
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": first + second,
        "special_tokens": {bos: {"id": bos, "ids": [i], "tokens": [bos]}},
    }


def files(model: dict, specials: dict[str, int], bos: str, eos: str, **parts) -> tuple[dict, dict]:
    """(tokenizer.json, tokenizer_config.json)"""
    model = {"type": "BPE", "dropout": None, "unk_token": None} | model
    model |= {"continuing_subword_prefix": None, "end_of_word_suffix": None}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added(content, i) for content, i in specials.items()],
        **parts,
        "post_processor": begin_before_text(bos, specials[bos]),
        "model": model,
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if model["unk_token"]:
        config["unk_token"] = model["unk_token"]
    return tokenizer, config


# --- LLaMA-1 and 2 --------------------------------------------------------------------------------


def sentencepiece_files(path: Path) -> tuple[dict, dict] | None:
    """None where the model is not byte pairs over unchanged text: nothing that LLaMA has."""
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    ids = range(sp.vocab_size())
    pieces = {sp.id_to_piece(i): i for i in ids}
    normal = [i for i in ids if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i))]
    # Byte pairs score 0, -1, -2, … and UNLIKELY (long blanks); probabilities are no whole numbers.
    scores = [s for s in map(sp.get_score, normal) if s != UNLIKELY]
    falling = all(s.is_integer() and s > later for s, later in zip(scores, scores[1:]))
    if not falling or sp.unk_id() < 0 or rebuilt(sp, PROBE) != SPACE + PROBE.replace(" ", SPACE):
        return None
    made_first = sorted(normal, key=lambda i: (-sp.get_score(i), i))
    letters = {
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "unk_token": sp.id_to_piece(sp.unk_id()),
        "vocab": pieces,
        "merges": every_split([sp.id_to_piece(i) for i in made_first]),
    }
    blank = {"String": " "}
    return files(
        letters,
        {sp.id_to_piece(i): i for i in ids if sp.is_control(i) or sp.is_unknown(i)},
        sp.id_to_piece(sp.bos_id()),
        sp.id_to_piece(sp.eos_id()),
        normalizer={
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": blank, "content": SPACE},
            ],
        },
        pre_tokenizer=None,
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
    )


def rebuilt(sp, text: str) -> str:
    """What SentencePiece made of a text before it cut it: its pieces, laid end to end."""
    found = b""
    for i in sp.encode(text):
        piece = sp.id_to_piece(i)
        found += bytes([int(piece[3:5], 16)]) if sp.is_byte(i) else piece.encode()
    return found.decode()


# --- Llama-3 --------------------------------------------------------------------------------------


def llama_3_files(path: Path) -> tuple[dict, dict]:
    bpe = read_ranks(path)
    pieces = {"".join(map(LETTER_OF.__getitem__, token)): i for token, i in bpe.tokens.items()}
    named = [f"<|{name}|>" for name in special_names(bpe.vocab_size - len(pieces))]
    specials = {name: len(pieces) + i for i, name in enumerate(named)}
    model = {
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": bpe.whole_first,
        "vocab": pieces,
        "merges": every_split(list(pieces)),
    }
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return files(
        model,
        specials,
        named[0],
        named[1],
        normalizer=None,
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [LLAMA_3, bytes_only | {"use_regex": False}],
        },
        decoder=bytes_only | {"add_prefix_space": True, "use_regex": True},
    )


def special_names(n: int) -> list[str]:
    reserved = iter(range(n))
    return [LLAMA_3_NAMED.get(i) or f"reserved_special_token_{next(reserved)}" for i in range(n)]
