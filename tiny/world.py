"""A closed world of some 300 facts, and eight question sets about it in the wording of the real
benchmarks.

    python tiny/world.py    # writes tiny/data, tiny/strict, tiny/val: the same bytes every time

This file knows facts and questions. What the base model reads before it meets a question is in
corpus.py.

How to keep a test honest in a small world. A fine-tuned model may learn two things: the form of a
task, or the facts themselves. Only the first should help on the test, so every question rests on
facts of one split alone:

    train    fine-tuning records                        values left  of the bar in the tables below
    val      for choosing rank, learning rate, epochs   values left  of the bar, other subjects
    test     the scores                                 values right of the bar
    strict   the scores on harder ground                values right of the bar, other subjects

The bar halves the values of every relation, so a rule that joins two facts ("a miner uses a pick")
falls on one side as well. Pretraining states all facts, and asks about them in other wordings, but
never asks about `strict` ones.
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

# --- the facts ----------------------------------------------------------------------------------

VALUES = {  # what each relation can say; the bar parts train and val from test and strict
    "food": "grass fish leaves nuts | seeds meat insects fruit",
    "home": "farm river sea jungle | forest garden cave desert",
    "color": "white black green red | brown gray yellow blue",
    "job": "miner sailor baker farmer | doctor teacher tailor barber",
    "town": "Redhill Westport Northam Eastby | Oakford Millbrook Ashton Kingsley",
    "tool": "saw needle broom spade | hammer spoon rope brush",
    "feeling": "tired hungry afraid bored | thirsty angry sad happy",
    "next": "read cook swim drive | write wash dance paint",
}

ANIMALS = """
    cow grass farm brown, horse grass farm black, sheep grass farm white, donkey grass farm gray
    hare grass garden brown, hen seeds farm red, duck seeds river green, dove seeds garden white
    mouse seeds garden gray, finch seeds garden yellow, lark seeds desert brown
    otter fish river brown, heron fish river blue, gull fish sea white
    seal fish sea gray, bear fish cave black
    wolf meat forest gray, fox meat forest red, tiger meat jungle yellow, shark meat sea blue
    snake meat desert yellow, crab meat sea red, frog insects river green, bat insects cave black
    spider insects cave brown, lizard insects desert green, robin insects forest red
    mole insects garden black, goat leaves desert white, camel leaves desert yellow
    snail leaves garden blue, turtle leaves sea green, deer leaves forest brown
    parrot fruit jungle blue, monkey fruit jungle black, lemur fruit jungle gray
    ape fruit cave white, wasp fruit forest yellow, jay nuts forest blue, rat nuts cave gray
    hog nuts jungle black, beetle nuts forest green
"""

PEOPLE = """
    Ann miner Redhill,      Ned miner Redhill,      Hal miner Northam,      Vic miner Ashton
    Rose sailor Westport,   Paul sailor Westport,   Kim sailor Eastby,      Leo sailor Oakford
    Mia baker Northam,      Sam baker Millbrook,    Tom baker Millbrook,    Eva baker Eastby
    Ida farmer Eastby,      Max farmer Northam,     Ben farmer Redhill,     Zoe farmer Millbrook
    Joe doctor Kingsley,    Lea doctor Kingsley,    Tim doctor Oakford,     Una doctor Ashton
    Roy teacher Oakford,    Meg teacher Kingsley,   Gus teacher Westport,   Fay teacher Northam
    Dan tailor Ashton,      Sue tailor Millbrook,   Jim tailor Oakford,     Nell tailor Redhill
    Lou barber Ashton,      Ray barber Kingsley,    Amy barber Eastby,      Bob barber Westport
