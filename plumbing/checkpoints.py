"""The base checkpoints that have a name: where each is from, and what it decides.

The rows stand in checkpoints.txt, which weights_download.sh reads too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent  # rora.py's folder
TABLE = Path(__file__).with_suffix(".txt")


@dataclass(frozen=True)
class Checkpoint:
    """What a base model decides."""

    hub: str | None = None  # repository and
    commit: str | None = None  # its first digits at least
    lr: Mapping[str, float] = field(default_factory=dict)  # where it is not the method's own rate
    loss: str = "all"
    warmup: int = 100
    alpha: float = 64
    epochs: int = 3
    val_size: int = 120
    data: str = "data/commonsense_170k.json"  # here, or beside rora.py
    tests: str = "data"  # folder of <task>/test.json
    cuda_dtype: str = "bf16"
    cpu_dtype: str = "fp32"


def read_rows(text: str) -> dict[str, Checkpoint]:
    """{name: row}. A line that begins with a blank goes on with the row above."""
    rows: list[list[str]] = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        if not line[0].isspace():
            rows.append([])
        rows[-1] += line.split()
    return {name: read_row(hub, commit, words) for name, hub, commit, _, *words in rows}


def read_row(hub: str, commit: str, words: list[str]) -> Checkpoint:
    kinds = {f.name: f.type for f in fields(Checkpoint)}
    decided: dict = {}
    lr = {}
    for key, value in (word.split("=") for word in words):
        if key.startswith("lr."):
            lr[key.removeprefix("lr.")] = float(value)
        else:
            decided[key] = kinds[key](value)
    on_hub = {} if hub == "-" else {"hub": hub, "commit": commit}
    return Checkpoint(**on_hub, **decided, lr=lr)


PAPER = Checkpoint()  # for folders that have no row
CHECKPOINTS = read_rows(TABLE.read_text())


def name_of(base: str) -> str | None:
    """The row that a saved adapter's base means: a name, or the repository that the row is from."""
    for name, row in CHECKPOINTS.items():
        if base in (name, row.hub):
            return name
    return None
