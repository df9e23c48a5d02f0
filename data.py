"""Text to token ids and back: tokenizers, the prompt, the eight commonsense tasks, training batches.

This file knows text and ids. It knows nothing of models and devices.

A record is what commonsense_170k.json of AGI-Edgerunners/LLM-Adapters holds:
    {"instruction": "Please answer ... true/false", "input": "", "output": "the correct answer is true", "answer": "true"}
"""

import base64
import functools
import json
import random
import re
import sys
import unicodedata
from array import array
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch
from torch import Tensor

IGNORE = -100  # a target that the loss skips; the value that F.cross_entropy skips by itself

# What counts as an answer, per task, as LLM-Adapters' scorer has it: answer4 and answer5 are legal even where three were
# offered. In the order of the paper's tables. To add a task, add a line.
TASKS = {
    "boolq": r"true|false",
    "piqa": r"solution[12]",
    "social_i_qa": r"answer[1-5]",
    "hellaswag": r"ending[1-4]",
    "winogrande": r"option[12]",
    "ARC-Easy": r"answer[1-5]",
    "ARC-Challenge": r"answer[1-5]",
    "openbookqa": r"answer[1-5]",
}


class DataError(ValueError):
    """Records or a tokenizer that cannot be used; the message says where, what, and what to do."""


# --- tokenizers ------------------------------------------------------------------------------------


class SentencePieceTokenizer:
    """LLaMA-1 and -2. The begin and end markers are explicit at each call; "<s>" in a text is just three letters."""

    def __init__(self, model: bytes):
        self.sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.bos, self.eos, self.vocab_size = (
            self.sp.bos_id(),
            self.sp.eos_id(),
            self.sp.vocab_size(),
        )

    def encode(self, text: str, *, bos: bool, eos: bool) -> list[int]:
        return [self.bos] * bos + self.sp.encode(text) + [self.eos] * eos

    def decode(self, ids: list[int]) -> str:
        return self.sp.decode(
            [i for i in ids if i < self.vocab_size]
        )  # a padded vocabulary has ids without a text


N_SPECIAL = 256  # ids above the ranks: <|begin_of_text|>, <|end_of_text|>, <|reserved_special_token_0|>, ...
NO_MERGE = sys.maxsize  # the rank of two neighbours that do not make a token


@functools.cache
def split_pattern() -> re.Pattern:
    r"""Llama-3's rule that cuts text into pieces before any merging, in the standard library's dialect.

    `re` has no \p{L} and \p{N} ([^\W\d_] is not \p{L}: it takes ² and Ⅷ), so both are listed from unicodedata; a
    character younger than this Python's Unicode tables counts as neither. Python's \s takes U+001C-1F too: not used.
    """
    runs: dict[str, list[list[int]]] = {"L": [], "N": []}  # [first, last] of each unbroken stretch
    for code in range(sys.maxunicode + 1):
        stretches = runs.get(unicodedata.category(chr(code))[0])
        if stretches and stretches[-1][1] == code - 1:
            stretches[-1][1] = code
        elif stretches is not None:
            stretches.append([code, code])
    L, N = (
        "".join(rf"\U{first:08x}-\U{last:08x}" for first, last in stretches)
        for stretches in runs.values()
    )
    S = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space
    return re.compile(
        "|".join(
            [
                "'(?:[sSſ]|[tTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])",  # (?i:'s|'t|...) by Unicode's folding, where ſ is an s
                rf"[^\r\n{L}{N}]?[{L}]+",
                rf"[{N}]{{1,3}}",
                rf" ?[^{S}{L}{N}]+[\r\n]*",
                rf"[{S}]*[\r\n]+",
                rf"[{S}]+(?![^{S}])",  # blanks, but for the last one before a word: that one belongs to the word
                rf"[{S}]+",
            ]
        )
    )


