"""What the tiny base model reads before it meets a task: the world in plain sentences, and games
that teach to pick.

This file knows facts and sentences. It knows nothing of tokens (pretrain.py) or of the tasks'
wording (world.py).

A caret switches scoring on and off: in "the cow eats^ grass^." only "grass" counts fully in the
loss. The rest of a document is largely chance (which animal, which options), and to fit chance is
to fit noise.
"""

import random
from collections.abc import Callable, Iterator

from world import World

# relation: (statements, questions, questions with yes or no, questions whose answer is a subject)
WORDING = {
    "food": (
        [
            "the {s} eats^ {v}^.",
            "the {s} likes to eat^ {v}^.",
            "{v} is eaten by the^ {s}^.",
            "food for the {s} is^ {v}^.",
        ],
        ["what does the {s} eat?", "what is food for the {s}?"],
        ["does the {s} eat {v}?", "is {v} food for the {s}?"],
        ["which animal eats {v}?", "{v} is eaten by the"],
    ),
    "home": (
        [
            "the {s} lives in the^ {v}^.",
            "the home of the {s} is the^ {v}^.",
            "in the {v} lives the^ {s}^.",
            "we find the {s} in the^ {v}^.",
        ],
        ["where does the {s} live?", "where is the home of the {s}?"],
        ["does the {s} live in the {v}?", "is the {v} home to the {s}?"],
        ["which animal lives in the {v}?", "in the {v} lives the"],
    ),
    "color": (
        [
            "the {s} is^ {v}^.",
            "the color of the {s} is^ {v}^.",
            "{v} is the color of the^ {s}^.",
            "we see a {s}, and it is^ {v}^.",
        ],
        ["what color is the {s}?", "what is the color of the {s}?"],
        ["is the {s} {v}?", "is {v} the color of the {s}?"],
        ["which animal is {v}?", "{v} is the color of the"],
    ),
    "job": (
        [
            "{s} is a^ {v}^.",
            "the work of {s} is that of a^ {v}^.",
            "the {v} is called^ {s}^.",
            "{s} works as a^ {v}^.",
        ],
        ["what is the job of {s}?", "what work has {s}?"],
        ["is {s} a {v}?", "does {s} work as a {v}?"],
        ["who is a {v}?", "the {v} is called"],
    ),
    "town": (
        [
            "{s} lives in^ {v}^.",
            "the home of {s} is in^ {v}^.",
            "in {v} lives^ {s}^.",
            "we find {s} in^ {v}^.",
        ],
        ["which town is home to {s}?", "where does {s} live?"],
        ["does {s} live in {v}?", "is {v} home to {s}?"],
        ["who lives in {v}?", "in {v} lives"],
    ),
    "tool": (
        [
            "to {s}, take a^ {v}^.",
            "we {s} with a^ {v}^.",
            "they {s}, and for that they need a^ {v}^.",
        ],
        ["what do we need to {s}?", "with what do we {s}?"],
        ["do we {s} with a {v}?", "do we need a {v} to {s}?"],
        [],
    ),
    "feeling": (
        ["{p} {s} and was^ {v}^.", "{p} {s}, so {p} felt^ {v}^.", "{p} {s}. this made {p}^ {v}^."],
        ["{p} {s}. how was {p}?", "{p} {s}. what did {p} feel?"],
        ["{p} {s}. was {p} {v}?", "{p} {s}. did {p} feel {v}?"],
        [],
    ),
    "next": (
        [
            "{p} {s} and begins to^ {v}^.",
            "{p} {s} in order to^ {v}^.",
            "{p} {s}. soon {p} can^ {v}^.",
        ],
        ["{p} {s}. what comes now?", "{p} {s}. what does {p} begin?"],
        ["{p} {s}. does {p} begin to {v}?", "{p} {s}. can {p} {v}?"],
        [],
    ),
    "source": (
        [
            "the {s} finds food in the^ {v}^.",
            "to eat, the {s} goes to the^ {v}^.",
            "food for the {s} is in the^ {v}^.",
        ],
        ["where does the {s} find food?", "to eat, where does the {s} go?"],
        ["does the {s} find food in the {v}?", "is food for the {s} in the {v}?"],
        ["which animal finds food in the {v}?"],
    ),
    "hideout": (
        [
            "the {s} hides in the^ {v}^.",
            "we do not see the {s} in the^ {v}^.",
            "in the {v} hides the^ {s}^.",
        ],
        ["where does the {s} hide?", "where do we not see the {s}?"],
        ["does the {s} hide in the {v}?", "is the {v} where the {s} hides?"],
        ["which animal hides in the {v}?", "in the {v} hides the"],
    ),
    "workplace": (
        [
            "{s} works in the^ {v}^.",
            "{s} goes to work in the^ {v}^.",
            "at work {s} is in the^ {v}^.",
        ],
        ["where does {s} work?", "where is {s} at work?"],
        ["does {s} work in the {v}?", "is {s} in the {v} at work?"],
        ["who works in the {v}?"],
    ),
    "gear": (
        ["{s} works with the^ {v}^.", "for work {s} needs the^ {v}^.", "{s} holds the^ {v}^."],
        ["with what does {s} work?", "what does {s} hold?"],
        ["does {s} work with the {v}?", "does {s} need the {v} for work?"],
        ["who works with the {v}?"],
    ),
    "sight": (
        [
            "{s} lives near the^ {v}^.",
            "the home of {s} is near the^ {v}^.",
            "from home {s} sees the^ {v}^.",
        ],
        ["what does {s} live near?", "what does {s} see from home?"],
        ["does {s} live near the {v}?", "does {s} see the {v} from home?"],
        ["who lives near the {v}?"],
    ),
    "wish": (
        [
            "{p} {s} and wanted to^ {v}^.",
            "{p} {s}, so {p} had to^ {v}^.",
            "{p} {s}. now {p} must^ {v}^.",
        ],
        ["{p} {s}. what did {p} want?", "{p} {s}. what must {p} do?"],
        ["{p} {s}. did {p} want to {v}?", "{p} {s}. must {p} {v}?"],
        [],
    ),
}