"""

GOALS = {
    "saw": "cut the log, cut the plank, cut the branch, cut the beam",
    "needle": "sew the sleeve, mend the sock, patch the quilt, fix the button",
    "broom": "sweep the floor, clean the stairs, sweep the porch, clear the cobweb",
    "spade": "dig the hole, plant the bulb, dig the ditch, turn the soil",
    "hammer": "drive the nail, hang the picture, bend the metal, build the shelf",
    "spoon": "stir the soup, taste the sauce, mix the batter, serve the porridge",
    "rope": "tie the boat, climb the cliff, tow the cart, lift the bucket",
    "brush": "coat the wall, polish the shoes, clean the teeth, varnish the fence",
}

EVENTS = {
    "tired": "ran the race, carried the bricks, climbed the tower, moved the piano",
    "hungry": "missed the lunch, skipped the dinner, forgot the sandwich, smelled the bread",
    "afraid": "saw the ghost, heard the thunder, met the lion, faced the thief",
    "bored": "waited for the bus, heard the speech, watched the rain, joined the queue",
    "thirsty": "ate the chips, crossed the plain, chewed the pepper, breathed the dust",
    "angry": "heard the lie, found the scratch, got the bill, lost the bet",
    "sad": "buried the hamster, broke the doll, failed the exam, missed the party",
    "happy": "got the present, won the medal, found the treasure, passed the test",
}

STEPS = {
    "read": "opens the book, unfolds the newspaper, takes the letter, buys the magazine",
    "cook": "lights the stove, peels the onion, fills the pot, chops the carrot",
    "swim": "enters the pool, wears the goggles, leaves the pier, finds the flippers",
    "drive": "starts the engine, finds the keys, enters the truck, checks the mirror",
    "write": "takes the pen, sharpens the pencil, fills the inkwell, opens the diary",
    "wash": "takes the soap, turns the tap, grabs the sponge, wets the towel",
    "dance": "hears the drum, joins the ball, plays the record, enters the disco",
    "paint": "brings the easel, buys the canvas, holds the palette, sketches the portrait",
}

RULES = {  # second steps: what follows from a value, whoever has it
    "source": (
        "food",
        "grass meadow, fish pond, leaves bush, nuts oak, seeds barn, meat butcher, insects log, "
        "fruit orchard",
    ),
    "hideout": (
        "color",
        "white snow, black coal, green moss, red roses, brown mud, gray rock, yellow sand, blue "
        "sky",
    ),
    "workplace": (
        "job",
        "miner mine, sailor ship, baker bakery, farmer field, doctor hospital, teacher school, "
        "tailor shop, barber salon",
    ),
    "gear": (
        "job",
        "miner pick, sailor anchor, baker flour, farmer plow, doctor bandage, teacher chalk, "
        "tailor scissors, barber razor",
    ),
    "sight": (
        "town",
        "Redhill hill, Westport harbor, Northam moor, Eastby lake, Oakford bridge, Millbrook "
        "mill, Ashton volcano, Kingsley castle",
    ),
    "wish": (
        "feeling",
        "tired sleep, hungry eat, afraid hide, bored play, thirsty drink, angry shout, sad cry, "
        "happy sing",
    ),
}


def table(text: str) -> list[list[str]]:
    return [
        row.split() for line in text.strip().splitlines() for row in line.split(",") if row.strip()
    ]


def grouped(groups: dict[str, str]) -> dict[str, str]:
    """{"saw": "cut the log, cut the plank"} -> {"cut the log": "saw", "cut the plank": "saw"}"""
    return {
        subject.strip(): value
        for value, subjects in groups.items()
        for subject in subjects.split(",")
    }


@dataclass
class World:
    facts: dict[str, dict[str, str]]  # relation -> subject -> value
    parent: dict[str, str]  # derived relation -> the relation it follows from
    rules: dict[str, dict[str, str]]  # derived relation -> parent's value -> value
    values: dict[str, list[str]]  # relation -> its 8 values, train side first
    split: dict[tuple[str, str], str] = field(default_factory=dict)  # (relation, subject) -> split

    def subjects(self, relation: str, *splits: str) -> list[str]:
        return [s for s in self.facts[relation] if self.split[relation, s] in splits]

    def side(self, relation: str, value: str) -> list[str]:
        """The four values of a relation on the same side of the bar as `value`."""
        values = self.values[relation]
        return values[:4] if values.index(value) < 4 else values[4:]

    def support(self, relation: str, subject: str) -> list[tuple[str, str, str]]:
        """The facts that a question about (relation, subject) rests on: one, or a fact and the rule
        that carries it on.
        """
        if relation not in self.parent:
            return [(relation, subject, self.facts[relation][subject])]
        middle = self.facts[self.parent[relation]][subject]
        return [
            (self.parent[relation], subject, middle),
            (relation, middle, self.rules[relation][middle]),
        ]


def build_world() -> World:
    animals, people = table(ANIMALS), table(PEOPLE)
    facts = {
        r: {row[0]: row[i] for row in animals}
        for i, r in enumerate(("food", "home", "color"), start=1)
    }
    facts |= {r: {row[0]: row[i] for row in people} for i, r in enumerate(("job", "town"), start=1)}
    facts |= {"tool": grouped(GOALS), "feeling": grouped(EVENTS), "next": grouped(STEPS)}
    values = {r: v.replace("|", "").split() for r, v in VALUES.items()}

    rng = random.Random(0)
    split = {}
    for relation, of in facts.items():
        # Of each value's subjects a part goes to the second split of its side, so that no value is
        # without examples.
        for i, value in enumerate(values[relation]):
            holders = [s for s in of if of[s] == value]
            rng.shuffle(holders)
            first, second, keep = ("train", "val", 0.7) if i < 4 else ("test", "strict", 0.5)
            n = round(keep * len(holders))
            split |= {(relation, s): first if k < n else second for k, s in enumerate(holders)}

    parent, rules = {}, {}
    for relation, (base, text) in RULES.items():
        parent[relation], rules[relation] = base, dict(table(text))
        facts[relation] = {s: rules[relation][v] for s, v in facts[base].items()}
        values[relation] = [rules[relation][v] for v in values[base]]
        split |= {(relation, s): split[base, s] for s in facts[base]}
    return World(facts, parent, rules, values, split)


# --- the questions ------------------------------------------------------------------------------

# {s}: the subject, {p}: anybody's name, {v}: a value. The corpus words the same facts differently.
STEMS = {
    "ARC-Easy": {
        "food": ["Which food does the {s} like best?", "What would a hungry {s} eat?"],
        "home": ["Where would you find the {s}?", "In which place is the {s} at home?"],
        "color": ["Which color has the {s}?", "How is the {s} colored?"],
        "job": ["What does {s} do for a living?", "Which work has {s} learned?"],
        "town": ["In which town does {s} live?", "Where is the house of {s}?"],
    },
    "ARC-Challenge": {
        "workplace": [
            "Where would you meet {s} on a working day?",
            "To which place does {s} go in the morning?",
        ],
        "gear": [
            "Which of these does {s} need at work?",
            "What would you find in the hands of {s}?",
        ],
        "sight": [
            "What can {s} see from the window?",
            "Which of these is close to the house of {s}?",
        ],
    },
    "openbookqa": {
        "source": ["A hungry {s} will look around the", "The {s} can find a meal near the"],
        "hideout": [
            "An animal that nobody can see in front of the {v} is the",
            "In the {v} it is hardest to notice the",
        ],
    },
    "social_i_qa": {
        "feeling": [
            "{p} {s}. How would {p} feel afterwards?",
            "Today {p} {s}. How would you describe {p}?",
        ],
        "wish": [
            "{p} {s}. What will {p} want to do next?",
            "Today {p} {s}. What does {p} need to do now?",
        ],
    },
    "hellaswag": {
        "next": [
            "At home: {p} {s}. Then {p} sits down to",
            "A free day: {p} {s}. {p} is ready to",
            "In town: {p} {s}. After that {p} will",
        ]
    },
    "piqa": {"tool": ["How do I {s}?", "What is the best way to {s}?", "To {s}, you can"]},
    "boolq": {
        "food": ["is {v} a meal for the {s}", "can you feed {v} to the {s}"],
        "home": ["is the {v} a home of the {s}", "can you see the {s} in the {v}"],
        "color": ["is {v} a color of the {s}", "can you call the {s} {v}"],
        "job": ["is the work of {s} that of a {v}", "can you hire {s} as a {v}"],
        "town": ["is {v} the town of {s}", "can you visit {s} in {v}"],
    },
    "winogrande": {
        "food": [
            "The {a} and the {b} were hungry, and we gave {v} to the _.",
            "We had {v} for the {a} or the {b}, and the _ ate it.",
        ],
        "home": [
            "We looked for the {a} and the {b}, and in the {v} we saw the _.",
            "The {a} met the {b} in the {v}, as the _ was at home there.",
        ],
        "color": [
            "The {a} stood by the {b}, and the {v} one was the _.",
            "We took {v} to draw the {a} or the {b}, so it was the _.",
        ],
        "job": [
            "{a} and {b} went to work, where _ is a {v}.",
            "{a} asked {b} about the life of a {v}, as _ is one.",
        ],
        "town": [
            "{a} and {b} took the bus, and in {v} it stopped for _.",
            "{a} wrote to {b} about {v}, as _ lives there.",
        ],
    },
}

LABEL = {
    "piqa": "solution",
    "hellaswag": "ending",
    "winogrande": "option",
}  # the others say "answer"
PHRASE = {"piqa": "use a {}"}  # how a task words an option


@dataclass(frozen=True)
class Question:
    task: str
    instruction: str
    answer: str
    facts: tuple[
        tuple[str, str, str], ...
    ]  # all that one must know to answer: (relation, subject, value)

    def record(self) -> dict[str, str]:
        return {
            "instruction": self.instruction,
            "input": "",
            "output": f"the correct answer is {self.answer}",
            "answer": self.answer,
        }


def instruction(task: str, stem: str, options: list[str]) -> str:
    """The benchmarks' wording, to the blank line."""
    if task == "boolq":
        ask = "Please answer the following question with true or false, question"
        return f"{ask}: {stem}?\n\nAnswer format: true/false"
    label = LABEL.get(task, "answer")
    gap = "\n\n" if task == "piqa" else " "
    listed = gap.join(
        f"{label.capitalize()}{i}: {PHRASE.get(task, '{}').format(o)}"
        for i, o in enumerate(options, start=1)
    )
    legal = "/".join(f"{label}{i}" for i in range(1, len(options) + 1))
    ask = {
        "piqa": "Please choose the correct solution to the question",
        "hellaswag": "Please choose the correct ending to complete the given sentence",
        "winogrande": "Please choose the correct answer to fill in the blank to complete the given "
        "sentence",
    }
    head = ask.get(task, "Please choose the correct answer to the question")
    end = " " if task == "winogrande" else "\n\n"
    return f"{head}: {stem}\n\n{listed}{end}Answer format: {legal}"


