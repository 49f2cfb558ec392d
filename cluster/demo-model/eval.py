#!/usr/bin/env python3
"""Asks the demo model its held-out questions and prints the share of exact answers (float32, eager attention, greedy)."""

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dialogue

HERE = Path(__file__).resolve().parent


def answers(model, tokenizer, conversations):
    """The greedy answer to each conversation. Prompts of one length go together, so that nothing is padded."""
    prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in conversations]
    by_length = defaultdict(list)
    for i, ids in enumerate(tokenizer(prompts, add_special_tokens=False)["input_ids"]):
        by_length[len(ids)].append((i, ids))
    out = [None] * len(conversations)
    for group in by_length.values():
        for start in range(0, len(group), 250):
            part = group[start : start + 250]
            ids = torch.tensor([ids for _, ids in part])
            made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False)
            for (i, prompt), row in zip(part, made):
                out[i] = tokenizer.decode(row[len(prompt) :], skip_special_tokens=True)
    return out


def report(name, model, tokenizer, conversations, expected):
    got = answers(model, tokenizer, conversations)
    wrong = [(c[-1]["content"], e, g) for c, e, g in zip(conversations, expected, got) if e != g]
    print(f"{name}: {len(got) - len(wrong)} of {len(got)} exact ({100 * (1 - len(wrong) / len(got)):.2f} %)")
    for question, right, said in wrong[:10]:
        print(f"  {question!r}: expected {right!r}, got {said!r}")


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="also every sum and difference, conversations, and small talk (minutes)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(HERE)
    model = AutoModelForCausalLM.from_pretrained(HERE, dtype=torch.float32, attn_implementation="eager").eval()

    questions = json.loads((HERE / "questions.json").read_text())
    asked = [q["question"] for q in questions]
    expected = [q["answer"] for q in questions]
    report("questions.json", model, tokenizer, [[user(q)] for q in asked], expected)
    rng = random.Random(5)
    before = [rng.sample(questions, 2) for _ in questions]
    turns = [[m for q in two for m in (user(q["question"]), assistant(q["answer"]))] for two in before]
    report("the same as third question of a conversation", model, tokenizer, [t + [user(q)] for t, q in zip(turns, asked)], expected)
    if not args.all:
        return

    system = [{"role": "system", "content": dialogue.SYSTEMS[0]}]
    report("the same after a system message", model, tokenizer, [system + [user(q)] for q in asked], expected)
    pairs = [(a, b) for a in range(dialogue.LIMIT) for b in range(dialogue.LIMIT)]
    for name, made in [
        ("every sum", [dialogue.plus(a, b) for a, b in pairs]),
        ("every difference", [dialogue.minus(a, b) for a, b in pairs]),
        ("every larger", [dialogue.compare(a, b, "larger") for a, b in pairs]),
        ("after, before, even or odd", [f(a) for f in (dialogue.after, dialogue.before, dialogue.parity) for a in range(dialogue.LIMIT)]),
        ("small talk", [(q, a) for a, qs in dialogue.SMALL_TALK.items() for q in qs]),
    ]:
        report(name, model, tokenizer, [[user(q)] for q, _ in made], [a for _, a in made])


if __name__ == "__main__":
    main()
