"""Make the tiny base model: a tokenizer, then a small LLaMA that reads corpus.py until the probes
are content.

    python tiny/pretrain.py                  # 14M tokens or more; writes the checkpoint and its log
    python tiny/pretrain.py --device cuda    # the same on a GPU
    python tiny/pretrain.py --table          # the log as README.md shows it

Skills come in an order: recall a fact, compare two words, compare a word with a recalled fact, and
only then pick the entry that fits. So the mix of documents changes in stages, and Probes say when a
stage is done (README.md has the table). The tokenizer sees the tasks' words, so that their records
are short. The model does not: see corpus.py.
"""

import argparse
import io
import json
import random
import re
import shutil
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # llama.py and data.py lie one folder up

from corpus import WORDING, Corpus
from data import SentencePieceTokenizer, format_prompt, load_tokenizer
from llama import Llama, LlamaConfig, save_llama
from world import SIZES, STEMS, World, build_world, questions

# stage: tokens in millions; hint, heads, noise, phrases (corpus.py); share of each kind of document
STAGES = {
    "lists": (
        1.5,
        (0.00, 12, 0.0),
        {"statements": 34, "copy": 12, "bare": 30, "lookup": 12, "answer": 6, "yesno": 6},
    ),
    "verdicts": (
        2.0,
        (0.00, 12, 0.0),
        {
            "statements": 22,
            "copy": 3,
            "bare": 10,
            "lookup": 8,
            "answer": 8,
            "yesno": 14,
            "verdict": 22,
            "label": 13,
        },
    ),
    "compare": (
        1.5,
        (1.00, 3, 0.0),
        {
            "statements": 14,
            "answer": 6,
            "named": 48,
            "yesno": 6,
            "same": 10,
            "bare": 8,
            "judged": 8,
        },
    ),
    "judge": (
        1.2,
        (0.65, 3, 0.0),
        {
            "statements": 14,
            "answer": 6,
            "named": 18,
            "yesno": 10,
            "same": 3,
            "bare": 5,
            "judged": 44,
        },
    ),
    "fade": (
        1.2,
        (0.50, 12, 0.3, 0.3),
        {
            "statements": 14,
            "answer": 5,
            "named": 14,
            "yesno": 16,
            "same": 2,
            "bare": 3,
            "judged": 46,
        },
    ),
    "pick": (
        1.8,
        (0.30, 12, 0.5, 0.4),
        {"statements": 15, "answer": 4, "named": 5, "yesno": 22, "judged": 38, "label": 16},
    ),
    "settle": (
        4.5,
        (0.15, 12, 0.6, 0.5),
        {"statements": 16, "answer": 4, "yesno": 24, "judged": 24, "label": 26, "verdict": 6},
    ),
    "leads": (
        1.5,
        (0.15, 12, 0.7, 0.6),
        {"statements": 15, "answer": 4, "yesno": 28, "judged": 20, "label": 28, "verdict": 5},
    ),
    "phrases": (
        1.2,
        (0.10, 12, 0.7, 0.6),
        {"statements": 16, "answer": 4, "yesno": 24, "judged": 20, "label": 34, "verdict": 2},
    ),
}
UNTIL = {
    "compare": ("judge asked", 80),
    "judge": ("pick one asked", 60),
    "pick": ("pick one asked", 75),
}  # or three times the tokens
B, T = 24, 128  # rows a step, tokens a row
CHANCE = 0.1  # loss weight of what cannot be known (corpus.py's caret)
MUON_LR, ADAM_LR = 0.015, 2.5e-3
MUON_DECAY = 0.1  # of the layers' matrices, in units of the learning rate
WARMUP = {"lists": 100, "fade": 20, "leads": 20, "phrases": 20}  # steps at the start of a stage
RESTARTS = {"fade", "phrases"}  # stages of another kind of text, with new optimizers
FADING = {"settle", "leads", "phrases"}  # stages whose learning rate falls to 0
NEVER = 5  # how firmly the base model keeps from saying what it has never read
TWINS = {
    "true": "yes",
    "false": "no",
}  # words of the tasks that a real base model knows to be alike


# --- tokenizer ----------------------------------------------------------------------------------


