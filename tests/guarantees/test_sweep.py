"""The sweep's bookkeeping: which runs may be compared, what is run again, what tables then say."""

import argparse
import json
import math
import sys
from pathlib import Path

import pytest
from conftest import ROOT, write_checkpoint

sys.path.insert(0, str(ROOT / "lessons"))
import details
import findings
import paired
import plot
import rows
import sweep
import tables

from plumbing.flags import FlagError

# --- a row of the table ---------------------------------------------------------------------------


def test_a_scored_run_of_a_paper_model_takes_its_place_under_the_papers_row(tmp_path, capsys):
    run = tmp_path / "llama-7b-rora-r128-s0"
    (run / "eval").mkdir(parents=True)
    settings = {
        "ckpt": "checkpoints/llama-7b",
        "method": "rora",
        "scale": "sqrt",
        "rank": 128,
        "lr": 2e-4,
        "seed": 0,
    }
    (run / "run.json").write_text(
        json.dumps({"settings": settings, "base_sha256": "x", "data_sha256": "y"})
    )
    scores = {t: {"accuracy": 50.0 + i, "n": 10} for i, t in enumerate(tables.TASKS)}
    (run / "eval/results.json").write_text(json.dumps({"mean": 53.5, "tasks": scores, "limit": 10}))
    assert tables.main(["--results", str(tmp_path), "--runs", str(run), str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    below = out.splitlines()[
        1
        + next(
            i for i, line in enumerate(out.splitlines()) if line.startswith("| LLaMA-7B | RoRA |")
        )
    ]
    scores = "50.0 | 51.0 | 52.0 | 53.0 | 54.0 | 55.0 | 56.0 | 57.0"
    assert below == f"| LLaMA-7B | RoRA | 128 | ours, lr 0.0002 | 1 | 80 | {scores} | **53.5** |"
    assert "| LLaMA-7B | LoRA | – | ours |" + 11 * " – |" in out
    assert "is not a scored run" in err


# --- the sweep's bookkeeping ----------------------------------------------------------------------


def asked(mode: str, ckpt: Path, **given) -> argparse.Namespace:
    return argparse.Namespace(
        **{
            "mode": mode,
            "ckpt": str(ckpt),
            "methods": rows.METHODS,
            "ranks": None,
            "lrs": None,
            "seeds": None,
            "alpha": None,
            "max_steps": None,
            "limit": None,
            "device": None,
        }
        | given
    )


def checkpoint(folder: Path, weights: bytes = b"one") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"hidden_size": 192}')
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def result(job: dict, test: float = 50.0, val: float = 50.0, **other) -> dict:
    """The line that a run of this job would leave, with these accuracies."""
    row = {k: job[k] for k in ("ckpt", "checkpoint", "questions", "limit", "settings")}
    s = row["settings"]
    scores = {"test": test, "val": val, "strict": test}
    row |= {
        split: {
            "mean": scores[split],
            "n": 8,
            "unanswered": 0,
            "tasks": dict.fromkeys(tables.TASKS, scores[split]),
        }
        for split in job["splits"]
    }
    return (
        row
        | {
            "diverged": False,
            "scale": s["alpha"] / s["rank"] ** (0.5 if s["method"] == "rora" else 1),
            "val_loss": 1.0,
            "tokens": 9,
            "seconds": 1.0,
            "score_seconds": 1.0,
            "device": "cpu",
            "loss_every": 1,
            "loss": [2.0, 1.0],
        }
        | other
    )


def test_the_five_ranks_go_from_4_to_the_width():
    assert sweep.rank_axis(192) == [4, 8, 32, 64, 192] and sweep.rank_axis(128) == [
        4,
        8,
        16,
        64,
        128,
    ]


def test_fig1_is_45_runs_and_what_is_done_is_not_run_again(tmp_path):
    jobs = sweep.plan(asked("fig1", checkpoint(tmp_path)), [])
    assert len(jobs) == len({rows.key(j) for j in jobs}) == len({j["name"] for j in jobs}) == 45
    done = [result(j) for j in jobs[:40]]
    assert sweep.pending(jobs, done) == jobs[40:]
    less = [{k: v for k, v in done[0].items() if k != "strict"}, *done[1:]]
    assert sweep.pending(jobs, less) == [
        jobs[0],
        *jobs[40:],
    ]  # the strict questions were never asked
    assert (
        sweep.pending(jobs, [{**done[0], "diverged": True, "test": None}]) == jobs[1:]
    )  # nor can be


def test_results_of_another_checkpoint_count_for_nothing(tmp_path, capsys):
    before = [result(j, test=10) for j in sweep.plan(asked("fig1", checkpoint(tmp_path)), [])]
    jobs = sweep.plan(
        asked("fig1", checkpoint(tmp_path, b"two")), []
    )  # the same sizes and names, other weights
    assert sweep.pending(jobs, before) == jobs
    for row in before + [result(jobs[0], test=90)]:
        rows.append(tmp_path / "sweep.jsonl", row)
    (only,) = rows.load(tmp_path / "sweep.jsonl")
    assert rows.accuracy(only) == 90 and "45 runs of another checkpoint" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="has no lr"):
        sweep.plan(asked("best", tmp_path), before)


