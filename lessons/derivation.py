"""The paper's argument, Eq. 2 to 15, one step after the other, each beside what is measured.

    python lessons/derivation.py           five minutes on two cores: results/derivation.json, then
                                           the page and its picture
    python lessons/derivation.py --quick   half a minute: smaller everywhere, written to
                                           runs/lessons/derivation

Read from top to bottom: the functions follow the paper's equations. derivation_page.py says what
came of them.

Letters: w is what the adapter adds to a layer's output, γ the scale, η the learning rate, p the
layer's input width, x the input of the first step and x' that of the next; G = ∂L/∂W. A and B are
rora.py's lora_A (r, p) and lora_B (O, r).
"""

import argparse
import copy
import math
import sys
from statistics import mean

import derivation_page
from rows import HERE, ROOT, checkpoint_digest

sys.path.insert(0, str(ROOT))
import torch
from torch import Tensor, nn

from plumbing import run_folder as runs
from data import encode_records, epoch_order, load_examples, load_tokenizer, split_validation
from plumbing.flags import CHECKPOINTS, NonFiniteError, exit_code
from llama import Llama, load_llama
from rora import (
    SCALES,
    LoRALinear,
    RoRALinear,
    attach,
    learning_rate,
    train_step,
    trainable,
    validation_loss,
)

TINY = CHECKPOINTS["tiny"]
RULES = {"α/r": SCALES["linear"], "α/√r": SCALES["sqrt"], "α/r^¼": lambda alpha, r: alpha / r**0.25}
OPTIMIZERS = ("SGD", "AdamW")
FULL = {
    "ranks": [4, 8, 16, 32, 64, 128, 256, 512],
    "p": 256,
    "draws": 4000,
    "width": 512,
    "seeds": 3,
    "records": 8,
    "few": [4, 32, 128],
    "steps": 40,
    "batch": 6,
}
QUICK = {
    "ranks": [4, 32, 128],
    "p": 64,
    "draws": 4000,
    "width": 64,
    "seeds": 1,
    "records": 4,
    "few": [4, 32],
    "steps": 4,
    "batch": 4,
}
NO_CLIP = math.inf  # the equations know no clipping
FALL = 5e-4  # of the loss, in one small step on the tiny model


def adapter(base: nn.Linear, rank: int, rule: str) -> LoRALinear:
    """Any rule is LoRA with another α: γ = (γ r) / r."""
    return LoRALinear(base, rank, RULES[rule](TINY.alpha, rank) * rank)


# --- Eq. 2 to 4: what the first step makes of w -------------------------------------------------


def first_step_by_hand(p: int, rank: int = 16, eta: float = 0.1) -> dict:
    """One real SGD step of a real layer against Eq. 3 and Eq. 4, as relative errors; and the size
    of A's gradient.
    """
    torch.manual_seed(0)
    layer = RoRALinear(nn.Linear(p, p, bias=False), rank, TINY.alpha).double()
    A, gamma, (x, later, delta) = (
        layer.lora_A.detach().clone(),
        layer.scaling,
        torch.randn(3, p).double(),
    )
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=eta)
    (layer(x) * delta).sum().backward()  # ∂L/∂w = δ
    B3 = -eta * gamma * torch.outer(delta, A @ x)  # Eq. 3
    w4 = -eta * gamma**2 * delta * ((A @ x) * (A @ later)).sum()  # Eq. 4
    optimizer.step()
    w = layer(later) - layer.base(later)
    off = lambda measured, formula: ((measured - formula).norm() / formula.norm()).item()
    return {
        "rank": rank,
        "eq3": off(layer.lora_B, B3),
        "eq4": off(w, w4),
        "grad_A": layer.lora_A.grad.norm().item(),
    }


# --- Eq. 5 to 9: how far w spreads --------------------------------------------------------------