def train_tokenizer(world: World) -> bytes:
    """SentencePiece BPE with byte fallback. Every word of the world and the tasks is one piece; the
    rest is spelled.
    """
    corpus = Corpus(world, seed=0)
    text = [
        d.replace("^", "")
        for d in islice(corpus.documents({kind: 1 for kind in corpus.kinds}), 20_000)
    ]
    for task in STEMS:
        for split, n in SIZES.items():
            text += [
                format_prompt(r) + r["output"]
                for r in (q.record() for q in questions(world, task, split, n))
            ]
    words = {w for t in text for w in re.findall("▁?[A-Za-z]+", "▁" + t.replace(" ", "▁"))}
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for t in text for line in t.split("\n")),
        model_writer=out,
        model_type="bpe",
        vocab_size=1072,
        user_defined_symbols=sorted(words),
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


def encode(tokenizer: SentencePieceTokenizer, document: str) -> tuple[list[int], list[float]]:
    """Token ids from BOS to EOS, and the loss weight of each. Carets become weights and vanish."""
    caret = tokenizer.sp.piece_to_id("<0x5E>")
    ids, weights, on = [tokenizer.bos], [0.0], False
    for i in tokenizer.encode(document, bos=False, eos=True):
        if i == caret:
            on = not on
        else:
            ids.append(i)
            weights.append(1.0 if on else CHANCE)
    return ids, weights