def test_the_row_is_chosen_by_validation_questions_alone_one_change_at_a_time(tmp_path):
    jobs = sweep.plan(asked("row", checkpoint(tmp_path)), [])
    assert {tuple(j["splits"]) for j in jobs} == {("val",)} and len(
        {rows.key(j) for j in jobs}
    ) == len({j["name"] for j in jobs}) == len(jobs)
    base = jobs[0]["settings"]
    tried = {name for j in jobs for name, value in j["settings"].items() if value != base[name]}
    assert tried == {"alpha", "lr", "warmup", "epochs", "seed"}
    table = sweep.row_table(
        jobs, [result(j, val=60 + 10 * j["settings"]["seed"]) for j in jobs[:4]]
    )
    assert [line.split("|")[6:8] for line in table.splitlines()[2:]] == [
        [" 60.0 70.0 ", " 65.0 "]
    ] * 2


def test_a_line_cut_short_by_a_crash_is_passed_over(tmp_path):
    file = tmp_path / "sweep.jsonl"
    rows.append(file, {"n": 1})
    file.write_text(file.read_text() + '{"n": 2, "loss": [1.')
    rows.append(file, {"n": 3})
    assert [r["n"] for r in rows.read(file)] == [1, 3]


def test_the_best_lr_is_chosen_by_validation_and_on_seeds_that_all_lrs_share(tmp_path):
    args = asked(
        "grid", checkpoint(tmp_path), lrs=[1e-3, 1e-2], ranks=[4], methods=["rora"], seeds=[0]
    )
    low, high = sweep.plan(args, [])
    found = [result(low, test=90, val=40), result(high, test=10, val=60)]
    lucky = result(
        sweep.plan(asked("fig1", tmp_path, lrs=[1e-3], ranks=[4], methods=["rora"], seeds=[1]), [])[
            0
        ],
        val=99,
    )
    assert rows.best_lr(found + [lucky], "rora", 4) == 1e-2
    assert rows.at_edge(found) == [("rora", 4, 1e-2)]