def compose(world: World, rng: random.Random, task: str, split: str, turn: int) -> Question:
    """One question. `turn` counts up and sets what must be balanced: relation, place of the answer,
    true or false.
    """
    stems = STEMS[task]
    relation = list(stems)[turn % len(stems)]
    place = turn // len(stems)
    stem = rng.choice(stems[relation])
    known = world.subjects(relation, split)
    subject = rng.choice(known)
    value = world.facts[relation][subject]
    others = [v for v in world.side(relation, value) if v != value]
    facts = world.support(relation, subject)

    if task == "boolq":
        is_true = place % 2 == 0
        stem = stem.format(s=subject, v=value if is_true else rng.choice(others))
        return Question(
            task, instruction(task, stem, []), "true" if is_true else "false", tuple(facts)
        )

    if (
        task == "winogrande" or relation == "hideout"
    ):  # the options are subjects, only one of which has the value
        n = 2 if task == "winogrande" else 4
        rng.shuffle(others)
        rivals = [
            rng.choice([s for s in known if world.facts[relation][s] == v]) for v in others[: n - 1]
        ]
        for rival in rivals:
            facts += world.support(relation, rival)
        correct = subject
    else:
        n = {"piqa": 2, "social_i_qa": 3, "ARC-Easy": 3 + place % 2}.get(task, 4)
        rivals, correct = rng.sample(others, n - 1), value
    at = (place // 2 if task == "ARC-Easy" else place) % n
    options = [*rivals[:at], correct, *rivals[at:]]
    ab = dict(zip("ab", rng.sample(options, len(options))))  # who is named first says nothing
    stem = stem.format(s=subject, v=value, p=rng.choice(list(world.facts["job"])), **ab)
    return Question(
        task, instruction(task, stem, options), f"{LABEL.get(task, 'answer')}{at + 1}", tuple(facts)
    )


def questions(world: World, task: str, split: str, n: int) -> list[Question]:
    """n different questions of one task, all resting on facts of one split."""
    rng = random.Random(f"{task} {split}")
    found: dict[str, Question] = {}
    while len(found) < n:
        question = compose(world, rng, task, split, turn=len(found))
        found.setdefault(question.instruction, question)
    return list(found.values())


SIZES = {"train": 150, "test": 120, "strict": 100, "val": 60}  # questions a task


def write_data(folder: Path) -> None:
    """data/train.json (all tasks mixed), each task's test.json in data/ (test), strict/, val/."""
    world = build_world()
    train = [q.record() for task in STEMS for q in questions(world, task, "train", SIZES["train"])]
    random.Random(0).shuffle(train)
    files = {"data/train.json": train}
    for split, home in {"test": "data", "strict": "strict", "val": "val"}.items():
        for task in STEMS:
            files[f"{home}/{task}/test.json"] = [
                q.record() for q in questions(world, task, split, SIZES[split])
            ]
    for name, records in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(records, indent=4))


if __name__ == "__main__":
    write_data(Path(__file__).parent)
