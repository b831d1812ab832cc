#!/usr/bin/env python3
"""Writes a randomly initialised checkpoint with the shapes of a known model, in bf16, and two corpora.

    python make_checkpoint.py FOLDER [--shape qwen2.5-0.5b] [--texts 64] [--layers 24] [--seed 0]

Timing needs the shapes, not the training; no value is zero or special. The tokenizer knows syllables, so a text
of n syllables is exactly n tokens; their ids lie all over the vocabulary.
  corpus.jsonl  every text has exactly 128 tokens (no padding for anybody)
  ragged.jsonl  16 to 512 tokens, uniform
"""
import argparse, json, random
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {
    "qwen2.5-0.5b": dict(family="qwen2", D=896, I=4864, L=24, H=14, K=2, Hd=64, V=151936, tied=True, theta=1000000.0, eps=1e-06, positions=32768),
    "llama-3-8b": dict(family="llama", D=4096, I=14336, L=32, H=32, K=8, Hd=128, V=128256, tied=False, theta=500000.0, eps=1e-05, positions=8192),
    # A mixture of 8 experts, 2 for each token, and a dense model of the same work for each token.
    "experts": dict(family="mixtral", D=1024, I=1792, L=6, H=16, K=4, Hd=64, V=8192, E=8, top=2, tied=False, theta=1000000.0, eps=1e-05, positions=8192),
    "as-many-flops": dict(family="llama", D=1024, I=3584, L=6, H=16, K=4, Hd=64, V=8192, tied=False, theta=1000000.0, eps=1e-05, positions=8192),
    # For trying out what uses them.
    "tiny-qwen": dict(family="qwen2", D=64, I=160, L=3, H=4, K=2, Hd=16, V=1024, tied=True, theta=1000000.0, eps=1e-06, positions=32768),
    "tiny-llama": dict(family="llama", D=128, I=256, L=3, H=4, K=2, Hd=32, V=1024, tied=False, theta=500000.0, eps=1e-05, positions=8192),
}
LEAST, MOST = 16, 512  # tokens of a ragged text
SHARD_BYTES = 5 << 30


def layout(shape):
    """Name, dimensions and standard deviation of every tensor; None: all ones, a norm's."""
    D, I, H, K, Hd, V = (shape[letter] for letter in ("D", "I", "H", "K", "Hd", "V"))
    yield "model.embed_tokens.weight", (V, D), 0.02
    yield "model.norm.weight", (D,), None
    for i in range(shape["L"]):
        p = f"model.layers.{i}."
        for name, rows in ("q", H * Hd), ("k", K * Hd), ("v", K * Hd):
            yield f"{p}self_attn.{name}_proj.weight", (rows, D), 0.02
            if shape["family"] == "qwen2":
                yield f"{p}self_attn.{name}_proj.bias", (rows,), 0.1
        yield f"{p}self_attn.o_proj.weight", (D, H * Hd), 0.02
        if shape["family"] == "mixtral":
            moe = f"{p}block_sparse_moe."
            yield f"{moe}gate.weight", (shape["E"], D), 0.02
            for e in range(shape["E"]):
                for name, dims in ("w1", (I, D)), ("w3", (I, D)), ("w2", (D, I)):
                    yield f"{moe}experts.{e}.{name}.weight", dims, 0.02
        else:
            yield f"{p}mlp.gate_proj.weight", (I, D), 0.02
            yield f"{p}mlp.up_proj.weight", (I, D), 0.02
            yield f"{p}mlp.down_proj.weight", (D, I), 0.02
        for norm in "input_layernorm", "post_attention_layernorm":
            yield f"{p}{norm}.weight", (D,), None
    if not shape["tied"]:
        yield "lm_head.weight", (V, D), 0.02