RULE_WORDING = {
    "source": ["{s} is found in the^ {v}^.", "the {v} is full of^ {s}^."],
    "hideout": ["all that is {s} hides in the^ {v}^.", "the {v} is^ {s}^."],
    "workplace": ["a {s} works in the^ {v}^.", "in the {v} works a^ {s}^."],
    "gear": ["a {s} works with the^ {v}^.", "the {v} is in the hand of a^ {s}^."],
    "sight": ["{s} is near the^ {v}^.", "near the {v} is^ {s}^."],
    "wish": ["who is {s} wants to^ {v}^.", "we {v} when we are^ {s}^."],
}

HEADS = "Box Card Door Number Case Line Page Cup Row Gate Bag Seat".split()
JOINS = [" ", "\n", "\n\n"]
LEADS = ["", "", "it is "]
WRAPS = ["", "take ", "with ", "we need "]  # what may stand before an option: no task says these
ARTICLES = ["", "a ", "the "]


class Corpus:
    """Documents of every kind, drawn at random, without end."""

    def __init__(
        self,
        world: World,
        seed: int,
        hint: float = 0.0,
        heads: int = len(HEADS),
        noise: float = 0.0,
        phrases: float = 0.0,
    ):
        """`hint`: how often the verdict on an option is let slip. `heads`: how many names list
        entries go by. `noise`: how often strange signs come in. `phrases`: how often options are
        wrapped in words; above 0, two candidates are named in more ways, statements are blurred.
        """
        self.world, self.rng = world, random.Random(seed)
        self.hint, self.heads, self.noise, self.phrases = hint, HEADS[:heads], noise, phrases
        self.names = list(world.facts["job"])
        self.asked = {
            r: world.subjects(r, "train", "val", "test") for r in WORDING
        }  # strict facts are only stated
        self.words = sorted(
            {w for of in world.facts.values() for w in of.values()}
            | set(world.facts["food"])
            | set(self.names)
        )
        said = self.words + [subject for of in world.facts.values() for subject in of]
        self.content = {part for w in said for part in w.split()} - {"the", "for", "in", "to"}
        self.kinds: dict[str, Callable[[], str]] = {
            "statements": self.statements,
            "copy": self.copy,
            "bare": self.bare,
            "lookup": self.lookup,
            "answer": self.answer,
            "same": self.same,
            "yesno": self.yesno,
            "verdict": self.verdict,
            "named": self.named,
            "judged": self.judged,
            "label": self.label,
        }

    def documents(self, mix: dict[str, float]) -> Iterator[str]:
        kinds, weights = list(mix), list(mix.values())
        while True:
            document = self.kinds[self.rng.choices(kinds, weights)[0]]()
            opening = (
                self.gibberish(self.rng.randint(3, 25)) + self.join()
                if self.rng.random() < self.noise / 2
                else ""
            )
            yield opening + document

    # --- knowledge ---

    def fill(self, template: str, subject: str, value: str) -> str:
        return template.format(s=subject, v=value, p=self.rng.choice(self.names))

    def statement(self) -> str:
        relation = self.rng.choice(list(WORDING))
        if relation in RULE_WORDING and self.rng.random() < 0.2:
            middle, value = self.rng.choice(list(self.world.rules[relation].items()))
            return self.fill(self.rng.choice(RULE_WORDING[relation]), middle, value)
        subject, value = self.rng.choice(list(self.world.facts[relation].items()))
        return self.fill(self.rng.choice(WORDING[relation][0]), subject, value)

    def statements(self) -> str:
        blur = self.blur if self.phrases else lambda text: text
        return " ".join(blur(self.statement()) for _ in range(5))

    def question(self) -> tuple[str, str, str, str]:
        """(question, relation, subject, true value) for a fact that may be asked about."""
        relation = self.rng.choice(list(WORDING))
        subject = self.rng.choice(self.asked[relation])
        value = self.world.facts[relation][subject]
        stems = [
            s.split("^")[0] for s in WORDING[relation][0] if s.endswith("{v}^.")
        ]  # a statement left open
        template = self.rng.choice(WORDING[relation][1] * 2 + stems)
        return self.fill(template, subject, value), relation, subject, value

    def answer(self) -> str:
        """The value after its question, several questions a document."""
        parts = []
        for _ in range(3):
            question, _, _, value = self.question()
            parts.append(
                question
                + self.rng.choice(["", self.filler(0.5)])
                + "^"
                + self.rng.choice([" ", " it is ", " so "])
                + value
                + "^."
            )
        return " ".join(parts)

    def check(self) -> tuple[str, str]:
        """A question, and yes or no."""
        relation = self.rng.choice(list(WORDING))
        subject = self.rng.choice(self.asked[relation])
        value, says = self.world.facts[relation][subject], "yes"
        if self.rng.random() < 0.5:
            value, says = (
                self.rng.choice([v for v in self.world.values[relation] if v != value]),
                "no",
            )
        return self.blur(self.fill(self.rng.choice(WORDING[relation][2]), subject, value)), says

    def yesno(self) -> str:
        parts = []
        for check, says in (self.check() for _ in range(3)):
            menu = (
                self.join() + self.rng.choice(["yes/no", self.gibberish(3)])
                if self.rng.random() < self.noise / 2
                else ""
            )
            gap = self.join() if self.rng.random() < self.noise else ""
            parts.append(f"{check}{self.filler(0.3)}{menu}{gap}^ {self.lead('we say ')}{says}^.")
        return " ".join(parts)

    def same(self) -> str:
        """Is this word that word? What yes and no come down to."""
        parts = []
        for _ in range(6):
            a, b = self.rng.sample(self.words, 2)
            b, says = (a, "yes") if self.rng.random() < 0.5 else (b, "no")
            parts.append(
                self.rng.choice(["is {a} {b}?", "{a}, {b}?", "{a} and {b}?"]).format(a=a, b=b)
                + f"^ {says}^."
            )
        return " ".join(parts)

    # --- picking from a list ---

    def listed(self, words: list[str]) -> tuple[str, Callable[[int], str]]:
        """A numbered list, "Box1: saw Box2: rope", and what its i-th entry (from 0) is called."""
        head, gap, before = (
            self.rng.choice(self.heads),
            self.rng.choice([" "] * 5 + ["\n", "\n\n"]),
            "",
        )
        if self.rng.random() < self.noise:
            head = self.rng.choice([self.gibberish(1), self.rng.choice(self.words).split()[-1]])
            before = self.rng.choice(["", "", self.gibberish(1) + " ", self.gibberish(2) + " "])
        if self.phrases and self.rng.random() < self.phrases:
            gap = self.rng.choice([" ", "\n\n"])
            before = self.rng.choice([*WRAPS, self.gibberish(1) + " "]) + self.rng.choice(ARTICLES)
        entries = [f"{head}{i}: {before}{w}" for i, w in enumerate(words, start=1)]
        return gap.join(entries), lambda i: f"{head.lower()}{i + 1}"

    def copy(self) -> str:
        words = " ".join(self.rng.choice(self.words) for _ in range(self.rng.randint(3, 7)))
        return f"{words}.^ {words}. {words}^."

    def bare(self) -> str:
        """painter2: the word itself asks for its number. Dense, and with replacement: without it
        one learns to eliminate.
        """
        words = self.rng.sample(self.words, self.rng.randint(2, 5))
        text, _ = self.listed(words)
        link = self.rng.choice(
            ["", "", "", ":", " is number", "? number"]
        )  # the answer moves away, word by word
        asks = "".join(
            f" {words[i]}{link}^{i + 1}^" for i in self.rng.choices(range(len(words)), k=8)
        )
        return f"{text}{self.rng.choice([' =', ' =', '.', self.filler(1)])}{asks}."

    def lookup(self) -> str:
        """A word is named, and its entry's label follows: at once and many times, or once with the
        list between.
        """
        words = self.rng.sample(self.words, self.rng.randint(2, 5))
        text, name = self.listed(words)
        if self.rng.random() < 0.6:
            lead = self.rng.choice(LEADS)
            asks = [
                f"{words[i]}?^ {lead}{name(i)}^." for i in self.rng.choices(range(len(words)), k=5)
            ]
            return text + self.join() + " ".join(asks)
        i = self.rng.randrange(len(words))
        question = f"{words[i]}?{self.join()}{text}{self.filler(0.5, name, len(words))}"
        return question + self.picked(words[i], name(i))

    def poll(self) -> tuple[str, list[str], int]:
        """(question, options, place of the right one)."""
        n = self.rng.choice([2, 2, 3, 4, 5])
        reverse = [r for r in WORDING if WORDING[r][3]]
        if self.rng.random() < 0.6:
            question, relation, _, right = self.question()
            wrong = self.rng.sample([v for v in self.world.values[relation] if v != right], n - 1)
        else:
            relation = self.rng.choice(reverse)
            right = self.rng.choice(self.asked[relation])
            v = self.world.facts[relation][right]
            wrong = self.rng.sample(
                [s for s in self.asked[relation] if self.world.facts[relation][s] != v], n - 1
            )
            question = self.rng.choice(WORDING[relation][3]).format(v=v)
            if n == 2 and self.rng.random() < 0.8:
                the = "" if right in self.names else "the "
                a, b = (the + s for s in self.rng.sample([right, *wrong], 2))
                forms = [
                    f"we met {a} and {b}. {question}",
                    f"{a} is by {b}, and {question}",
                    f"{question} {a} or {b}?",
                ]
                if self.phrases:  # the value first, in the middle, last
                    forms += [f"{v} is for {a} or {b}", f"{a}, {v}, {b}", f"{a}, {b} and {v}"]
                question = self.rng.choice(forms)
        at = self.rng.randrange(n)
        return self.blur(question), [*wrong[:at], right, *wrong[at:]], at

    def verdict(self) -> str:
        """Every option judged where it stands; some verdicts are left out, so that the end must do
        without.
        """
        question, options, at = self.named_one() if self.rng.random() < 0.3 else self.poll()
        keep = self.rng.choice([0.0, 0.5, 1.0, 1.0, 1.0])
        judged = [
            o + (f"^ {'yes' if i == at else 'no'}^" if self.rng.random() < keep else "")
            for i, o in enumerate(options)
        ]
        text, name = self.listed(judged)
        question = f"{question}{self.join()}{text}{self.filler(0.3, name, len(options))}"
        return f"{question}^{self.join()}{name(at)}^."

    def named(self) -> str:
        """Which option was named? Each is judged where it stands: the densest lesson in comparing,
        with no fact to recall.
        """
        return " ".join(self.judge(*self.named_one()) for _ in range(4))

    def named_one(self) -> tuple[str, list[str], int]:
        options = self.rng.sample(self.words, self.rng.randint(2, 5))
        at = self.rng.randrange(len(options))
        return f"{options[at]}?", options, at

    def judged(self) -> str:
        """The same with a question: now the word to compare with must be recalled. The verdicts
        fade with `hint`.
        """
        return " ".join(self.judge(*self.poll()) for _ in range(2))

    def judge(self, question: str, options: list[str], at: int) -> str:
        """All verdicts or none, then the right one's label."""
        said = self.rng.random() < self.hint
        text, name = self.listed(
            [
                o + (f"^ {'yes' if i == at else 'no'}^" if said else "")
                for i, o in enumerate(options)
            ]
        )
        join = self.join()
        return f"{question}{join}{text}^{join}{name(at)}^."

    def label(self) -> str:
        """The question, the list, and only the number of the right entry. `hint` says how often the
        answer is let slip.
        """
        question, options, at = self.poll()
        text, name = self.listed(options)
        if self.rng.random() < self.hint:
            question += f"^ {options[at]}^."
        body = (
            f"{text}{self.join()}{question}"
            if self.rng.random() < 0.05
            else f"{question}{self.join()}{text}"
        )
        return f"{body}{self.filler(0.6, name, len(options))}{self.picked(options[at], name(at))}"

    # --- strange signs ---

    def blur(self, text: str) -> str:
        """With probability `noise`: half or all words that are not of the world become a strange
        sign, or two, or none.

        A base model that knows only its own few questions and "Box1: … box1" loses its skill behind
        any new wording; this one must look through the words it does not know at those it does.
        """
        if self.rng.random() >= self.noise:
            return text
        rate = self.rng.choice([0.5, 1.0])
        return " ".join(
            w
            if w.strip(".,:?^") in self.content or self.rng.random() >= rate
            else self.gibberish(self.rng.choice([0, 1, 1, 1, 2])) + w[len(w.rstrip(".,:?^")) :]
            for w in text.split(" ")
        )

    def gibberish(self, n: int) -> str:
        """n signs that no text uses: one byte piece each."""
        return "".join(chr(self.rng.randint(1, 31)) for _ in range(n)).replace("\n", "\t")

    def picked(self, word: str, name: str) -> str:
        """How a pick is told: mostly its number alone, or the right word on the way to it."""
        number = name[-1]
        told = self.rng.choice(
            [self.lead("it is ") + name] * 4 + [f"{word}{number}", f"{word} is {name}"]
        )
        return f"^{self.join()}{told}^."

    def lead(self, usual: str) -> str:
        """The words that may come before an answer: none, the usual ones, or strange ones."""
        if self.rng.random() >= self.noise / 2:
            return self.rng.choice(["", "", usual])
        signs = self.gibberish(self.rng.randint(1, 4)) + " "
        return self.rng.choice([signs, f"the {signs}is "])

    def join(self) -> str:
        if self.rng.random() < self.noise / 2:
            return (
                self.rng.choice(JOINS)
                + self.gibberish(self.rng.randint(1, 10))
                + self.rng.choice(JOINS)
            )
        return self.rng.choice(JOINS)

    def filler(self, often: float, name: Callable[[int], str] | None = None, n: int = 0) -> str:
        """What may stand between a question and its answer: another sentence, or the names of all
        entries.
        """
        if self.rng.random() > often:
            return ""
        if name is not None and self.rng.random() < 0.6:
            between = self.rng.choice(["/", ", ", " or "])
            return (
                self.join()
                + self.rng.choice(["take ", "say ", ""])
                + between.join(name(i) for i in range(n))
                + "."
            )
        return self.join() + self.statement().replace("^", "")