class Llama3Tokenizer:
    """Byte-level BPE from Meta's tokenizer.model, lines of `base64-token rank`, in the standard library.

    The special tokens are ids only: `<|end_of_text|>` written in a text is text, and special ids decode to nothing."""

    def __init__(self, model: bytes):
        self.ranks: dict[bytes, int] = {}
        for rank, line in enumerate(model.splitlines()):
            try:
                word, number = line.split()
                token, written = base64.b64decode(word, validate=True), int(number)
            except ValueError:  # too few or too many words, not base64, not a number
                raise ValueError(
                    f"line {rank + 1}: expected `base64-token rank`, found {line[:40]!r}"
                ) from None
            if written != rank or not token or token in self.ranks:
                raise ValueError(
                    f"line {rank + 1}: expected a new token of rank {rank}, "
                    f"found {token!r}, rank {written}"
                )
            self.ranks[token] = rank
        if missing := [byte for byte in range(256) if bytes([byte]) not in self.ranks]:
            raise ValueError(
                f"no line for the single byte 0x{missing[0]:02x} ({len(missing)} bytes are missing "
                f"from {len(self.ranks)} lines)"
            )
        self.tokens = list(self.ranks)  # id -> bytes: lines come in the order of their ranks
        self.bos, self.eos = len(self.tokens), len(self.tokens) + 1
        self.vocab_size = len(self.tokens) + N_SPECIAL
        # Words repeat: this answers 98% of a corpus's pieces. Bounded, for the corpus that is full of numbers and URLs.
        self._ids_of = functools.lru_cache(maxsize=2**17)(self._encode_piece)

    def encode(self, text: str, *, bos: bool, eos: bool) -> list[int]:
        """Raises UnicodeEncodeError, a ValueError, for a lone surrogate: no bytes stand for it."""
        text.encode()
        ids = [self.bos] * bos
        for piece in split_pattern().findall(text):  # every character lies in some piece
            ids += self._ids_of(piece)
        return ids + [self.eos] * eos

    def decode(self, ids: list[int]) -> str:
        """A character that the ids break off in the middle becomes U+FFFD."""
        return b"".join(self.tokens[i] for i in ids if i < len(self.tokens)).decode(
            errors="replace"
        )

    def _encode_piece(self, piece: str) -> list[int]:
        """Join the two neighbours that make the lowest-ranked token, the leftmost on ties, until none make one."""
        whole = piece.encode()
        if whole in self.ranks:  # merging would miss 588 words of Meta's file, " việc" among them
            return [self.ranks[whole]]
        parts = [whole[i : i + 1] for i in range(len(whole))]
        joined = [
            self.ranks.get(a + b, NO_MERGE) for a, b in zip(parts, parts[1:])
        ]  # [i]: of parts[i] + parts[i + 1]
        while joined and (lowest := min(joined)) != NO_MERGE:
            i = joined.index(lowest)
            parts[i : i + 2] = [self.tokens[lowest]]
            del joined[i]
            for j in (i - 1, i):  # the new part has new neighbours on both sides
                if 0 <= j < len(joined):
                    joined[j] = self.ranks.get(parts[j] + parts[j + 1], NO_MERGE)
        return [self.ranks[part] for part in parts]


def load_tokenizer(path: str | Path) -> SentencePieceTokenizer | Llama3Tokenizer:
    """The tokenizer.model in a folder, or that file. Raises DataError."""
    path = Path(path)
    if path.is_dir():
        path = path / "tokenizer.model"
    try:
        model = path.read_bytes()
    except OSError as e:
        raise DataError(
            f"{path}: {e.strerror}; a checkpoint folder needs its tokenizer.model"
        ) from None
    if not model:  # SentencePiece would take it for a vocabulary of 0 words
        raise DataError(f"{path}: is empty; download it again")
    try:  # Llama-3's file is lines of text, SentencePiece's begins with a byte that no base64 has
        tokenizer = (
            Llama3Tokenizer
            if re.match(rb"[A-Za-z0-9+/=]+ \d+\r?\n", model)
            else SentencePieceTokenizer
        )(model)
    except ValueError as e:
        raise DataError(f"{path}: {e}") from None
    except RuntimeError:
        raise DataError(
            f"{path}: neither a SentencePiece model nor Llama-3's ranks; download it again"
        ) from None
    if min(tokenizer.bos, tokenizer.eos) < 0:
        raise DataError(f"{path}: has no begin or no end token")
    return tokenizer