def weights(folder, shape, seed, device):
    """Writes the tensors, a shard at a time, and returns how many parameters they are."""
    shards, size = [[]], 0
    for name, dims, std in layout(shape):
        size += 2 * torch.Size(dims).numel()
        if size > SHARD_BYTES:
            shards.append([])
            size = 2 * torch.Size(dims).numel()
        shards[-1].append((name, dims, std))
    gen = torch.Generator(device).manual_seed(seed)
    index, parameters = {}, 0
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name, dims, std in shard:
            tensor = torch.ones(dims, device=device) if std is None else torch.randn(dims, generator=gen, device=device) * std
            tensors[name] = tensor.to(torch.bfloat16).cpu()
            index[name] = file
            parameters += tensor.numel()
        save_file(tensors, str(folder / file), metadata={"format": "pt"})
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps(
            dict(metadata=dict(total_size=2 * parameters), weight_map=index), indent=2) + "\n")
    return parameters


def config(shape):
    common = dict(attention_dropout=0.0, bos_token_id=0, eos_token_id=0, hidden_act="silu", hidden_size=shape["D"], initializer_range=0.02,
                  intermediate_size=shape["I"], max_position_embeddings=shape["positions"], num_attention_heads=shape["H"],
                  num_hidden_layers=shape["L"], num_key_value_heads=shape["K"], rms_norm_eps=shape["eps"], rope_theta=shape["theta"],
                  tie_word_embeddings=shape["tied"], torch_dtype="bfloat16", use_cache=True, vocab_size=shape["V"])
    if shape["family"] == "qwen2":
        return dict(common, architectures=["Qwen2ForCausalLM"], model_type="qwen2", max_window_layers=shape["L"],
                    sliding_window=32768, use_sliding_window=False)
    if shape["family"] == "mixtral":
        return dict(common, architectures=["MixtralForCausalLM"], model_type="mixtral", num_local_experts=shape["E"],
                    num_experts_per_tok=shape["top"], sliding_window=None, output_router_logits=False)
    return dict(common, architectures=["LlamaForCausalLM"], model_type="llama", attention_bias=False, mlp_bias=False, rope_scaling=None)


CONSONANTS = "bcdfghjklmnpqrstvwxyz"
VOWELS = "aeiou"
SYLLABLES = [c + v for c in CONSONANTS + CONSONANTS.upper() for v in VOWELS + VOWELS.upper()]


def tokenizer(folder, shape, rng):
    """Byte-level BPE, the only kind that Qwen2's class takes, whose merges are the syllables: a run of n syllables is n
    tokens. Ids lie all over the vocabulary, so that the embedding and the head are read as with real text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + SYLLABLES
    vocab = dict(zip(tokens, rng.sample(range(shape["V"]), len(tokens))))
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(s) for s in SYLLABLES]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="Qwen2Tokenizer" if shape["family"] == "qwen2" else "PreTrainedTokenizerFast",
        model_max_length=shape["positions"], add_bos_token=False), indent=2))


def corpus(path, lengths, rng):
    with open(path, "w") as f:
        for n in lengths:
            f.write(json.dumps({"text": "".join(rng.choice(SYLLABLES) for _ in range(n))}) + "\n")


def make(folder, shape, texts, ragged_texts, length=128, seed=0, device="cpu"):
    """The whole checkpoint; returns how many parameters it has."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    corpus(folder / "corpus.jsonl", [length] * texts, rng)
    corpus(folder / "ragged.jsonl", [rng.randint(LEAST, MOST) for _ in range(ragged_texts)], rng)
    tokenizer(folder, shape, rng)
    (folder / "config.json").write_text(json.dumps(config(shape), indent=2) + "\n")
    return weights(folder, shape, seed, device)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path)
    p.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    p.add_argument("--texts", type=int, default=64)
    p.add_argument("--length", type=int, default=128, help="tokens of every text of corpus.jsonl")
    p.add_argument("--layers", type=int, help="fewer layers make a smaller checkpoint")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    shape = dict(SHAPES[args.shape], **(dict(L=args.layers) if args.layers else {}))
    parameters = make(args.folder, shape, args.texts, args.texts, args.length, args.seed)
    print(f"{args.folder}: {parameters:,} parameters, {args.texts} texts of {args.length} tokens")


if __name__ == "__main__":
    main()
