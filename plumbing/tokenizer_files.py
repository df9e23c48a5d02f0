"""Tokenizer files: which one a folder has, what it holds, and whether data.py gives the same ids.

Byte-level BPE comes in two files: Meta's tokenizer.model (lines of `base64-token rank`) and Hugging
Face's tokenizer.json. Both become a `BPE`. Whatever in a tokenizer.json would change an id, and is
not done in data.py, is refused by name. This file knows formats; the algorithm is in data.py.
"""

import base64
import json
from pathlib import Path
from typing import NamedTuple

from plumbing.hf_config import first_id
from plumbing.hf_files import TOKENIZER_FILES, CheckpointError, read_json, refuse_pointer

N_SPECIAL = 256  # ids above Meta's ranks: <|begin_of_text|>, <|end_of_text|>, reserved ones, ...


class BPE(NamedTuple):
    """A byte-level BPE. Special tokens are in none of its tables: no text becomes one."""

    tokens: dict[bytes, int]
    merges: dict[tuple[bytes, bytes], int] | None  # rank of a pair; None: the id of what it makes
    whole_first: bool  # a piece that is a token is that token, whatever merging would make of it
    split: str  # key of data.SPLITS
    added: dict[str, int]  # tokens that are found in a text before it is split
    bos: int
    eos: int
    vocab_size: int


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).exists() for name in TOKENIZER_FILES)


def find_tokenizer_file(path: Path) -> Path:
    """The tokenizer of a folder, or `path` itself where it is a file. Raises CheckpointError."""
    if path.is_dir():
        there = [path / name for name in TOKENIZER_FILES if (path / name).is_file()]
        if not there:
            raise CheckpointError(f"{path}: no tokenizer in it: no {' or '.join(TOKENIZER_FILES)}")
        path = there[0]
    try:
        refuse_pointer(path)
        if not path.stat().st_size:  # SentencePiece would take it for a vocabulary of 0 words
            raise CheckpointError(f"{path}: is empty; download it again")
    except OSError as e:
        raise CheckpointError(f"{path}: {str(e.strerror).lower()}") from None
    return path


# --- Meta's ranks ---------------------------------------------------------------------------------


def read_ranks(path: Path) -> BPE:
    """Llama-3's tokenizer.model. Raises CheckpointError."""
    ranks: dict[bytes, int] = {}
    for rank, line in enumerate(path.read_bytes().splitlines()):
        where = f"{path}: line {rank + 1}"
        try:
            word, number = line.split()
            token, written = base64.b64decode(word, validate=True), int(number)
        except ValueError:  # too few or too many words, not base64, not a number
            raise CheckpointError(
                f"{where}: expected `base64-token rank`, found {line[:40]!r}"
            ) from None
        if written != rank or not token or token in ranks:
            raise CheckpointError(
                f"{where}: expected a new token of rank {rank}, found {token!r}, rank {written}"
            )
        ranks[token] = rank
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise CheckpointError(
            f"{path}: no line for the single byte 0x{missing[0]:02x} ({len(missing)} bytes are "
            f"missing from {len(ranks)} lines)"
        )
    n = len(ranks)
    return BPE(ranks, None, True, "llama-3", {}, n, n + 1, n + N_SPECIAL)


# --- Hugging Face's tokenizer.json ----------------------------------------------------------------

