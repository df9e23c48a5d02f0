"""Make the tiny base model: a tokenizer, then a small LLaMA that reads corpus.py until the probes are content.

    python tiny/pretrain.py            # 13M tokens or more; writes config.json, model.safetensors, tokenizer.model, pretrain.jsonl
    python tiny/pretrain.py --table    # the log as README.md shows it

Skills come in an order: recall a fact, compare two words, compare a word with a recalled fact, and only then pick the
entry that fits. So the mix of documents changes in stages, and Probes say when a stage is done (README.md has the table).
The tokenizer sees the tasks' words, so that their records are short. The model does not: see corpus.py.
"""

import argparse
import io
import json
import random
import re
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

STAGES = {  # stage: tokens in millions; hint, heads, noise (corpus.py); share of each kind of document
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
        (0.50, 12, 0.3),
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
        (0.30, 12, 0.5),
        {"statements": 15, "answer": 4, "named": 5, "yesno": 22, "judged": 38, "label": 16},
    ),
    "settle": (
        3.0,
        (0.15, 12, 0.6),
        {"statements": 16, "answer": 4, "yesno": 24, "judged": 24, "label": 26, "verdict": 6},
    ),
    "leads": (
        1.5,
        (0.15, 12, 0.7),
        {"statements": 15, "answer": 4, "yesno": 28, "judged": 20, "label": 28, "verdict": 5},
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
WARMUP = {"lists": 100, "fade": 20, "leads": 20}  # steps at the start of a stage
FADING = {"settle", "leads"}  # stages whose learning rate falls to 0
TWINS = {
    "true": "yes",
    "false": "no",
}  # words of the tasks that a real base model knows to be alike


# --- tokenizer -------------------------------------------------------------------------------------


def train_tokenizer(world: World) -> bytes:
    """SentencePiece BPE with byte fallback. Every word of the world and the tasks is one piece; the rest is spelled."""
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
    """Ids and weights, (B, T + 1) each: whole documents laid end to end, the next row begun where one does not fit."""
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


# --- optimizer -------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix is made orthogonal before it is applied: all directions learn alike. For 2-D weights only."""

    def __init__(self, params, lr: float, momentum: float = 0.95):
        super().__init__(list(params), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for (rows, columns), params in shapes.items():  # equal shapes in one batched product
                updates = []
                for p in params:
                    m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    m.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(m, group["momentum"]))
                scale = max(1.0, rows / columns) ** 0.5
                for p, update in zip(params, orthogonal(torch.stack(updates))):
                    p.add_(update, alpha=-group["lr"] * scale)


def orthogonal(X: Tensor) -> Tensor:  # (n, rows, columns) -> the same
    """Push all singular values towards 1: five Newton-Schulz steps with the quintic whose slope at 0 is steep."""
    tall = X.size(1) > X.size(2)
    X = X.mT if tall else X
    X = (
        X / (X.norm(dim=(1, 2), keepdim=True) + 1e-7)
    ).bfloat16()  # rough is good enough here, and much quicker
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.mT if tall else X


# --- probes ----------------------------------------------------------------------------------------


class Probes:
    """One number a skill: the share of right answers, read off as the likeliest of the possible next tokens."""

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
            rows = model.rows([len(i) for i in ids])
            with torch.autocast("cpu", torch.bfloat16):
                logits = model.lm_head(
                    model.hidden(torch.tensor(sum(ids, [])), rows)[rows.ends - 1]
                ).float()
            right = 0
            for row, (prompt, options, at) in zip(logits, cases):
                n = len(self.tokenizer.encode(prompt, bos=False, eos=False))
                first = [
                    self.tokenizer.encode(prompt + o, bos=False, eos=False)[n] for o in options
                ]
                right += int(row[first].argmax()) == at
            scores[name] = round(100 * right / len(cases), 1)
        return scores


# --- training --------------------------------------------------------------------------------------


def build_model(vocab_size: int) -> Llama:
    torch.manual_seed(0)
    model = Llama(
        LlamaConfig(
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
    )
    for name, p in model.named_parameters():
        if p.dim() == 2:
            nn.init.normal_(
                p, std=0.02 if "o_proj" not in name and "down_proj" not in name else 0.005
            )
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


def weighted_loss(
    model: Llama, ids: Tensor, weights: Tensor
) -> Tensor:  # (B, T + 1), (B, T + 1) -> ()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids[:, :-1])  # (B, T, V)
    losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def give_fresh_rows(model: Llama, tokenizer: SentencePieceTokenizer, seen: set[int]) -> None:
    """New embeddings for the pieces that the corpus never held.

    Head and embedding are one matrix here, and "never say this" has pushed all those rows onto one direction (cosine
    0.9999): all those words would be one word. Each gets a random row of usual length on top of a little of the old direction, which
    keeps the base model from saying it. What a real base model has read of such words is little: that "Which" is "which",
    and that "true" is much like "yes". These get their twin's row, and less noise.
    """
    table = model.embed_tokens.weight
    generator = torch.Generator().manual_seed(0)
    usual = table[sorted(seen)].norm(dim=1).mean()
    unseen = [i for i in range(len(table)) if i not in seen]
    never = F.normalize(table[unseen].mean(0), dim=0)
    known = {tokenizer.sp.id_to_piece(i): i for i in sorted(seen)}
    for i in unseen:
        noise = F.normalize(torch.randn(table.size(1), generator=generator), dim=0) * usual
        space, word = re.fullmatch("(▁?)(.*)", tokenizer.sp.id_to_piece(i).lower()).groups()
        word = TWINS.get(word, word)
        twin = known.get(
            space + word, known.get(word, known.get("▁" + word))
        )  # with a space before it or not, as the piece itself
        table[i] = never + noise if twin is None else never + table[twin] + 0.3 * noise


@torch.no_grad()
def give_new_signs(model: Llama, signs: list[int], seen: set[int], seed: int) -> None:
    """New random rows for the strange signs: what means something else all the time must be looked through."""
    table = model.embed_tokens.weight
    usual = table[sorted(seen - set(signs))].norm(dim=1).mean()
    noise = torch.randn(len(signs), table.size(1), generator=torch.Generator().manual_seed(seed))
    table[signs] = F.normalize(noise, dim=1) * usual


def pretrain(work: Path) -> Llama:
    """All stages, each continued from the last one's file in `work` if that is there."""
    world = build_world()
    if not (
        HERE / "tokenizer.model"
    ).exists():  # other ids would make every finished stage worthless
        (HERE / "tokenizer.model").write_bytes(train_tokenizer(world))
    tokenizer = load_tokenizer(HERE)
    model, probes = build_model(tokenizer.vocab_size), Probes(world, tokenizer)
    muon, adam = optimizers(model)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {tokenizer.vocab_size} pieces"
    )
    signs = [
        tokenizer.sp.piece_to_id(f"<0x{b:02X}>") for b in range(1, 32)
    ]  # one piece for each control character
    work.mkdir(parents=True, exist_ok=True)
    tokens, seconds, log, seen = 0, 0.0, [], {tokenizer.bos, tokenizer.eos}

    for number, (stage, (millions, style, mix)) in enumerate(STAGES.items()):
        saved = work / f"{stage}.pt"
        if saved.exists():
            state = torch.load(saved)
            for part, name in ((model, "model"), (muon, "muon"), (adam, "adam")):
                part.load_state_dict(state[name])
            tokens, seconds, log, seen = (
                state["tokens"],
                state["seconds"],
                state["log"],
                state["seen"],
            )
            continue
        if stage == "fade":  # another kind of text from here on
            muon, adam = optimizers(model)
        steps = round(millions * 1e6 / (B * T))
        stream = batches(tokenizer, Corpus(world, number + 1, *style).documents(mix))
        probe, percent = UNTIL.get(stage, ("loss", 0))
        for step in range(3 * steps):
            if step >= steps and log[-1][probe] >= percent:
                break
            start = time.time()
            if style[2] and step % 20 == 0:
                give_new_signs(model, signs, seen, step)
            ids, weights = next(stream)
            seen |= set(ids.flatten().tolist())
            warm = min(1.0, (step + 1) / WARMUP.get(stage, 1))
            fade = 1 - step / steps if stage in FADING else 1.0
            muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = (
                MUON_LR * warm * fade,
                ADAM_LR * warm * fade,
            )
            loss = weighted_loss(model, ids, weights)
            loss.backward()
            muon.step()
            adam.step()
            model.zero_grad()
            tokens, seconds = tokens + B * T, seconds + time.time() - start
            if (step + 1) % 130 == 0 or step + 1 == steps:
                row = {
                    "stage": stage,
                    "tokens": tokens,
                    "seconds": round(seconds),
                    "loss": round(loss.item(), 3),
                    **probes(model),
                }
                log.append(row)
                print(json.dumps(row), flush=True)
        torch.save(
            {
                "model": model.state_dict(),
                "muon": muon.state_dict(),
                "adam": adam.state_dict(),
                "tokens": tokens,
                "seconds": seconds,
                "log": log,
                "seen": seen,
            },
            saved,
        )
    give_fresh_rows(model, tokenizer, seen)
    save_llama(model.bfloat16(), HERE)
    (HERE / "pretrain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    return model


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
    for stage in STAGES:
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
    parser.add_argument("--table", action="store_true", help="show the log, train nothing")
    args = parser.parse_args()
    if args.table:
        print(
            stage_table(
                [json.loads(line) for line in (HERE / "pretrain.jsonl").read_text().splitlines()]
            )
        )
    else:
        pretrain(args.work)