def test_the_two_best_lrs_of_one_seed_meet_again_over_three(tmp_path):
    args = asked(
        "grid",
        checkpoint(tmp_path),
        lrs=[1e-3, 2e-3, 1e-2],
        ranks=[4],
        methods=["rora"],
        seeds=[0, 1, 2],
    )
    vals = {1e-3: [95, 80, 80], 2e-3: [94, 92, 92], 1e-2: [10, 99, 99]}
    found = [
        result(j, val=vals[j["settings"]["lr"]][j["settings"]["seed"]])
        for j in sweep.plan(args, [])
    ]
    first = [r for r in found if r["settings"]["seed"] == 0]
    assert rows.best_lr(first, "rora", 4) == 1e-3
    best = asked("best", tmp_path, ranks=[4], methods=["rora"], lrs=args.lrs)
    jobs = sweep.plan(best, first)
    assert [(j["settings"]["seed"], j["settings"]["lr"]) for j in jobs] == [
        (seed, lr) for seed in (0, 1, 2) for lr in (1e-3, 2e-3)
    ]
    assert [j["settings"]["seed"] for j in sweep.pending(jobs, first)] == [1, 1, 2, 2]
    asked_for = {rows.key(j) for j in jobs}
    assert rows.best_lr([r for r in found if rows.key(r) in asked_for] + first, "rora", 4) == 2e-3
    third = sweep.plan(
        asked("grid", tmp_path, lrs=[5e-3], ranks=[4], methods=["rora"], seeds=[0, 1, 2]), []
    )  # run thrice for another rank's sake
    assert (
        rows.best_lr(
            [r for r in found if rows.key(r) in asked_for]
            + first
            + [result(j, val=93.5) for j in third],
            "rora",
            4,
        )
        == 5e-3
    )
    with pytest.raises(SystemExit, match="the grid of rora at rank 4 has no lr 0.0005 yet"):
        sweep.plan(
            asked("best", tmp_path, ranks=[4], methods=["rora"]), first
        )  # the whole grid, where none is named


def test_a_rank_that_the_grid_has_not_come_to_does_not_empty_it(tmp_path):
    lrs = [1e-3, 2e-3]
    found = [
        result(j)
        for j in sweep.plan(
            asked("grid", checkpoint(tmp_path), lrs=lrs, ranks=[4], methods=["rora"]), []
        )
    ]
    alone = [
        result(j)
        for j in sweep.plan(asked("fig1", tmp_path, lrs=[2e-3], ranks=[8], methods=["rora"]), [])
    ]
    assert list(rows.grid(found + alone, "rora")) == lrs


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    class Process:
        def __init__(self, command, stdout, **_):
            job, out = json.loads(command[3]), Path(command[4])
            self.returncode = 3 if "dora" in job["name"] else 0
            stdout.write("it went wrong here\n")
            if not self.returncode:
                out.mkdir()
                Path(f"{out}.row").write_text(json.dumps(result(job)))

        def poll(self):
            return self.returncode

    jobs = sweep.plan(asked("fig1", checkpoint(tmp_path / "model"), ranks=[4], seeds=[0]), [])
    monkeypatch.setattr(sweep.subprocess, "Popen", Process)
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    assert sweep.work(lambda rows: jobs, 2, tmp_path / "sweep.jsonl") == 1
    assert {r["settings"]["method"] for r in rows.read(tmp_path / "sweep.jsonl")} == {
        "lora",
        "rora",
    }
    assert (
        f"{jobs[1]['name']} failed with exit code 3: it went wrong here" in capsys.readouterr().err
    )
    assert [
        j["settings"]["method"] for j in sweep.pending(jobs, rows.read(tmp_path / "sweep.jsonl"))
    ] == ["dora"]


def test_a_run_leaves_a_line_with_all_that_identifies_it(tmp_path):
    args = asked(
        "grid",
        write_checkpoint(tmp_path / "model"),
        methods=["rora"],
        ranks=[4],
        lrs=[1e-2],
        max_steps=2,
        limit=1,
    )
    (job,) = sweep.plan(args, [])
    job["splits"] = ["val"]
    assert sweep.run_one(job, tmp_path / "run-lr0.01") == 0
    row = json.loads((tmp_path / "run-lr0.01.row").read_text())
    assert sweep.pending([job], [row]) == [] and row["val"]["n"] == 8 and len(row["loss"]) == 2
    assert (
        row["scale"] == pytest.approx(row["settings"]["alpha"] / math.sqrt(4))
        and row["tokens"] > 0
        and not row["diverged"]
    )
    assert sweep.run_one(job | {"checkpoint": "replaced since"}, tmp_path / "run-lr0.01") == 3


