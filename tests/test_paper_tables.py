"""Which of the paper's own numbers cannot be: its averages, its differences, its percentages."""

import sys
from fractions import Fraction

from conftest import ROOT

sys.path.insert(0, str(ROOT / "lessons"))
import tables


def test_three_of_the_papers_averages_are_misprints_and_two_are_ties():
    found = {
        (r["table"], r["model"], r["rank"], r["method"]): (
            tables.verdict(r["average"], tables.average(r)),
            float(tables.average(r)),
        )
        for r in tables.paper()
    }
    assert len(found) == 18 + 15
    assert {k: v for k, v in found.items() if v[0] != "ok"} == {
        ("I", "LLaMA-7B", "–", "Parallel"): ("tie", 72.25),
        ("I", "LLaMA-13B", "–", "Parallel"): ("misprint", 81.475),
        ("II", "Sheared-LLaMA-1.3B", "16", "LoRA"): ("misprint", 51.1625),
        ("II", "Sheared-LLaMA-1.3B", "16", "DoRA"): ("tie", 52.75),
        ("II", "Sheared-LLaMA-1.3B", "32", "DoRA"): ("misprint", 53.2),
    }


def test_two_of_the_abstracts_four_differences_do_not_follow_from_the_tables():
    exact = {printed: tables.delta(model, other) for _, printed, model, other in tables.DELTAS}
    assert exact == {
        "6.5": Fraction("6.6"),
        "2.9": Fraction("2.925"),
        "5.7": Fraction("5.675"),
        "3.9": Fraction("3.7125"),
    }
    assert [p for p, x in exact.items() if tables.verdict(p, x) == "misprint"] == ["6.5", "3.9"]


def test_of_500_questions_no_count_gives_an_odd_tenth():
    impossible = {
        r["openbookqa"] for r in tables.paper() if not tables.possible(r["openbookqa"], 500)
    }
    assert impossible == {"85.3", "44.9", "62.1", "62.7", "61.7", "64.3", "63.1"}
    assert all(
        tables.possible(r[t], n)
        for r in tables.paper()
        for t, n in tables.TASKS.items()
        if t != "openbookqa"
    )