# A pre-tokenizer as tokenizer.json spells it, without the keys that change no id -> key of
# data.SPLITS
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
LLAMA_3 = {
    "type": "Split",
    "pattern": {
        "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    },
    "behavior": "Isolated",
    "invert": False,
}
PRE_TOKENIZERS = {
    "gpt-2": [BYTES],
    "smollm2": [DIGITS, BYTES],
    "llama-3": [LLAMA_3, BYTES | {"use_regex": False}],
}
KNOWN = (
    "version truncation padding added_tokens normalizer pre_tokenizer post_processor decoder model"
)
KNOWN_OF_MODEL = (
    "type dropout unk_token continuing_subword_prefix end_of_word_suffix fuse_unk byte_fallback "
    "ignore_merges vocab merges"
)
NEVER_IN_UTF_8 = {0xC0, 0xC1, *range(0xF5, 0x100)}


def byte_alphabet() -> dict[str, int]:
    """The letter for each byte in a tokenizer.json: itself where it prints, else from U+0100 on."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {
        chr(0x100 + i): byte for i, byte in enumerate(others)
    }


BYTE_OF = byte_alphabet()


def as_bytes(letters: str) -> bytes | None:
    """None where a letter stands for no byte: then no text can become this token by merging."""
    try:
        return bytes(map(BYTE_OF.__getitem__, letters))
    except KeyError:
        return None


def read_tokenizer_json(path: Path) -> BPE:
    """Raises CheckpointError, naming whatever would change an id and is not done in data.py."""
    file = read_json(path)
    model = file.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f'{path}: no "model"')
    refuse_unknown(path, file, model)
    added, special = read_added(path, file.get("added_tokens") or [])
    vocab = read_vocab(path, model, added | special)
    tokens = {}
    for letters, i in vocab.items():
        token = as_bytes(letters)
        if token and letters not in special:
            tokens[token] = i
    missing = set(range(256)) - NEVER_IN_UTF_8 - {token[0] for token in tokens if len(token) == 1}
    if missing and model.get("unk_token") is not None:  # without one, the library drops such bytes
        raise CheckpointError(
            f'{path}: "unk_token" is {model["unk_token"]!r}, and the byte 0x{min(missing):02x} '
            "has no token: unknown tokens are not supported"
        )
    ids = vocab | added | special
    bos, eos = read_ends(path, file.get("post_processor"), ids)
    return BPE(
        tokens=tokens,
        merges=read_merges(path, model, tokens),
        whole_first=bool(model.get("ignore_merges")),
        split=read_split(path, file.get("pre_tokenizer")),
        added=added,
        bos=bos,
        eos=eos,
        vocab_size=max(ids.values()) + 1,
    )


def refuse_unknown(path: Path, file: dict, model: dict) -> None:
    kind = model.get("type", "BPE" if "merges" in model else None)
    metaspace = '"Metaspace"' in json.dumps([file.get("pre_tokenizer"), file.get("decoder")])
    if kind == "Unigram" or model.get("byte_fallback") or metaspace:
        raise CheckpointError(
            f"{path}: SentencePiece's kind of tokenizer; fetch tokenizer.model from where this "
            "file is from, and put it beside it"
        )
    decoder = file.get("decoder") or {"type": "ByteLevel"}
    for key, value, supported in [
        ("truncation", file.get("truncation"), [None]),
        ("padding", file.get("padding"), [None]),
        ("normalizer", file.get("normalizer"), [None]),
        ("decoder", decoder.get("type") if isinstance(decoder, dict) else decoder, ["ByteLevel"]),
        ("model type", kind, ["BPE"]),
        ("dropout", model.get("dropout"), [None, 0.0]),
        ("continuing_subword_prefix", model.get("continuing_subword_prefix"), [None, ""]),
        ("end_of_word_suffix", model.get("end_of_word_suffix"), [None, ""]),
        ("fuse_unk", model.get("fuse_unk"), [None, False]),
        *((key, file[key], [None]) for key in sorted(file.keys() - set(KNOWN.split()))),
        *((key, model[key], [None]) for key in sorted(model.keys() - set(KNOWN_OF_MODEL.split()))),
    ]:
        if value not in supported:
            raise CheckpointError(f'{path}: "{key}" is {short(value)}, which is not supported')


def short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:200] + "..."


def read_added(path: Path, entries: object) -> tuple[dict[str, int], dict[str, int]]:
    """(tokens found in a text, special tokens), each {content: id}.

    The library finds special tokens in a text too; here they are ids alone (data.BPETokenizer).
    """
    found: dict[str, int] = {}
    special: dict[str, int] = {}
    when = set()
    if not isinstance(entries, list):
        raise CheckpointError(f'{path}: "added_tokens" must be a list')
    for entry in entries:
        try:
            content, i, is_special = entry["content"], entry["id"], entry["special"]
            if not content.encode() or type(i) is not int or i < 0:
                raise ValueError
        except (KeyError, TypeError, ValueError, AttributeError):
            raise CheckpointError(f'{path}: "added_tokens" holds {short(entry)}') from None
        if is_special:
            special[content] = i
            continue
        for key in ("single_word", "lstrip", "rstrip"):
            if entry.get(key):
                raise CheckpointError(f'{path}: "{key}" of the added token {content!r} is true')
        when.add(bool(entry.get("normalized")))
        found[content] = i
    if len(when) > 1:
        raise CheckpointError(
            f'{path}: "normalized" differs among the added tokens, which is not supported'
        )
    return found, special


def read_vocab(path: Path, model: dict, added: dict[str, int]) -> dict[str, int]:
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab:
        raise CheckpointError(f'{path}: no "vocab"')
    ids = {i for i in vocab.values() if type(i) is int and i >= 0}
    if len(ids) != len(vocab):
        raise CheckpointError(f'{path}: "vocab" must give each token an id of its own')
    for content, i in added.items():
        if vocab.get(content, i) != i or (content not in vocab and i in ids):
            raise CheckpointError(f'{path}: the added token {content!r} has another id in "vocab"')
    return vocab


def read_merges(path: Path, model: dict, tokens: dict[bytes, int]) -> dict[tuple, int]:
    """{(left, right): rank}. A pair is written "left right", since 0.20 ["left", "right"]."""
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise CheckpointError(f'{path}: no "merges"')
    ranks = {}
    for rank, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        try:
            left, right = map(as_bytes, pair)
            known = left in tokens and right in tokens and left + right in tokens
        except (TypeError, ValueError):
            known = False
        if not known:
            raise CheckpointError(
                f"{path}: merge {rank + 1}, {short(merge)}, is not of two tokens that make a third"
            )
        ranks[left, right] = rank
    return ranks


def read_split(path: Path, stated: object) -> str:
    """The key of data.SPLITS for a "pre_tokenizer"."""
    steps = stated["pretokenizers"] if is_a(stated, "Sequence", "pretokenizers") else [stated]
    seen = []
    for step in steps:
        if is_a(step, "ByteLevel"):
            step = {"use_regex": True} | step
            step.pop("trim_offsets", None)  # about places in the text, not about ids
        seen.append(step)
    for rule, known in PRE_TOKENIZERS.items():
        if seen == known:
            return rule
    raise CheckpointError(
        f'{path}: "pre_tokenizer" is {short(stated)}; only those of GPT-2, SmolLM2 and Llama-3 '
        "are supported"
    )


def is_a(stated: object, kind: str, key: str = "type") -> bool:
    """Whether a part of the file is of this type, and `key` a list where it is another key."""
    if not isinstance(stated, dict) or stated.get("type") != kind:
        return False
    return key == "type" or isinstance(stated.get(key), list)


def read_ends(path: Path, post_processor: object, ids: dict[str, int]) -> tuple[int, int]:
    """(bos, eos): the post-processor's template's, else config.json's, else tokenizer_config's."""
    in_template = dict(zip(("bos", "eos"), read_template(path, post_processor)))
    config, other = (
        read_json(path.parent / name) if (path.parent / name).is_file() else {}
        for name in ("config.json", "tokenizer_config.json")
    )
    ends = []
    for end in ("bos", "eos"):
        named = other.get(f"{end}_token")
        named = named.get("content") if isinstance(named, dict) else named
        in_files = [
            in_template[end],
            first_id(config.get(f"{end}_token_id")),
            ids.get(named) if isinstance(named, str) else None,
        ]
        stated = [i for i in in_files if i is not None]
        if not stated or stated[0] not in ids.values():
            raise CheckpointError(
                f"{path}: no {end} token: neither its post_processor nor {end}_token_id in the "
                f"config.json beside it names one that it has"
            )
        ends.append(stated[0])
    return ends[0], ends[1]


def read_template(path: Path, stated: object) -> tuple[int | None, int | None]:
    """What a "post_processor" puts before and behind a text."""
    steps = stated["processors"] if is_a(stated, "Sequence", "processors") else [stated]
    ends: tuple[int | None, int | None] = (None, None)
    for step in steps:
        if step is None or is_a(step, "ByteLevel"):  # about places in the text, not about ids
            continue
        try:
            if step["type"] != "TemplateProcessing" or ends != (None, None):
                raise ValueError
            parts = [next(iter(part.items())) for part in step["single"]]
            kinds = [kind for kind, _ in parts]
            middle = kinds.index("Sequence")
            if kinds.count("Sequence") > 1 or middle > 1 or len(kinds) - middle > 2:
                raise ValueError
            around = []
            for _, part in parts[:middle] + parts[middle + 1 :]:
                (i,) = step["special_tokens"][part["id"]]["ids"]
                around.append(i)
            ends = (around[0] if middle else None, around[-1] if kinds[-1] != "Sequence" else None)
        except (KeyError, IndexError, TypeError, ValueError, StopIteration, AttributeError):
            raise CheckpointError(
                f'{path}: "post_processor" has {short(step)}; only a begin token before a text '
                "and an end token behind it are supported"
            ) from None
    return ends