def products(
    rank: int, p: int, draws: int, rho: float = 0.0, real: bool = False
) -> Tensor:  # (draws,)
    """xᵀAᵀA x', which is Eq. 4 without its factor -η δ γ². x and x' standard normal, correlated by
    rho, as the paper's A is; real: A as LoRALinear begins with it, U(±1/√p), variance 1/(3p).
    """
    found = []
    while draws > 0:
        n = min(draws, max(1, 2**22 // (rank * p)))
        A = (2 * torch.rand(n, rank, p) - 1) / math.sqrt(p) if real else torch.randn(n, rank, p)
        x, z = torch.randn(2, n, p, 1)
        later = rho * x + math.sqrt(1 - rho**2) * z
        found.append(((A @ x) * (A @ later)).sum((1, 2)).double())
        draws -= n
    return torch.cat(found)


def moments(v: Tensor) -> dict:
    """Mean and variance, each with its standard error."""
    square, n = (v - v.mean()) ** 2, len(v)
    return {
        "mean": v.mean().item(),
        "mean_se": (v.std() / n**0.5).item(),
        "var": v.var().item(),
        "var_se": (square.std() / n**0.5).item(),
    }


def exact_variance(r: int, p: int) -> float:
    """Var xᵀAᵀA x' = E tr (AᵀA)² = Σ over pairs of A's rows of E (a_k·a_m)²: r of a row with
    itself, p² + 2p each, and r (r - 1) of two different ones, p each.
    """
    return r * p * (r + p + 1)


def eq9_variance(r: int, p: int) -> float:
    return r**2 * p


def eq8_variance(r: int, p: int) -> float:
    """Eq. 8 as it is printed: a sum over j, k and l of products of ones."""
    return p * r * p


def real_variance(r: int, p: int) -> float:
    """exact_variance with uniform entries of variance 1/(3p), whose fourth moment is 1.8 of its
    square, not 3.
    """
    return r * p * (r + p - 0.2) / (3 * p) ** 2


def initial_variance(p: int, rank: int = 512) -> float:
    """p times the variance of the entries that a real LoRALinear's lora_A begins with."""
    torch.manual_seed(0)
    return p * LoRALinear(nn.Linear(p, 1, bias=False), rank, TINY.alpha).lora_A.var().item()


def spreads(size: dict) -> list[dict]:
    torch.manual_seed(0)
    p, rows = size["p"], []
    for r in size["ranks"]:
        rows.append(
            {
                "rank": r,
                **moments(products(r, p, size["draws"])),
                "exact": exact_variance(r, p),
                "eq8": eq8_variance(r, p),
                "eq9": eq9_variance(r, p),
                "coherent": moments(products(r, p, size["draws"] // 4, rho=0.5)),
                "real": moments(products(r, p, size["draws"] // 4, real=True)),
                "real_exact": real_variance(r, p),
            }
        )
    return rows


# --- Eq. 10 to 15: one real step on one layer ---------------------------------------------------


def one_layer(rank: int, rule: str, optimizer: str, width: int, seed: int) -> dict:
    """One real step on 64 inputs: norm of B's gradient, ‖w‖ on these inputs and on fresh ones
    (rms), fall of the loss.
    """
    torch.manual_seed(seed)
    layer = adapter(nn.Linear(width, width, bias=False), rank, rule).double()
    x, goal, fresh = torch.randn(3, 64, width).double()
    loss = lambda: (layer(x) - goal).pow(2).mean()
    before = loss()
    before.backward()
    G, gradient, A = layer.base.weight.grad, layer.lora_B.grad.norm().item(), layer.lora_A.detach()
    params = [layer.lora_A, layer.lora_B]
    lr = {"SGD": 1e-4, "AdamW": 1e-7}[optimizer]
    {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}[optimizer](
        params, lr=lr, weight_decay=0
    ).step()
    w = lambda inputs: (
        (layer(inputs) - layer.base(inputs)).norm(dim=1).square().mean().sqrt().item()
    )
    expected = lambda inputs: (
        lr * layer.scaling**2 * A.var().item() * size_of_w(G, inputs, rank)
    )  # of SGD
    return {
        "gradient": gradient,
        "seen": w(x),
        "fresh": w(fresh),
        "fall": (before - loss()).item(),
        "lr": lr,
        "seen_formula": expected(x),
        "fresh_formula": expected(fresh),
        "kappa2_seen": kappa2(G, x),
        "kappa2_fresh": kappa2(G, fresh),
    }


def kappa2(G: Tensor, inputs: Tensor) -> float:
    """Which share of ‖G‖² ‖x'‖² is in ‖G x'‖²: 1/p for an x' that has nothing to do with G."""
    return ((inputs @ G.T).square().sum() / (G.square().sum() * inputs.square().sum())).item()


def size_of_w(G: Tensor, inputs: Tensor, r: int) -> float:
    """√E ‖G AᵀA x'‖² for normal A of variance 1:  r² ‖G x'‖², the coherent part, and r (‖G‖² ‖x'‖²
    + ‖G x'‖²), the incoherent.
    """
    both, coherent = (
        G.square().sum() * inputs.square().sum(1).mean(),
        (inputs @ G.T).square().sum(1).mean(),
    )
    return ((r**2 + r) * coherent + r * both).sqrt().item()


# --- the same on the trained tiny model ---------------------------------------------------------


def tiny(size: dict) -> tuple[Llama, list, list]:
    """The embedded checkpoint, and its records: to train on, held out."""
    examples = load_examples(TINY.data)
    records = encode_records(examples, load_tokenizer(ROOT / "tiny"), 256)[0]
    train, held_out = split_validation(records, TINY.val_size)
    order = epoch_order(len(train), 0, 0)
    return (
        load_llama(ROOT / "tiny", dtype=torch.float32),
        [train[i] for i in order],
        held_out[: size["batch"] * 4],
    )


def adapted(base: Llama, rank: int, rule: str, seed: int = 0) -> Llama:
    model = copy.deepcopy(base)
    torch.manual_seed(seed)
    attach(model, "lora", rank, RULES[rule](TINY.alpha, rank) * rank)
    return model.train()


def new_optimizer(model: Llama, name: str, ratio: float = 1.0) -> torch.optim.Optimizer:
    """rora.py's AdamW, or plain SGD. ratio: by how much B's learning rate is larger than A's
    (train_step reads lr_ratio).
    """
    params = trainable(model)
    groups = [
        {"params": [p for n, p in params.items() if n.endswith(ending)], "lr_ratio": times}
        for ending, times in (("lora_A", 1.0), ("lora_B", ratio))
    ]
    if name == "SGD":
        return torch.optim.SGD(groups, lr=0.0)
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def hooked(model: Llama, records: list, kind: type[nn.Module], look) -> None:
    """Run the model on the records; look(name, layer, its input) at every layer of a kind."""
    hooks = [
        m.register_forward_pre_hook(lambda m, args, name=name: look(name, m, args[0].detach()))
        for name, m in model.layers.named_modules()
        if isinstance(m, kind)
    ]
    with torch.no_grad():
        validation_loss(model, records, len(records))
    for hook in hooks:
        hook.remove()


def size_of_update(model: Llama, records: list) -> float:
    """Mean over the adapted layers of the rms of ‖w‖."""
    sizes = []
    hooked(
        model,
        records,
        LoRALinear,
        lambda _, layer, x: sizes.append(
            layer.scaling
            * (x @ layer.lora_A.T @ layer.lora_B.T).norm(dim=1).square().mean().sqrt().item()
        ),
    )
    return mean(sizes)


def tiny_step(
    base: Llama, batch: list, held_out: list, rank: int, rule: str, optimizer: str
) -> dict:
    """one_layer's numbers on the whole model; `fresh` are held-out records. The step is so small
    that the loss falls along its slope, by about FALL; what depends on the step is therefore given
    per unit of lr.
    """
    model = adapted(base, rank, rule)
    train_step(model, batch, new_optimizer(model, optimizer), 0.0, len(batch), clip=NO_CLIP)
    B = [p.grad for name, p in trainable(model).items() if name.endswith("lora_B")]
    lr = FALL / sum((g.square() if optimizer == "SGD" else g.abs()).sum().item() for g in B)
    model.zero_grad()
    loss, gradient = train_step(
        model, batch, new_optimizer(model, optimizer), lr, len(batch), clip=NO_CLIP
    )
    fall = loss - validation_loss(model, batch, len(batch))
    return {
        "gradient": gradient,
        "seen": size_of_update(model, batch) / lr,
        "fresh": size_of_update(model, held_out) / lr,
        "fall": fall / lr,
        "lr": lr,
    }


def alignment(base: Llama, batch: list, held_out: list) -> dict[str, dict]:
    """kappa2 of G, from one batch, with inputs of other records: the median over layers, by kind of
    layer.
    """
    model, inputs, found = copy.deepcopy(base), {}, {}
    train_step(
        model, batch, torch.optim.SGD(model.parameters(), lr=0.0), 0.0, len(batch), clip=NO_CLIP
    )
    hooked(model, held_out, nn.Linear, lambda name, _, x: inputs.update({name: x}))
    for name, layer in model.layers.named_modules():
        if name.rpartition(".")[2] in LoRALinear.targets:
            found.setdefault(name.rpartition(".")[2], []).append(
                (kappa2(layer.weight.grad, inputs[name]), layer.in_features)
            )
    middle = lambda values: sorted(values)[len(values) // 2]
    return {
        kind: {"kappa2": middle([k for k, _ in pairs]), "p": pairs[0][1]}
        for kind, pairs in found.items()
    }


def many_steps(
    base: Llama,
    train: list,
    held_out: list,
    size: dict,
    rank: int,
    rule: str,
    optimizer: str,
    lr: float,
    ratio: float = 1.0,
) -> dict:
    """The recipe's schedule on the whole model. `after` is the loss on held-out records, None where
    it became infinite.
    """
    model, losses = adapted(base, rank, rule), []
    stepper = new_optimizer(model, optimizer, ratio)
    for step in range(size["steps"]):
        batch = [
            train[i % len(train)] for i in range(step * size["batch"], (step + 1) * size["batch"])
        ]
        rate = learning_rate(step, size["steps"], lr, size["steps"] // 10)
        try:
            losses.append(train_step(model, batch, stepper, rate, size["batch"], clip=NO_CLIP)[0])
        except NonFiniteError:
            return {"after": None, "update": None, "losses": losses}
        stepper.zero_grad()
    after = validation_loss(model, held_out, size["batch"])
    if not math.isfinite(after):
        return {"after": None, "update": None, "losses": losses}
    return {"after": after, "update": size_of_update(model, held_out), "losses": losses}


# --- all of it ----------------------------------------------------------------------------------


def averaged(rows: list[dict]) -> dict:
    return {key: mean(row[key] for row in rows) for key in rows[0]}


def compute(size: dict) -> dict:
    say = lambda what: print(what, file=sys.stderr, flush=True)
    p, ranks = size["p"], size["ranks"]
    say("Eq. 2 to 9: Monte Carlo")
    results = {
        "size": size,
        "alpha": TINY.alpha,
        "by_hand": first_step_by_hand(p),
        "init": initial_variance(p),
        "spreads": spreads(size),
    }
    say("Eq. 10 to 15: one step on one layer")
    grid = [
        {"optimizer": o, "rule": rule, "rank": r}
        for o in OPTIMIZERS
        for rule in RULES
        for r in ranks
    ]
    results["layer"] = [
        cell
        | averaged(
            [one_layer(**cell, width=size["width"], seed=seed) for seed in range(size["seeds"])]
        )
        for cell in grid
    ]
    base, train, held_out = tiny(size)
    results |= {
        "checkpoint": checkpoint_digest(ROOT / "tiny"),
        "alignment": alignment(base, train[: size["records"]], held_out),
    }
    say("one step on the tiny model")
    results["tiny"] = [
        cell | tiny_step(base, train[: size["records"]], held_out, **cell) for cell in grid
    ]
    say(f"{size['steps']} steps on the tiny model")
    small = next(
        c["lr"]
        for c in results["tiny"]
        if (c["optimizer"], c["rule"], c["rank"]) == ("SGD", "α/√r", ranks[0])
    )
    lrs = {"SGD": 0.03 / FALL * small, "AdamW": TINY.lr["rora"]}
    results |= {"many_lr": lrs, "before": validation_loss(base, held_out, size["batch"])}
    run = lambda rank, rule, optimizer, ratio=1.0: (
        {"rank": rank, "rule": rule, "optimizer": optimizer, "ratio": ratio}
        | many_steps(base, train, held_out, size, rank, rule, optimizer, lrs[optimizer], ratio)
    )
    results["many"] = [run(r, rule, o) for o in OPTIMIZERS for rule in RULES for r in size["few"]]
    results["faster_B"] = [run(r, "α/r", "AdamW", math.sqrt(r)) for r in size["few"][1:]]
    return results


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(argv)
    home = ROOT / "runs" / "lessons" / "derivation" if args.quick else HERE
    results = home / "results" / "derivation.json"
    results.parent.mkdir(parents=True, exist_ok=True)
    runs.write_json(results, compute(QUICK if args.quick else FULL))
    return derivation_page.main(["--home", str(home)])


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:]), "derivation"))