def test_a_model_of_the_papers_is_swept_on_its_own_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "checkpoints/sheared-llama-1.3b")
    flags = [
        "fig1",
        "--ckpt",
        "sheared-llama-1.3b",
        "--max-steps",
        "2",
        "--limit",
        "1",
        "--results",
        "own.jsonl",
        "--dry-run",
    ]
    with pytest.raises(FlagError, match="no data/boolq/test.json: run ./weights_download.sh data"):
        sweep.main(flags)
    for task in tables.TASKS:
        (tmp_path / "data" / task).mkdir(parents=True)
        (tmp_path / "data" / task / "test.json").write_bytes(
            (ROOT / "tiny/data" / task / "test.json").read_bytes()
        )
    (tmp_path / "data/commonsense_170k.json").write_bytes(
        (ROOT / "tiny/data/train.json").read_bytes()
    )
    args = asked(
        "fig1", "sheared-llama-1.3b", methods=["rora"], ranks=[8], seeds=[0], max_steps=2, limit=1
    )
    (job,) = sweep.plan(args, [])
    assert sweep.run_one(job, tmp_path / "run") == 0
    row = json.loads((tmp_path / "run.row").read_text())
    assert (
        row["settings"]["alpha"] == 64
        and row["settings"]["loss"] == "all"
        and row["test"]["n"] == 8
        and "val" not in row
    )
    with pytest.raises(FlagError, match="grid chooses by validation questions"):
        sweep.main(["grid", *flags[1:]])


@pytest.mark.parametrize("words", ["fig1 --limit 3", "grid --alpha 4", "row --lrs 1"])
def test_trials_do_not_go_into_the_committed_results(words):
    with pytest.raises(FlagError):
        sweep.main([*words.split(), "--dry-run"])


def test_of_trial_runs_nothing_is_shown(tmp_path, capsys):
    trial = {"limit": 10, "settings": {"max_steps": 20}, "checkpoint": "a", "questions": "b"}
    rows.append(tmp_path / "try.jsonl", trial)
    for show in (plot, details):
        with pytest.raises(SystemExit, match="trial runs"):
            show.main(["--results", str(tmp_path / "try.jsonl")])


def test_where_all_is_done_the_reader_is_told_how_to_run_it_again(tmp_path, capsys):
    args = asked("fig1", checkpoint(tmp_path), results=tmp_path / "sweep.jsonl", jobs=2)
    jobs = sweep.plan(args, [])
    told = sweep.summary(args, jobs, [result(j) for j in jobs])
    assert "45 runs, all of them in" in told and "fig1 --results runs/mine.jsonl" in told
    assert "45 runs, 0 done, 45 missing" in sweep.summary(args, jobs, [])


def test_what_decides_is_run_first_and_the_best_rates_once_the_grid_is_whole(tmp_path):
    args = asked("all", checkpoint(tmp_path))
    jobs = sweep.plan(args, [])
    axes = lambda j: tuple(j["settings"][k] for k in ("method", "rank", "lr", "seed"))
    assert {axes(j)[1:3] for j in jobs[:15]} == {(32, 2e-3)}
    assert len(set(map(axes, jobs))) == len(jobs) == 45 + 3 * 2 + 5 * 3 * 4
    found = [result(j, val=50 + 100 * j["settings"]["lr"]) for j in jobs]
    more = sweep.plan(args, found)
    assert {axes(j) for j in more} > {("lora", 32, 1e-2, seed) for seed in range(5)}


def test_after_its_minutes_no_run_is_begun(tmp_path, monkeypatch):
    jobs = sweep.plan(asked("fig1", checkpoint(tmp_path / "model"), ranks=[4], seeds=[0]), [])
    monkeypatch.setattr(sweep, "start", lambda *_: pytest.fail("a run was begun"))
    monkeypatch.setattr(sweep, "ROOT", tmp_path)
    assert sweep.work(lambda rows: jobs, 2, tmp_path / "sweep.jsonl", minutes=-1) == 0


