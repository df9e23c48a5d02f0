"""One's own runs in a picture: `python eval.py --plot RUN...`."""

import sys

import pytest
from helpers import flags, make_world, refused, run, score, tree

from plumbing import plots

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """A finished run that was scored, and one that was not."""
    folder = tmp_path_factory.mktemp("trained")
    for name in ("scored", "no$score"):
        assert run(*flags(world, folder / name)).code == 0
    assert score(folder / "scored", "--data", world.tests).code == 0
    return folder / "scored", folder / "no$score"


def test_a_scored_run_and_one_that_is_not_go_into_one_picture(trained, tmp_path):
    done = score("--plot", *trained, "--out", tmp_path / "both.png")
    assert (done.code, done.out, done.err) == (0, f"saved {tmp_path / 'both.png'}\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["both.png"]
    assert (tmp_path / "both.png").read_bytes().startswith(PNG)


def test_without_out_the_picture_lies_in_the_first_run(trained):
    assert score("--plot", trained[1]).code == 0
    assert (trained[1] / "metrics.png").read_bytes().startswith(PNG)


def test_the_curves_are_what_metrics_jsonl_holds_and_a_line_cut_short_is_passed_over(trained):
    before = plots.read_metrics(trained[0])
    steps, losses = before["loss"]
    assert steps == list(range(1, 13)) and len(set(losses)) > 1
    assert before["val_loss"][0] == [3, 6, 9, 12] and before["lr"][1][0] == 0
    with (trained[1] / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')
    assert plots.read_metrics(trained[1]) == before


def test_a_running_mean_looks_back_and_never_ahead():
    assert plots.running_mean([4, 2, 0, 0], 2) == [4, 3, 1, 0]


def test_without_matplotlib_one_line_says_how_to_get_it(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = score("--plot", trained[0], "--out", tmp_path / "x.png")
    refused(done, 2, "not installed: pip install 'matplotlib>=3.8'")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, code, said",
    [
        ("nowhere", 2, "nowhere: neither metrics.jsonl nor eval/results.json in it"),
        ("scored --out x.jpg", 2, "must end in .png"),
        ("scored --limit 3", 2, "--plot takes no --limit"),
        ("damaged", 3, "not as eval.py wrote it"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_nothing_is_written(
    trained, monkeypatch, words, code, said
):
    folder = trained[0].parent
    (folder / "damaged" / "eval").mkdir(parents=True, exist_ok=True)
    (folder / "damaged" / "eval" / "results.json").write_text('{"tasks": {"boolq": {}}}')
    before = tree(folder)
    monkeypatch.chdir(folder)
    refused(score("--plot", *words.split()), code, said)
    assert tree(folder) == before