# --- prompt and answer -----------------------------------------------------------------------------

HEAD = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.{gap}\n\n{indent}### Instruction:\n{indent}"
)
INDENT = " " * 16


def format_prompt(example: dict, style: str = "clean", training: bool = False) -> str:
    """The text before the answer. Training and evaluation both call this: they must not drift apart.

    style "clean": the same bytes for both. style "dora": the bytes of NVlabs/DoRA and LLM-Adapters, whose indentation
    got into the text, and whose two scripts differ: `training` chooses which. (In theirs, the evaluation prompt ends in
    a token, sixteen spaces, that training never showed in that place.)
    """
    head, rest = _prompt_parts(example, style, training)
    return head + example["instruction"] + rest


def _prompt_parts(example: dict, style: str, training: bool) -> tuple[str, str]:
    """What stands before and after the instruction."""
    if style == "clean":
        context = f"\n\n### Input:\n{example['input']}" if example.get("input") else ""
        return HEAD.format(gap="", indent=""), f"{context}\n\n### Response:\n"
    if example.get("input"):
        raise DataError(
            '--prompt dora is known only for records with an empty "input"; use --prompt clean'
        )
    head = HEAD.format(gap="  " if training else " ", indent=INDENT)
    return head, f"\n{INDENT if training else ''}\n{INDENT}### Response:\n{INDENT}"


def extract_answer(task: str, text: str) -> str:
    """The first legal answer after "### Response:" (or in the whole text where that is absent); "" if there is none.

    An answer counts wherever it stands and in exactly this spelling: the rule of LLM-Adapters' scorer.
    """
    parts = text.split("### Response:")
    match = re.search(TASKS[task], parts[1] if len(parts) > 1 else text)
    return match.group() if match else ""


def offered_answers(example: dict) -> set[str]:
    """What the instruction's last line, "Answer format: a/b", allows; empty where there is no such line."""
    match = re.search(r"Answer format: (\S+)\s*$", example["instruction"])
    return set(match[1].split("/")) if match else set()


# --- records ---------------------------------------------------------------------------------------


def load_examples(path: str | Path, task: str | None = None) -> list[dict]:
    """Read and check a JSON list of records. Raises DataError naming file, record and field.

    task: a key of TASKS; each record's answer must then be legal for it.
    """
    path = Path(path)
    try:
        examples = json.loads(
            path.read_bytes().decode().removeprefix("\ufeff")
        )  # "utf-8-sig" would count bytes from behind the BOM
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file; ./weights_download.sh data fetches the paper's records"
        ) from None
    except OSError as e:
        raise DataError(f"{path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: not UTF-8 at byte {e.start}") from None
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path}: not valid JSON ({e})") from None
    if not isinstance(examples, list) or not examples:
        raise DataError(f"{path}: expected a non-empty JSON list of records")
    for number, example in enumerate(examples, 1):
        problem = _problem(example, task)
        if problem:
            raise DataError(f"{path}: record {number}: {problem}")
    return examples


def _problem(example: object, task: str | None) -> str | None:
    if not isinstance(example, dict):
        return f"expected an object, found {type(example).__name__}"
    for field in ("instruction", "output", "answer", "input"):
        value = example.get(field, "" if field == "input" else None)
        if value is None and field not in example:
            return f'no "{field}"'
        if not isinstance(value, str):
            return f'"{field}" is {type(value).__name__}, expected text'
        if field != "input" and not value.strip():
            return f'"{field}" is empty'
        if re.search("[\ud800-\udfff]", value):
            return f'"{field}" holds half of a surrogate pair, which no tokenizer can encode'
    if task and not re.fullmatch(TASKS[task], example["answer"]):
        return f'"answer" is {example["answer"]!r}, which is not legal for {task} ({TASKS[task]})'
    return None