def test_loss_curves_are_thinned_by_averaging():
    assert sweep.thinned([3.0, 1.0, 2.0]) == (1, [3.0, 1.0, 2.0])
    every, curve = sweep.thinned([float(i) for i in range(301)])
    assert (every, len(curve), curve[:2], curve[-1]) == (3, 101, [1.0, 4.0], 300.0)


# --- pictures and findings ------------------------------------------------------------------------


def test_without_matplotlib_one_line_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot.main([]) == 1
    assert (
        capsys.readouterr().err
        == 'plot: pictures need matplotlib, which is not installed: pip install "matplotlib>=3.8"\n'
    )


def test_an_interval_is_students_and_says_how_many_seeds_it_would_take():
    """By hand: 1, 2, 3 has mean 2, sd 1; t with 2 degrees of freedom is 4.303."""
    found = paired.difference({0: 3.0, 1: 4.0, 2: 5.0, 9: 0.0}, {0: 2.0, 1: 2.0, 2: 2.0, 8: 0.0})
    assert found.values == (1.0, 2.0, 3.0)
    assert found.half == pytest.approx(4.303 / math.sqrt(3))
    assert found.verdict == "not shown" and found.needed == "4"  # 3.182 / 2 < 2 < 4.303 / √3
    assert paired.Difference((1.9, 2.0, 2.1)).verdict == "more"
    assert paired.Difference((5.0,)).verdict == "not shown"
    assert paired.Difference(()).verdict == "not run yet"
    assert paired.t975(30) == pytest.approx(2.042, abs=0.003)


def test_the_findings_say_what_is_shown_what_is_not_and_what_was_not_run(tmp_path):
    jobs = sweep.plan(asked("fig1", checkpoint(tmp_path / "model"), ranks=[4, 32]), [])
    lead = {"lora": 0.0, "dora": 9.0, "rora": 10.0}
    for job in jobs:
        s = job["settings"]
        noise = 5 * (s["seed"] - 1) if s["method"] == "dora" else s["seed"]
        rows.append(tmp_path / "sweep.jsonl", result(job, test=50 + lead[s["method"]] + noise))
    said = [line.split(" | ") for line in findings.page(tmp_path).splitlines()]
    verdict = {(c[0], c[1]): c[5] for c in said if len(c) == 6}
    assert verdict["| RoRA beats LoRA", "r = 32, one lr"] == "**shown** |"
    assert verdict["| RoRA beats DoRA", "r = 32, one lr"].startswith("not shown (")
    assert verdict["| RoRA beats DoRA", "r = 192, one lr"] == "not run yet |"


def test_the_findings_tell_the_axis_that_made_the_numbers(tmp_path, capsys):
    """A world in which accuracy depends on lr · s alone: RoRA's lead at one lr is large, and LoRA
    at lr · √r is the same."""

    def made(job):
        s = job["settings"]
        x = math.log10(s["lr"] * s["alpha"] / s["rank"] ** (0.5 if s["method"] == "rora" else 1))
        return result(job, test=80 * math.exp(-((x + 1) ** 2) / 2))

    lrs = [10 ** (i / 4 - 4) for i in range(16)]
    found = [
        made(j)
        for j in sweep.plan(asked("grid", checkpoint(tmp_path), ranks=[4, 16, 64], lrs=lrs), [])
    ]
    for row in found:
        rows.append(tmp_path / "sweep.jsonl", row)
    assert details.main(["--results", str(tmp_path / "sweep.jsonl")]) == 0
    lines = [
        [c.strip() for c in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("|")
    ]
    swapped = {c[0]: c for c in lines if len(c) == 5 and c[0] in ("16", "64")}
    assert all(float(swapped[r][3]) < 0.6 < 5 < float(swapped[r][2]) for r in ("16", "64"))
    share = {c[0]: int(c[2].rstrip("%")) for c in lines if c[0] in rows.ABSCISSAS}
    assert share["lr · s"] > 98 and max(v for k, v in share.items() if k != "lr · s") < 95
