"""However a run is asked to stop, it saves first, says how to go on, and is then as if never
stopped."""

import signal

import pytest
from helpers import at_step, flags, interrupt, jobs, make_world, outcome, refused, run, score

from plumbing import scoring
from plumbing.faster import hastened

SHORT = {"max_steps": 4, "epochs": None}


@pytest.fixture(autouse=True)
def no_nohup():
    """The tests themselves may run under nohup, or in the background: signals are as usual here."""
    usual = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(*flags(world, folder, **SHORT)).code == 0
    return folder


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_later(world, whole, tmp_path, name):
    number = getattr(signal, name)
    result = interrupt(2, *flags(world, tmp_path / "run", **SHORT), with_signal=number)
    assert result.code == 128 + number and "--resume" in result.out
    called = "Ctrl-C" if name == "SIGINT" else name
    assert f"{called}: stops when this step" in result.err  # a step may take a minute
    assert f"{called} again ends at once" in result.err
    assert run("--resume", tmp_path / "run").code == 0
    assert outcome(tmp_path / "run") == outcome(whole)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_is_not_lost_in_a_finalizer_which_may_not_raise(
    world, whole, tmp_path, monkeypatch
):
    class Finalized:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(jobs, "hastened", lambda *a: bool(Finalized()) and hastened(*a))
    result = run(*flags(world, tmp_path / "run", **SHORT))
    monkeypatch.undo()
    assert result.code == 143 and "--resume" in result.out
    assert run("--resume", tmp_path / "run").code == 0
    assert outcome(tmp_path / "run") == outcome(whole)


@pytest.mark.parametrize("pair", [("SIGHUP", "SIGTERM"), ("SIGUSR1", "SIGTERM")])
def test_a_second_way_of_asking_does_not_cut_the_save_short(world, whole, tmp_path, pair):
    """A dropped ssh sends the first pair, Slurm the second."""

    def ask():
        for name in pair:
            signal.raise_signal(getattr(signal, name))

    with at_step(2, ask):
        result = run(*flags(world, tmp_path / "run", **SHORT))
    assert result.code == 128 + getattr(signal, pair[0])
    assert run("--resume", tmp_path / "run").code == 0
    assert outcome(tmp_path / "run") == outcome(whole)


def test_under_nohup_a_dropped_terminal_is_not_a_wish_to_stop(world, whole, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run_flags = flags(world, tmp_path / "run", **SHORT)
        assert interrupt(2, *run_flags, with_signal=signal.SIGHUP).code == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert outcome(tmp_path / "run") == outcome(whole)


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_scoring_that_is_asked_to_stop_keeps_its_answers(world, whole, tmp_path, monkeypatch, name):
    generate, number = scoring.generate, getattr(signal, name)

    def interrupted(*args):
        signal.raise_signal(number)
        return generate(*args)

    monkeypatch.setattr(scoring, "generate", interrupted)
    command = (whole, "--data", world.tests, "--batch-size", 3, "--out", tmp_path)
    assert score(*command).code == 128 + number
    assert len((tmp_path / "boolq.jsonl").read_text().splitlines()) == 3
    monkeypatch.undo()
    assert score(*command).code == 0


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_merge_that_is_ended_leaves_nothing(world, whole, tmp_path, monkeypatch, name):
    number, save = getattr(signal, name), jobs.save_llama

    def ended(model, folder):
        save(model, folder)
        signal.raise_signal(number)

    monkeypatch.setattr(jobs, "save_llama", ended)
    before = signal.getsignal(number)
    result = run("--merge", whole, "--out", tmp_path / "merged")
    refused(result, 128 + number, f"ended by {name}")
    assert list(tmp_path.iterdir()) == [] and signal.getsignal(number) == before


def test_a_start_that_is_ended_before_its_first_step_leaves_nothing(world, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "plan_memory", lambda *a: signal.raise_signal(signal.SIGTERM))
    assert run(*flags(world, tmp_path / "run", **SHORT)).code == 143
    assert list(tmp_path.iterdir()) == []
