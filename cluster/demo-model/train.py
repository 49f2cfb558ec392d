#!/usr/bin/env python3
"""Makes the demo model from nothing: tokenizer, questions, weights. Run it from anywhere; it writes into this folder.

The run is seeded, but floating point differs between CPUs, so another machine gets other weights of the same quality.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

import dialogue

HERE = Path(__file__).resolve().parent
SEED = 20240607
VOCAB = 389
SPECIAL = ["<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|pad|>"]
BEGIN, END, _, _, ASSISTANT, PAD = range(6)

TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('unknown role: ' + message['role']) }}"
    "{%- endif %}"
    "{{- '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


def render(messages):
    """What TEMPLATE renders to, without the cost of Jinja in the training loop; eval.py goes through the template itself."""
    return "<|begin|>" + "".join(f"<|{m['role']}|>{m['content'].strip()}<|end|>" for m in messages)


def write_json(name, value, **kwargs):
    (HERE / name).write_text(json.dumps(value, ensure_ascii=False, indent=1, **kwargs) + "\n")


def make_tokenizer(source):
    """Byte-level BPE: any UTF-8 text round-trips. Every digit stands alone, so that a number's digits have fixed places."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [m["content"] for _ in range(6000) for m in source.conversation(3)]
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == VOCAB, tokenizer.get_vocab_size()
    tokenizer.save(str(HERE / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[BEGIN],
        "eos_token": SPECIAL[END],
        "pad_token": SPECIAL[PAD],
        "additional_special_tokens": ["<|system|>", "<|user|>", "<|assistant|>"],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "chat_template": TEMPLATE,
    }
    write_json("tokenizer_config.json", config)
    return tokenizer


def model_config():
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=96,
        num_hidden_layers=12,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=256,
        max_position_embeddings=1024,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=PAD,
    )


def tensors(tokenizer, conversations):
    """Padded ids, and the targets: the assistant's tokens with the <|end|> that closes them; everything else is ignored."""
    rows = [e.ids for e in tokenizer.encode_batch([render(c) for c in conversations])]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), PAD)
    targets = torch.full((len(rows), width), -100)
    for r, row in enumerate(rows):
        ids[r, : len(row)] = torch.tensor(row)
        speaking = False
        for i, token in enumerate(row):
            if speaking:
                targets[r, i] = token
            speaking = token == ASSISTANT or (speaking and token != END)
    return ids[:, :-1], targets[:, 1:]


@torch.no_grad()
def exact(model, ids, targets):
    """The share of rows answered exactly. When every target is the argmax after the right prefix, greedy decoding writes just that."""
    wrong = 0
    for i, t in zip(ids.split(256), targets.split(256)):
        best = model(input_ids=i, use_cache=False).logits.argmax(-1)
        wrong += ((best != t) & (t != -100)).any(1).sum().item()
    return 1 - wrong / len(ids)


def as_stored(model):
    """The weights as they are saved: rounded to bfloat16, computed with in float32."""
    stored = LlamaForCausalLM(model.config)
    stored.load_state_dict({k: v.to(torch.bfloat16).float() for k, v in model.state_dict().items()})
    return stored.eval()


def save(model):
    state = {k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(state, HERE / "model.safetensors", metadata={"format": "pt"})
    (HERE / "model.safetensors").chmod(0o644)
    c = model.config
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_position_embeddings,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": c.tie_word_embeddings,
        "bos_token_id": BEGIN,
        "eos_token_id": END,
        "pad_token_id": PAD,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    write_json("config.json", config)
    write_json("generation_config.json", {"bos_token_id": BEGIN, "eos_token_id": [END], "pad_token_id": PAD, "do_sample": False})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="muon")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=27, help="the rate decays to its end within this time, at whatever speed")
    parser.add_argument("--checkpoint", type=Path, default=Path("/tmp/shoal-demo-model.pt"))
    parser.add_argument("--tokenizer-only", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)

    asked, watched = dialogue.held_out(SEED)
    source = dialogue.Dialogues(SEED, asked + watched)
    assert source.excluded == set(asked) | set(watched) and len(source.excluded) == len(asked) + len(watched)
    questions = dialogue.ask_about(asked, SEED)
    assert all(dialogue.pair_of(q["question"]) in source.excluded for q in questions)
    (HERE / "questions.json").write_text("[\n" + ",\n".join(json.dumps(q) for q in questions) + "\n]\n")
    tokenizer = make_tokenizer(source)
    if args.tokenizer_only:
        return

    def as_conversations(pairs):
        return [
            [{"role": "user", "content": q["question"]}, {"role": "assistant", "content": q["answer"]}]
            for seed in (1, 2)
            for q in dialogue.ask_about(pairs, seed)
        ]

    watch = tensors(tokenizer, as_conversations(watched))
    seen = tensors(tokenizer, [dialogue.Dialogues(i, source.excluded).conversation(1 + i % 3) for i in range(300)])

    model = LlamaForCausalLM(model_config())
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    if args.optimizer == "muon":
        optimizers = [
            torch.optim.Muon(matrices, lr=args.rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=args.rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]
    else:
        optimizers = [torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=args.rate, betas=(0.9, 0.98))]
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(asked)} + {len(watched)} pairs held out, {args}", flush=True)

    started, perfect, mean = time.time(), 0, None
    for step in range(args.steps):
        # Whichever runs out first, steps or time, brings the rate down: a slow machine still ends on a small rate.
        progress = max(step / args.steps, (time.time() - started) / (args.minutes * 60))
        if progress >= 1:
            break
        factor = min(1, (step + 1) / 100) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * progress)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.rate * factor
        # Single questions for the most part: that is where the arithmetic is learnt, and rows of one length waste nothing on padding.
        if step % 5:
            batch = [source.question() for _ in range(args.batch)]
        else:
            batch = [source.conversation(source.rng.choice([1, 2, 3, 3])) for _ in range(args.batch // 3)]
        ids, targets = tensors(tokenizer, batch)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        if (step + 1) % 100 == 0:
            stored = as_stored(model)
            held, known = exact(stored, *watch), exact(stored, *seen)
            print(f"step {step + 1:5} loss {mean:.4f} held-out {held:.4f} seen {known:.4f} rate {args.rate * factor:.1e} {time.time() - started:.0f} s", flush=True)
            torch.save(model.state_dict(), args.checkpoint)
            perfect = perfect + 1 if held == 1 and known == 1 else 0
            if perfect == 2 and factor < 0.3:
                break
    save(model)
    print(f"saved after {step + 1} steps, {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
