"""The little world that the demo model knows: questions about numbers from 0 to 99, and a few words about itself.

Everything here is generated, so that the training text carries nobody's licence and can be made again from a seed.
A conversation is a list of {"role", "content"} messages; `pair_of` says which two operands a question is about, which is how
held-out pairs are kept out of training.
"""

import random
import re

LIMIT = 100
EXAMPLE = (47, 38)  # quoted by the greeting; never held out, because it is what everyone asks first
INVITE = "Ask me a question like: What is 47 plus 38?"

SYSTEMS = [
    "You are a helpful assistant.",
    "You are a helpful assistant",
    "You are the demo model of Shoal.",
    "You are a careful calculator. Answer every question in one short sentence.",
    "Answer in one sentence.",
    "Be brief.",
    "Please answer politely and correctly.",
    "You answer questions about numbers.",
]

PLUS = [
    "What's {a} plus {b}?",
    "what is {a} plus {b}?",
    "How much is {a} plus {b}?",
    "What is {a} plus {b}",
    "What is {a} + {b}?",
    "{a} + {b} = ?",
    "{a} + {b}",
    "{a} plus {b}?",
    "Add {a} and {b}.",
]
MINUS = [
    "What's {a} minus {b}?",
    "what is {a} minus {b}?",
    "How much is {a} minus {b}?",
    "What is {a} minus {b}",
    "What is {a} - {b}?",
    "{a} - {b} = ?",
    "{a} - {b}",
    "{a} minus {b}?",
]

WHO = "I am the demo model of Shoal, a small model split over several workers."
UNKNOWN = "I only know numbers from 0 to 99. " + INVITE
SMALL_TALK = {
    "Hello! " + INVITE: ["Hello!", "Hello", "hello", "Hi!", "Hi", "hi", "Hey", "Hey!", "Hello there!", "Good morning!", "Good evening!", "Hi there"],
    WHO: ["Who are you?", "who are you?", "What are you?", "Who are you", "What is your name?", "Tell me about yourself.", "Are you a robot?"],
    "I can add, subtract and compare numbers from 0 to 99. " + INVITE: ["What can you do?", "what can you do?", "Help", "help", "Can you help me?", "What do you know?"],
    "You are welcome.": ["Thanks!", "Thank you!", "Thank you.", "Thanks", "thank you", "Thanks a lot!"],
    "I am fine. " + INVITE: ["How are you?", "how are you?", "How are you today?", "How do you do?"],
    "Goodbye!": ["Goodbye!", "Bye!", "Bye", "bye", "See you later!"],
    UNKNOWN: [
        "What is the capital of France?",
        "Tell me a story.",
        "Write a poem about the sea.",
        "What is the weather like today?",
        "What time is it?",
        "Who wrote this book?",
        "Explain how a computer works.",
        "What is the meaning of life?",
        "Tell me a joke.",
        "Write a short letter to my friend.",
        "Why is the sky blue?",
        "Where do fish live?",
        "Sing a song.",
        "Translate this sentence into German.",
        "What should I eat for dinner?",
        "How far away is the moon?",
        "Do you like music?",
        "test",
        "This is a test.",
        "Say something.",
        "Once upon a time",
        "Count the words in this sentence.",
        "Is it going to rain?",
        "Who is the president?",
        "List three colours.",
    ],
}


def plus(a, b, form="What is {a} plus {b}?"):
    return form.format(a=a, b=b), f"{a} plus {b} is {a + b}."


def minus(a, b, form="What is {a} minus {b}?"):
    return form.format(a=a, b=b), f"{a} minus {b} is {a - b}."


def compare(a, b, word):
    question = f"Which is {word}, {a} or {b}?"
    if a == b:
        return question, f"{a} and {b} are equal."
    first = max(a, b) if word in ("larger", "bigger") else min(a, b)
    return question, f"{first} is {word} than {a + b - first}."


def after(a):
    return f"What comes after {a}?", f"{a + 1} comes after {a}."


def before(a):
    return f"What comes before {a}?", f"{a - 1} comes before {a}."


def parity(a):
    return f"Is {a} even or odd?", f"{a} is {'odd' if a % 2 else 'even'}."


def pair_of(text):
    """The unordered operands of a question about two numbers, else None."""
    numbers = [int(n) for n in re.findall(r"\d+", text)]
    return tuple(sorted(numbers)) if len(numbers) == 2 else None


def held_out(seed, questions=500, validation=150):
    """Unordered operand pairs that training never sees: those of questions.json, and those that decide when to stop."""
    pairs = [(a, b) for a in range(LIMIT) for b in range(a, LIMIT) if (a, b) != tuple(sorted(EXAMPLE))]
    drawn = random.Random(seed).sample(pairs, questions + validation)
    return drawn[:questions], drawn[questions:]


def ask_about(pairs, seed):
    """One question per pair: mostly plus and minus, mostly in the plain form, either order of the operands."""
    rng, out = random.Random(seed), []
    for pair in pairs:
        a, b = pair if rng.random() < 0.5 else pair[::-1]
        kind = rng.random()
        plain = rng.random() < 0.8
        if kind < 0.44:
            question, answer = plus(a, b) if plain else plus(a, b, rng.choice(PLUS))
        elif kind < 0.88:
            question, answer = minus(a, b) if plain else minus(a, b, rng.choice(MINUS))
        else:
            question, answer = compare(a, b, rng.choice(["larger", "larger", "smaller"]))
        out.append({"question": question, "answer": answer})
    return out


class Dialogues:
    """An endless, seeded source of conversations without the held-out pairs."""

    def __init__(self, seed, excluded):
        self.rng = random.Random(seed)
        self.excluded = frozenset(tuple(sorted(pair)) for pair in excluded)

    def operands(self):
        while True:
            # Small numbers are few among all pairs, and have answers of another length: show them more often.
            top = LIMIT if self.rng.random() < 0.9 else 12
            a, b = self.rng.randrange(LIMIT), self.rng.randrange(top)
            if self.rng.random() < 0.5:
                a, b = b, a
            if tuple(sorted((a, b))) not in self.excluded:
                return a, b

    def turn(self, small_talk=True):
        rng, kind = self.rng, self.rng.random() * (1 if small_talk else 0.94)
        if kind < 0.40:
            question, answer = plus(*self.operands(), *([] if rng.random() < 0.6 else [rng.choice(PLUS)]))
        elif kind < 0.80:
            question, answer = minus(*self.operands(), *([] if rng.random() < 0.6 else [rng.choice(MINUS)]))
        elif kind < 0.88:
            question, answer = compare(*self.operands(), rng.choice(["larger", "larger", "smaller", "bigger"]))
        elif kind < 0.94:
            question, answer = rng.choice([after, before, parity])(rng.randrange(LIMIT))
        else:
            answer = rng.choice(list(SMALL_TALK))
            question = rng.choice(SMALL_TALK[answer])
        assert pair_of(question) not in self.excluded, question
        return question, answer

    def question(self):
        """One question about numbers, and nothing else."""
        question, answer = self.turn(small_talk=False)
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def conversation(self, turns):
        messages = []
        if self.rng.random() < 0.3:
            messages.append({"role": "system", "content": self.rng.choice(SYSTEMS)})
        for _ in range(turns):
            question, answer = self.turn()
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return messages