def find_test_file(folder: str | Path, task: str) -> Path | None:
    """<task>/test.json, LLM-Adapters' layout, or <task>.json; None where there is neither."""
    for path in (Path(folder) / task / "test.json", Path(folder) / f"{task}.json"):
        if path.is_file():
            return path
    return None


# --- training batches ------------------------------------------------------------------------------


class Record(NamedTuple):
    ids: array  # BOS ... EOS, at most max_len of them
    split: int  # ids[split:] are learned: 1 for the whole text, the prompt's length for the answer alone
    number: int  # in the file, from 1


def encode_record(
    example: dict, tokenizer, max_len: int, loss: str = "all", style: str = "clean", number: int = 1
) -> tuple[Record | None, int]:
    """(record, tokens cut). Prompt and output are encoded together, as the model will meet them when it answers.

    The answer is never cut: a record that is too long loses tokens from the left of its instruction, and is dropped
    (None) if that is not enough. Raises DataError where the prompt's ids are not a prefix of the whole's: a split
    between prompt and answer would then be a lie.
    """
    head, rest = _prompt_parts(example, style, training=True)
    prompt = head + example["instruction"] + rest
    ids = tokenizer.encode(prompt + example["output"], bos=True, eos=True)
    prompt_ids = tokenizer.encode(prompt, bos=True, eos=False)
    if ids[: len(prompt_ids)] != prompt_ids and style == "clean":
        raise DataError(
            f"record {number}: the tokens of the prompt are not a prefix of the tokens of prompt and output"
        )
    cut = max(0, len(ids) - max_len)
    split = len(prompt_ids)
    if cut:
        begin = _shared(ids, tokenizer.encode(head, bos=True, eos=False))
        end = _shared(ids, tokenizer.encode(head + example["instruction"], bos=True, eos=False))
        if cut >= end - begin:
            return None, cut
        del ids[begin : begin + cut]
        split -= cut
    return Record(array("i", ids), split if loss == "answer" else 1, number), cut


def _shared(a: list[int], b: list[int]) -> int:
    """How many leading ids agree."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def encode_records(
    examples: list[dict],
    tokenizer,
    max_len: int,
    loss: str = "all",
    style: str = "clean",
    bar: Callable[[Iterable], Iterable] = iter,
) -> tuple[list[Record], int, int]:
    """(records, how many lost tokens, how many were dropped). Raises DataError when none is left."""
    records, cut, dropped = [], 0, 0
    for number, example in enumerate(bar(examples), 1):
        record, tokens = encode_record(example, tokenizer, max_len, loss, style, number)
        if record is None:
            dropped += 1
        else:
            records.append(record)
            cut += tokens > 0
    if not records:
        raise DataError(
            f"all {dropped} records are longer than --max-len {max_len} even without their instruction"
        )
    return records, cut, dropped


def split_validation(records: list, val_size: int) -> tuple[list, list]:
    """(training, validation). The split is the same for every training seed: runs are then comparable."""
    if val_size >= len(records):
        raise DataError(
            f"--val-size {val_size} leaves nothing of {len(records)} records to train on"
        )
    held = set(random.Random(42).sample(range(len(records)), val_size))
    return ([r for i, r in enumerate(records) if i not in held], [records[i] for i in sorted(held)])


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of n records in one epoch: a function of (seed, epoch) alone, so that a run can resume anywhere."""
    order = list(range(n))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


class Batch(NamedTuple):
    """Rows laid end to end, without padding. targets[n] is the token to predict after ids[n], or IGNORE."""

    ids: Tensor  # (N,)
    targets: Tensor  # (N,)
    lengths: list[int]

    @property
    def learned(self) -> int:
        """How many targets the loss counts."""
        return int((self.targets != IGNORE).sum())


def collate(records: list[Record]) -> Batch:
    ids, targets = array("i"), array("i")
    for r in records:
        ids.extend(r.ids[:-1])
        targets.extend([IGNORE] * (r.split - 1))
        targets.extend(r.ids[r.split :])
    as_tensor = lambda a: torch.tensor(a, dtype=torch.long)
    return Batch(as_tensor(ids), as_tensor(targets), [len(r.ids) - 1 for r in records])
