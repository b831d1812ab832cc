#!/usr/bin/env python3
"""Writes a randomly initialised checkpoint with the shapes of Qwen2.5-0.5B (about 1 GB in bf16) and two corpora.

    python make_checkpoint.py FOLDER [--texts 64] [--layers 24] [--seed 0]

Timing needs the shapes, not the training; no value is zero or special. The tokenizer knows syllables, so a text
of n syllables is exactly n tokens; their ids lie all over the vocabulary.
  corpus.jsonl  every text has exactly 128 tokens (no padding for anybody)
  ragged.jsonl  16 to 512 tokens, uniform
"""
import argparse, json, random
from pathlib import Path

import torch
from safetensors.torch import save_file

D, I, L, H, K, V = 896, 4864, 24, 14, 2, 151936


def weights(layers, seed):
    gen = torch.Generator().manual_seed(seed)
    hd = D // H

    def normal(*shape, std=0.02):
        return (torch.randn(*shape, generator=gen) * std).to(torch.bfloat16)

    tensors = {"model.embed_tokens.weight": normal(V, D), "model.norm.weight": torch.ones(D, dtype=torch.bfloat16)}
    for i in range(layers):
        p = f"model.layers.{i}."
        for name, rows in ("q", H * hd), ("k", K * hd), ("v", K * hd):
            tensors[f"{p}self_attn.{name}_proj.weight"] = normal(rows, D)
            tensors[f"{p}self_attn.{name}_proj.bias"] = normal(rows, std=0.1)
        tensors[f"{p}self_attn.o_proj.weight"] = normal(D, H * hd)
        tensors[f"{p}mlp.gate_proj.weight"] = normal(I, D)
        tensors[f"{p}mlp.up_proj.weight"] = normal(I, D)
        tensors[f"{p}mlp.down_proj.weight"] = normal(D, I)
        for norm in "input_layernorm", "post_attention_layernorm":
            tensors[f"{p}{norm}.weight"] = torch.ones(D, dtype=torch.bfloat16)
    return tensors


def config(layers):
    return dict(architectures=["Qwen2ForCausalLM"], attention_dropout=0.0, bos_token_id=0, eos_token_id=0, hidden_act="silu",
                hidden_size=D, initializer_range=0.02, intermediate_size=I, max_position_embeddings=32768, max_window_layers=layers,
                model_type="qwen2", num_attention_heads=H, num_hidden_layers=layers, num_key_value_heads=K, rms_norm_eps=1e-06,
                rope_theta=1000000.0, sliding_window=32768, tie_word_embeddings=True, torch_dtype="bfloat16", use_cache=True,
                use_sliding_window=False, vocab_size=V)


CONSONANTS = "bcdfghjklmnpqrstvwxyz"
VOWELS = "aeiou"
SYLLABLES = [c + v for c in CONSONANTS + CONSONANTS.upper() for v in VOWELS + VOWELS.upper()]


def tokenizer(folder, rng):
    """Byte-level BPE, the only kind this model_type takes, whose merges are the syllables: a run of n syllables is n
    tokens. Ids lie all over the vocabulary, so that the embedding and the head are read as with real text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + SYLLABLES
    vocab = dict(zip(tokens, rng.sample(range(V), len(tokens))))
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(s) for s in SYLLABLES]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="Qwen2Tokenizer", model_max_length=32768, add_bos_token=False), indent=2))


def corpus(path, lengths, rng):
    with open(path, "w") as f:
        for n in lengths:
            f.write(json.dumps({"text": "".join(rng.choice(SYLLABLES) for _ in range(n))}) + "\n")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path)
    p.add_argument("--texts", type=int, default=64)
    p.add_argument("--length", type=int, default=128, help="tokens of every text of corpus.jsonl")
    p.add_argument("--layers", type=int, default=L, help="fewer layers make a smaller checkpoint")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    corpus(args.folder / "corpus.jsonl", [args.length] * args.texts, rng)
    corpus(args.folder / "ragged.jsonl", [rng.randint(16, 512) for _ in range(args.texts)], rng)
    tokenizer(args.folder, rng)
    (args.folder / "config.json").write_text(json.dumps(config(args.layers), indent=2) + "\n")
    tensors = weights(args.layers, args.seed)
    save_file(tensors, str(args.folder / "model.safetensors"), metadata={"format": "pt"})
    print(f"{args.folder}: {sum(t.numel() for t in tensors.values()):,} parameters, {args.texts} texts of {args.length} tokens")


if __name__ == "__main__":
    main()