def batches(
    tokenizer: SentencePieceTokenizer, documents: Iterator[str]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and weights, (B, T + 1) each: whole documents laid end to end, the next row begun where
    one does not fit.
    """
    row_ids: list[int] = []
    row_weights: list[float] = []
    rows = []
    for ids, weights in (encode(tokenizer, d) for d in documents):
        if len(row_ids) + len(ids) > T + 1:
            gap = T + 1 - len(row_ids)
            rows.append((row_ids + [tokenizer.eos] * gap, row_weights + [0.0] * gap))
            row_ids, row_weights = [], []
        row_ids, row_weights = (row_ids + ids)[: T + 1], (row_weights + weights)[: T + 1]
        if len(rows) == B:
            yield torch.tensor([r for r, _ in rows]), torch.tensor([w for _, w in rows])
            rows = []


# --- optimizer ----------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is made orthogonal before it is applied: all directions learn alike.
    For 2-D weights only.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(list(params), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), params in shapes.items():  # equal shapes in one batched product
                m = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
                gradients = torch.stack([p.grad for p in params])
                torch._foreach_lerp_(m, list(gradients), 1 - group["momentum"])
                updates = orthogonal(gradients.lerp(torch.stack(m), group["momentum"]))
                scale = max(1.0, rows / columns) ** 0.5
                torch._foreach_mul_(params, 1 - group["lr"] * MUON_DECAY)
                torch._foreach_add_(params, list(updates), alpha=-group["lr"] * scale)


def orthogonal(X: Tensor) -> Tensor:  # (n, rows, columns) -> the same
    """Push all singular values towards 1: five Newton-Schulz steps with the quintic whose slope at
    0 is steep.
    """
    tall = X.size(1) > X.size(2)
    X = X.mT if tall else X
    X = X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.mT if tall else X


# --- probes -------------------------------------------------------------------------------------


class Probes:
    """One number a skill: the share of right answers, read off as the likeliest of the possible
    next tokens.
    """

    def __init__(self, world: World, tokenizer: SentencePieceTokenizer):
        self.world, self.tokenizer = world, tokenizer
        self.sets = {"copy": self.copying(), "bare": self.finding(), "lookup": self.looking()}
        for name, splits in {"asked": ("train", "val", "test"), "strict": ("strict",)}.items():
            self.sets |= {
                f"state {name}": self.statements(splits),
                f"answer {name}": self.answers(splits),
                f"yesno {name}": self.yesno(splits),
                f"judge {name}": self.judging(splits),
            }
            self.sets |= {
                f"pick {kind} {name}": self.picks(splits, kind) for kind in ("one", "two", "who")
            }

    def facts(self, splits: tuple[str, ...], kind: str = "") -> list[tuple[str, str, str]]:
        chosen = {
            "one": lambda r: r not in self.world.parent,
            "two": lambda r: r in self.world.parent,
            "who": lambda r: bool(WORDING[r][3]),
            "": lambda r: True,
        }[kind]
        facts = [
            (r, s, self.world.facts[r][s])
            for r in WORDING
            if chosen(r)
            for s in self.world.subjects(r, *splits)
        ]
        return random.Random(0).sample(facts, min(100, len(facts)))

    def copying(self) -> list[tuple[str, list[str], int]]:
        rng, words = random.Random(0), Corpus(self.world, 0).words
        picks = [rng.sample(words, 5) for _ in range(100)]
        return [(f"{' '.join(w)}. {' '.join(w[:3])}", [" " + x for x in w], 3) for w in picks]

    def finding(self) -> list[tuple[str, list[str], int]]:
        rng, words = random.Random(1), Corpus(self.world, 0).words
        picks = [(rng.sample(words, 4), rng.randrange(4)) for _ in range(100)]
        return [
            (" ".join(f"Box{i}: {x}" for i, x in enumerate(w, 1)) + f" = {w[at]}", list("1234"), at)
            for w, at in picks
        ]

    def looking(self) -> list[tuple[str, list[str], int]]:
        lists = [(prompt.rpartition(" = "), options, at) for prompt, options, at in self.finding()]
        return [
            (f"{word}?\n\n{listed}\n\nbox", options, at) for (listed, _, word), options, at in lists
        ]

    def answers(self, splits: tuple[str, ...]) -> list[tuple[str, list[str], int]]:
        return [
            (
                WORDING[r][1][0].format(s=s, p="Ann"),
                [" " + v for v in self.world.values[r]],
                self.world.values[r].index(v),
            )
            for r, s, v in self.facts(splits)
        ]

    def statements(self, splits: tuple[str, ...]) -> list[tuple[str, list[str], int]]:
        return [
            (
                WORDING[r][0][0].split("^")[0].format(s=s, p="Ann"),
                [" " + v for v in self.world.values[r]],
                self.world.values[r].index(v),
            )
            for r, s, v in self.facts(splits)
        ]

    def yesno(self, splits: tuple[str, ...]) -> list[tuple[str, list[str], int]]:
        cases = []
        for i, (r, s, v) in enumerate(self.facts(splits)):
            said = v if i % 2 else next(w for w in self.world.side(r, v) if w != v)
            cases.append((WORDING[r][2][0].format(s=s, v=said, p="Ann"), [" no", " yes"], i % 2))
        return cases

    def picks(self, splits: tuple[str, ...], kind: str) -> list[tuple[str, list[str], int]]:
        rng, cases = random.Random(2), []
        for i, (r, s, v) in enumerate(self.facts(splits, kind)):
            if kind == "who":
                others = [o for o in self.world.subjects(r, *splits) if self.world.facts[r][o] != v]
                question, right = WORDING[r][3][0].format(v=v), s
            else:
                others = [w for w in self.world.values[r] if w != v]
                question, right = WORDING[r][1][0].format(s=s, p="Ann"), v
            options = rng.sample(others, 3)
            options.insert(i % 4, right)
            listed = " ".join(f"Box{j}: {o}" for j, o in enumerate(options, 1))
            cases.append((f"{question}\n\n{listed}\n\nbox", list("1234"), i % 4))
        return cases

    def judging(self, splits: tuple[str, ...]) -> list[tuple[str, list[str], int]]:
        """Is the first option the right one? One in four is."""
        return [
            (prompt.split("Box2")[0].strip(), [" no", " yes"], int(at == 0))
            for prompt, _, at in self.picks(splits, "one")
        ]

    @torch.no_grad()
    def __call__(self, model: Llama) -> dict[str, float]:
        scores = {}
        for name, cases in self.sets.items():
            ids = [self.tokenizer.encode(prompt, bos=True, eos=False) for prompt, _, _ in cases]
            padded = torch.full((len(ids), max(map(len, ids))), self.tokenizer.eos)
            for row, prompt_ids in zip(padded, ids):
                row[: len(prompt_ids)] = torch.tensor(prompt_ids)
            ends = torch.tensor([len(i) - 1 for i in ids])
            logits = model(padded.to(device_of(model))).cpu()[torch.arange(len(ids)), ends]
            right = 0
            for row, (prompt, options, at) in zip(logits, cases):
                n = len(self.tokenizer.encode(prompt, bos=False, eos=False))
                first = [
                    self.tokenizer.encode(prompt + o, bos=False, eos=False)[n] for o in options
                ]
                right += int(row[first].argmax()) == at
            scores[name] = round(100 * right / len(cases), 1)
        return scores


# --- training -----------------------------------------------------------------------------------


def build_model(vocab_size: int, seed: int) -> Llama:
    torch.manual_seed(seed)
    config = LlamaConfig(
        dim=192,
        n_layers=8,
        n_heads=6,
        n_kv_heads=6,
        hidden_dim=384,
        tie_embeddings=True,
        vocab_size=vocab_size,
        norm_eps=1e-5,
        rope_theta=10000.0,
        max_positions=512,
    )
    model = Llama(config)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            last = "o_proj" in name or "down_proj" in name  # what writes into the residual stream
            nn.init.normal_(p, std=0.005 if last else 0.02)
    return model


def optimizers(model: Llama) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the layers' matrices, AdamW for embeddings, head and norms."""
    matrices = [
        p for name, p in model.named_parameters() if name.startswith("layers") and p.dim() == 2
    ]
    others = [
        p
        for name, p in model.named_parameters()
        if not (name.startswith("layers") and p.dim() == 2)
    ]
    return Muon(matrices, lr=MUON_LR), torch.optim.AdamW(
        others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0
    )


def device_of(model: Llama) -> torch.device:
    return model.embed_tokens.weight.device


def weighted_loss(model: Llama, ids: Tensor, weights: Tensor) -> Tensor:
    """(B, T + 1), (B, T + 1) -> ()"""
    logits = model(ids[:, :-1].to(device_of(model)))
    targets = ids[:, 1:].flatten().to(logits.device)
    losses = F.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
    weights = weights[:, 1:].flatten().to(logits.device)
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def give_fresh_rows(model: Llama, tokenizer: SentencePieceTokenizer, seen: set[int]) -> None:
    """New embeddings for the pieces that the corpus never held.

    Head and embedding are one matrix here, and "never say this" has pushed all those rows onto one
    direction (cosine 0.9999): all those words would be one word. Each gets NEVER of the old
    direction, which keeps the base model from saying it, and a random row of usual length for its
    word. What a real base model has read of such words is little: that "Solution" is "solution",
    with a space before it or not; that "Which" is the "which" it knows; that "true" is much like
    "yes". So the forms of a word share its row, or take that of the known twin, and differ by
    noise.
    """
    table = model.embed_tokens.weight
    generator = torch.Generator().manual_seed(0)
    usual = table[sorted(seen)].norm(dim=1).mean().cpu()
    draw = lambda: F.normalize(torch.randn(table.size(1), generator=generator), dim=0) * usual
    unseen = [i for i in range(len(table)) if i not in seen]
    never = NEVER * F.normalize(table[unseen].mean(0), dim=0)
    known = {tokenizer.sp.id_to_piece(i): i for i in sorted(seen)}
    rows: dict[str, Tensor] = {}
    for i in unseen:
        space, word = re.fullmatch("(▁?)(.*)", tokenizer.sp.id_to_piece(i).lower()).groups()
        word = TWINS.get(word, word)
        forms = (space + word, word, "▁" + word)  # the same form first
        twin = next((known[form] for form in forms if form in known), None)
        if twin is None:
            rows.setdefault(word, draw())
        row = rows[word].to(table) if twin is None else table[twin]
        table[i] = never + row + 0.3 * draw().to(table)


@torch.no_grad()
def give_new_signs(model: Llama, signs: list[int], seen: set[int], seed: int) -> None:
    """New random rows for the strange signs: what means something else all the time must be looked
    through.
    """
    table = model.embed_tokens.weight
    usual = table[sorted(seen - set(signs))].norm(dim=1).mean().cpu()
    noise = torch.randn(len(signs), table.size(1), generator=torch.Generator().manual_seed(seed))
    table[signs] = (F.normalize(noise, dim=1) * usual).to(table)


class Pretraining:
    """The model, its optimizers, and how far they have come. A finished stage is kept in `work`, to
    go on from.
    """

    def __init__(self, work: Path, device: str, seed: int):
        world = build_world()
        if not (
            HERE / "tokenizer.model"
        ).exists():  # other ids would make finished stages worthless
            (HERE / "tokenizer.model").write_bytes(train_tokenizer(world))
        self.world, self.tokenizer = world, load_tokenizer(HERE)
        self.model = build_model(self.tokenizer.vocab_size, seed).to(device)
        self.muon, self.adam = optimizers(self.model)
        self.probes = Probes(world, self.tokenizer)
        self.work, self.seed = work, seed
        self.tokens, self.seconds, self.log = 0, 0.0, []
        self.seen = {self.tokenizer.bos, self.tokenizer.eos}  # every piece that was ever read
        # one piece for each control character
        self.signs = [self.tokenizer.sp.piece_to_id(f"<0x{b:02X}>") for b in range(1, 32)]

    def save(self, stage: str) -> None:
        parts = {k: getattr(self, k).state_dict() for k in ("model", "muon", "adam")}
        where = {k: getattr(self, k) for k in ("tokens", "seconds", "log", "seen")}
        torch.save(parts | where, self.work / f"{stage}.pt")

    def load(self, stage: str) -> None:
        state = torch.load(self.work / f"{stage}.pt", map_location=device_of(self.model))
        for part in ("model", "muon", "adam"):
            getattr(self, part).load_state_dict(state[part])
        for k in ("tokens", "seconds", "log", "seen"):
            setattr(self, k, state[k])

    def step(self, ids: Tensor, weights: Tensor, rate: float) -> Tensor:
        """One step at `rate` times the peak learning rates; the loss, which nobody waits for."""
        self.muon.param_groups[0]["lr"] = MUON_LR * rate
        self.adam.param_groups[0]["lr"] = ADAM_LR * rate
        loss = weighted_loss(self.model, ids, weights)
        loss.backward()
        self.muon.step()
        self.adam.step()
        self.model.zero_grad()
        return loss.detach()

    def run(self, number: int, stage: str) -> None:
        """All steps of a stage, and up to twice as many again until its probe is content."""
        millions, style, mix = STAGES[stage]
        if stage in RESTARTS:
            self.muon, self.adam = optimizers(self.model)
        steps = round(millions * 1e6 / (B * T))
        corpus = Corpus(self.world, 100 * self.seed + number, *style)
        stream = batches(self.tokenizer, corpus.documents(mix))
        probe, percent = UNTIL.get(stage, ("loss", 0))
        for step in range(3 * steps):
            if step >= steps and self.log[-1][probe] >= percent:
                break
            start = time.time()
            if corpus.noise and step % 20 == 0:
                give_new_signs(self.model, self.signs, self.seen, step)
            ids, weights = next(stream)
            self.seen |= set(ids.flatten().tolist())
            warm = min(1.0, (step + 1) / WARMUP.get(stage, 1))
            fade = 1 - step / steps if stage in FADING else 1.0
            loss = self.step(ids, weights, warm * fade)
            self.tokens += B * T
            self.seconds += time.time() - start
            if (step + 1) % 130 == 0 or step + 1 == steps:
                row = {"stage": stage, "tokens": self.tokens, "seconds": round(self.seconds)}
                row |= {"loss": round(loss.item(), 3), **self.probes(self.model)}
                self.log.append(row)
                print(json.dumps(row), flush=True)


def pretrain(work: Path, out: Path, device: str, seed: int) -> None:
    """All stages, each continued from the last one's file in `work` if that is there."""
    run = Pretraining(work, device, seed)
    count = sum(p.numel() for p in run.model.parameters())
    print(f"{count:,} parameters, {run.tokenizer.vocab_size} pieces")
    work.mkdir(parents=True, exist_ok=True)
    for number, stage in enumerate(STAGES, start=1):
        if (work / f"{stage}.pt").exists():
            run.load(stage)
        else:
            run.run(number, stage)
            run.save(stage)
    give_fresh_rows(run.model, run.tokenizer, run.seen)
    save_llama(run.model.cpu().bfloat16(), out)
    (out / "pretrain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in run.log))
    if out != HERE:
        shutil.copy(HERE / "tokenizer.model", out)


def stage_table(log: list[dict]) -> str:
    """Where each stage ended, in Markdown."""
    columns = [
        ("statement", "state asked"),
        ("question", "answer asked"),
        ("lookup", "lookup"),
        ("yes/no", "yesno asked"),
        ("judge", "judge asked"),
        ("pick, one step", "pick one asked"),
        ("two steps", "pick two asked"),
        ("which one", "pick who asked"),
        ("strict: statement", "state strict"),
        ("yes/no", "yesno strict"),
        ("pick", "pick one strict"),
        ("two steps", "pick two strict"),
        ("which one", "pick who strict"),
    ]
    lines = [
        "| " + " | ".join(["stage", "M tokens so far", "seconds", *(c for c, _ in columns)]) + " |",
        "|---|" + "--:|" * (len(columns) + 2),
    ]
    for stage in dict.fromkeys(row["stage"] for row in log):
        last = [row for row in log if row["stage"] == stage][-1]
        lines.append(
            f"| {stage} | {last['tokens'] / 1e6:.1f} | {last['seconds']} | "
            + " | ".join(f"{last[probe]:.0f}" for _, probe in columns)
            + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Pretrain the embedded model.")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/tiny-pretrain"),
        help="where finished stages are kept, to go on from",
    )
    parser.add_argument("--out", type=Path, default=HERE, help="default: beside this file")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="show the log, train nothing")
    args = parser.parse_args()
    if args.table:
        log = (HERE / "pretrain.jsonl").read_text().splitlines()
        print(stage_table([json.loads(line) for line in log]))
    else:
        pretrain(args.work, args.out, args.device, args.seed)
