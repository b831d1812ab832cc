"""Rebuild every golden in this folder: `python tests/goldens/make.py`.

Each golden is a tiny seeded model written as a hub checkpoint folder, and the numbers that Hugging Face
transformers (eager attention, float64) gives for it. README.md beside this file has the layout.

    python tests/goldens/make.py                            everything
    python tests/goldens/make.py --only qwen2 yi            some goldens
    python tests/goldens/make.py --transformers_4 PYTHON    also the token ids of transformers 4 (an interpreter that
                                                            has it; without the flag the stored ones are kept)

Letters: N tokens, T tokens of one sample, D hidden size, V vocabulary, L layers. Losses in nats.
"""

import argparse
import copy
import json
import math
import platform
import subprocess
import sys
from pathlib import Path

import safetensors
import safetensors.torch
import tokenizers
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
BATCH_SIZE = 4
MOVES = 1e-2  # a flipped config value must move some number by more than this, relative
CONTROL = 1e-5  # float32 must agree with float64 to this, or a tolerance of 1e-4 in Rust would mean nothing
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# ---------------------------------------------------------------------------------------------------- texts

LONG_TOKEN = "<|one_token_that_is_longer_than_fifty_characters_so_it_stays|>"

# Every text is longer than 50 characters after stripping, as the scripts' filter wants, so that the whole program
# can be run on the corpus too. The one-token text of the models that add a BOS is empty, hence filtered there.
TEXTS = [
    "The river rises in the hills of the north and runs for two hundred miles to the sea.",
    "In 1998 the company sold 12,345 units, 7 % more than the year before; nobody knew why it was so.",
    "Café naïve résumé — “quoted” and ‘single’… the price was 30 €, they're said, we'll see, I'VE DONE it.",
    "def main():\n    for i in range(10):\n\t\tprint(i)\n\n\n    return None  # the end   of it  \n",
    "Emoji 🙂🚀👩‍👩‍👧 and CJK 你好，世界。こんにちは 안녕하세요 and Cyrillic Привет мир and Arabic مرحبا.",
    "the the the the and and and of of of to to to in in in a a a is is is was was was the the",
    "Decomposed e\u0301 a\u0300 n\u0303 and ligature ﬁ, zero\u200bwidth, nbsp\u00a0here, tab\there and \r\n a line ending.",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of "
    "foolishness, it was the epoch of belief, it was the epoch of incredulity, it was the season of light.",
    "He said that the hills and the sea were all that there was, and that the rest did not matter at all.",
]
LEADING_SPACE = " = The hills of the north = \n\n  They rise from the sea , and the rivers run from them @-@ slowly . \n"
INNER_SPECIAL = "one of them{eos}the other{bos} and a third one, which is there to make the text longer than fifty."

TRAINING = TEXTS + [
    "the river and the sea, the hills and the north, the times and the age, that is what it was about",
    "range return print for in main while there, other, another, their, then, them, these, those",
    "company unit year before after price season light wisdom belief said matter rest slow slowly rivers run",
    "1998 1998 1998 12,345 12,345 199 345 2019 2019",  # numbers of several digits: Llama-3 groups three, Qwen2 none
]

# ----------------------------------------------------------------------------------------------- tokenizers

QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_REGEX = QWEN2_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def added(token_id, content, special=True):
    return {
        "id": token_id, "content": content, "single_word": False, "lstrip": False,
        "rstrip": False, "normalized": False, "special": special,
    }  # fmt: skip


def byte_level(regex, vocab_size, specials):
    """Byte-level BPE as Qwen2 and Llama-3 ship it. The added tokens come after the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(regex), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    out = json.loads(tokenizer.to_str())
    first = len(out["model"]["vocab"])
    out["added_tokens"] = [added(first + i, s) for i, s in enumerate(specials)]
    return out


def qwen2_tokenizer():
    out = byte_level(QWEN2_REGEX, 400, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", LONG_TOKEN])
    out["normalizer"] = {"type": "NFC"}
    out["post_processor"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    out["model"]["merges"] = [" ".join(pair) for pair in out["model"]["merges"]]  # as files of before 2024 have them
    return out


def llama3_tokenizer():
    out = byte_level(LLAMA3_REGEX, 410, ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    out["model"]["ignore_merges"] = True
    byte_post = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    out["post_processor"] = {
        "type": "Sequence", "processors": [byte_post, template(out, "<|begin_of_text|>")],
    }  # fmt: skip
    return out


def template(tokenizer, bos=None, eos=None):
    ids = dict(tokenizer["model"]["vocab"]) | {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    special = {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in (bos, eos) if t}

    def piece(sequence, type_id):
        out = [{"SpecialToken": {"id": bos, "type_id": type_id}}] if bos else []
        out.append({"Sequence": {"id": sequence, "type_id": type_id}})
        return out + ([{"SpecialToken": {"id": eos, "type_id": type_id}}] if eos else [])

    return {
        "type": "TemplateProcessing", "single": piece("A", 0), "pair": piece("A", 0) + piece("B", 1),
        "special_tokens": special,
    }  # fmt: skip


PREPEND_REPLACE = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}


def sentencepiece(vocab_size, unk="<unk>", bos="<s>", eos="</s>", extra=(), metaspace=False):
    """BPE over ▁ words with byte fallback, as converted SentencePiece models ship it."""
    head = [unk, bos, eos, *extra] + [f"<0x{b:02X}>" for b in range(256)]
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=head, show_progress=False)
    known = ["".join(c for c in text if c.isascii() or c in "éèà—“”") for text in TRAINING]  # the rest falls to bytes
    learner.train_from_iterator(known, trainer)
    learnt = json.loads(learner.to_str())["model"]
    out = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [added(i, t) for i, t in enumerate([unk, bos, eos, *extra])],
        "normalizer": copy.deepcopy(PREPEND_REPLACE), "pre_tokenizer": None, "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE", "dropout": None, "unk_token": unk, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": learnt["vocab"], "merges": [" ".join(pair) for pair in learnt["merges"]],
        },
    }  # fmt: skip
    if metaspace:  # as transformers 5 writes it
        out["normalizer"] = None
        out["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
        out["model"]["merges"] = learnt["merges"]
    out["post_processor"] = template(out, bos)
    return out


def decoder_table(tokenizer):
    """tokenizer_config.json's added_tokens_decoder, as transformers 4 wrote it."""
    return {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in tokenizer["added_tokens"]}


def llama_tokenizer_config(tokenizer, **more):
    unk, bos, eos = (t["content"] for t in tokenizer["added_tokens"][:3])
    base = {
        "added_tokens_decoder": decoder_table(tokenizer), "bos_token": bos, "clean_up_tokenization_spaces": False,
        "eos_token": eos, "model_max_length": 1000000000000000019884624838656, "pad_token": None,
        "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer", "unk_token": unk,
        "use_default_system_prompt": False,
    }  # fmt: skip
    return base | more


# -------------------------------------------------------------------------------------------------- goldens
# Each function gives config.json, tokenizer.json, tokenizer_config.json, and how to store and to perturb it.
# `flips`: name → the config values to overwrite, or a function that edits the weights to the same effect.


def vocab_size(tokenizer):
    return 1 + max([*tokenizer["model"]["vocab"].values(), *(t["id"] for t in tokenizer["added_tokens"])])


def qwen2():
    tokenizer = qwen2_tokenizer()
    end = tokenizer["added_tokens"][0]["id"]
    config = {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": end, "eos_token_id": end,
        "hidden_act": "silu", "hidden_size": 48, "initializer_range": 0.02, "intermediate_size": 96,
        "max_position_embeddings": 32768, "max_window_layers": 2, "model_type": "qwen2", "num_attention_heads": 6,
        "num_hidden_layers": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000000.0, "sliding_window": 5, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1", "use_cache": True, "use_mrope": False, "use_sliding_window": False,
        "vocab_size": vocab_size(tokenizer) + 8,  # the real ones are padded too
    }  # fmt: skip
    tokenizer_config = {
        "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": decoder_table(tokenizer),
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "bos_token": None,
        "clean_up_tokenization_spaces": False, "eos_token": "<|endoftext|>", "errors": "replace",
        "model_max_length": 131072, "pad_token": "<|endoftext|>", "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
    }  # fmt: skip
    flips = {
        "eps": {"rms_norm_eps": 1e-05}, "theta": {"rope_theta": 10000.0}, "window obeyed": {"use_sliding_window": True},
        "act": {"hidden_act": "gelu"}, "qkv bias": zero("q_proj.bias", "k_proj.bias", "v_proj.bias"),
        "q bias": zero("q_proj.bias"), "k bias": zero("k_proj.bias"), "v bias": zero("v_proj.bias"),
        "untied": untie, "gqa": regroup, "rope pairs": interleave,
    }  # fmt: skip
    texts = one_token_in_the_middle(TEXTS, LONG_TOKEN) + [INNER_SPECIAL.format(eos="<|im_end|>", bos="<|im_start|>")]
    return dict(config=config, tokenizer=tokenizer, tokenizer_config=tokenizer_config, shards=1, flips=flips,
                texts=texts, max_length=64, seed=1)  # fmt: skip


def qwen2_window():
    tokenizer = qwen2_tokenizer()
    end = tokenizer["added_tokens"][0]["id"]
    kinds = ["full_attention"] * 2 + ["sliding_attention"] * 2
    config = {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": end, "dtype": "float32",
        "eos_token_id": end, "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02,
        "intermediate_size": 64, "layer_types": kinds, "max_position_embeddings": 32768, "max_window_layers": 2,
        "model_type": "qwen2", "num_attention_heads": 4, "num_hidden_layers": 4, "num_key_value_heads": 2,
        "pad_token_id": None, "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "sliding_window": 6,
        "tie_word_embeddings": False, "transformers_version": transformers.__version__, "use_cache": True,
        "use_sliding_window": True, "vocab_size": vocab_size(tokenizer),
    }  # fmt: skip
    tokenizer_config = {
        "add_prefix_space": False, "backend": "tokenizers", "bos_token": None, "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>", "errors": "replace", "extra_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "is_local": False, "model_max_length": 131072, "pad_token": "<|endoftext|>", "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
    }  # fmt: skip
    flips = {
        "eps": {"rms_norm_eps": 1e-05},
        "theta": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
        "window + 1": {"sliding_window": 7}, "window - 1": {"sliding_window": 5},
        "window ignored": {"use_sliding_window": False, "layer_types": None},
        "one more windowed layer": {"layer_types": ["full_attention"] + ["sliding_attention"] * 3},
        "one fewer windowed layer": {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]},
        "layers swapped": {"layer_types": kinds[::-1]},
        "qkv bias": zero("q_proj.bias", "k_proj.bias", "v_proj.bias"), "tied": tie, "gqa": regroup,
    }  # fmt: skip
    return dict(config=config, tokenizer=tokenizer, tokenizer_config=tokenizer_config, shards=3, flips=flips,
                texts=one_token_in_the_middle(TEXTS, LONG_TOKEN), max_length=58, seed=2)  # fmt: skip


def llama3():
    tokenizer = llama3_tokenizer()
    bos, eos = (t["id"] for t in tokenizer["added_tokens"][:2])
    scaling = {
        "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    }  # fmt: skip
    config = {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": bos,
        "eos_token_id": [eos, eos + 1], "head_dim": 16, "hidden_act": "silu", "hidden_size": 48,
        "initializer_range": 0.02, "intermediate_size": 80, "max_position_embeddings": 512, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 6, "num_hidden_layers": 3, "num_key_value_heads": 2,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": scaling, "rope_theta": 500000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.43.0.dev0",
        "use_cache": True, "vocab_size": vocab_size(tokenizer),
    }  # fmt: skip
    tokenizer_config = {
        "added_tokens_decoder": decoder_table(tokenizer), "bos_token": "<|begin_of_text|>",
        "clean_up_tokenization_spaces": True, "eos_token": "<|end_of_text|>",
        "model_input_names": ["input_ids", "attention_mask"], "model_max_length": 131072,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip
    flips = {
        "eps": {"rms_norm_eps": 1e-06}, "theta": {"rope_theta": 10000.0}, "no scaling": {"rope_scaling": None},
        "scale factor": {"rope_scaling": scaling | {"factor": 4.0}},
        "low factor": {"rope_scaling": scaling | {"low_freq_factor": 2.5}},
        "high factor": {"rope_scaling": scaling | {"high_freq_factor": 8.0}},
        "medium band": {"rope_scaling": scaling | {"high_freq_factor": 1.5}},
        "original length": {"rope_scaling": scaling | {"original_max_position_embeddings": 512}},
        "linear": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "tied": tie, "gqa": regroup,
        "rope pairs": interleave,
    }  # fmt: skip
    texts = TEXTS + [LEADING_SPACE, INNER_SPECIAL.format(eos="<|end_of_text|>", bos="<|begin_of_text|>"), ""]
    return dict(config=config, tokenizer=tokenizer, tokenizer_config=tokenizer_config, shards=1, flips=flips,
                texts=texts, max_length=64, seed=3)  # fmt: skip


def llama_linear():
    tokenizer = sentencepiece(420, metaspace=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "bos_token_id": 1,
        "dtype": "float16", "eos_token_id": 2, "head_dim": 8, "hidden_act": "silu", "hidden_size": 48,
        "initializer_range": 0.02, "intermediate_size": 96, "max_position_embeddings": 512, "mlp_bias": True,
        "model_type": "llama", "num_attention_heads": 6, "num_hidden_layers": 3, "num_key_value_heads": 3,
        "pad_token_id": None, "pretraining_tp": 1, "rms_norm_eps": 1e-06,
        "rope_parameters": {"factor": 4.0, "rope_theta": 10000.0, "rope_type": "linear"},
        "tie_word_embeddings": False, "transformers_version": transformers.__version__, "use_cache": True,
        "vocab_size": vocab_size(tokenizer),
    }  # fmt: skip
    tokenizer_config = {
        "backend": "tokenizers", "bos_token": "<s>", "clean_up_tokenization_spaces": False, "eos_token": "</s>",
        "is_local": False, "model_max_length": 512, "tokenizer_class": "TokenizersBackend", "unk_token": "<unk>",
    }  # fmt: skip
    rope = config["rope_parameters"]
    flips = {
        "eps": {"rms_norm_eps": 1e-05}, "theta": {"rope_parameters": rope | {"rope_theta": 500000.0}},
        "no scaling": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
        "scale factor": {"rope_parameters": rope | {"factor": 2.0}},
        **{f"{n} bias": zero(f"{n}_proj.bias") for n in ("q", "k", "v", "o", "gate", "up", "down")},
        "tied": tie, "gqa": regroup,
    }  # fmt: skip
    texts = TEXTS + [LEADING_SPACE, INNER_SPECIAL.format(eos="</s>", bos="<s>"), ""]
    return dict(config=config, tokenizer=tokenizer, tokenizer_config=tokenizer_config, shards=1, flips=flips,
                texts=texts, max_length=70, seed=4)  # fmt: skip


def mistral():
    tokenizer = sentencepiece(425)
    config = {
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "head_dim": 12,
        "hidden_act": "silu", "hidden_size": 48, "initializer_range": 0.02, "intermediate_size": 96,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 6, "num_hidden_layers": 3,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 8,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0",
        "use_cache": True, "vocab_size": vocab_size(tokenizer),
    }  # fmt: skip
    tokenizer_config = llama_tokenizer_config(
        tokenizer, add_bos_token=True, add_eos_token=False, additional_special_tokens=[], legacy=False,
        spaces_between_special_tokens=False,
    )  # fmt: skip
    flips = {
        "eps": {"rms_norm_eps": 1e-06}, "theta": {"rope_theta": 1000000.0}, "window + 1": {"sliding_window": 9},
        "window - 1": {"sliding_window": 7}, "window ignored": {"sliding_window": None}, "tied": tie, "gqa": regroup,
    }  # fmt: skip
    texts = TEXTS + [LEADING_SPACE, INNER_SPECIAL.format(eos="</s>", bos="<s>"), ""]
    return dict(config=config, tokenizer=tokenizer, tokenizer_config=tokenizer_config, shards=2, flips=flips,
                texts=texts, max_length=80, seed=5)  # fmt: skip


def zephyr():
    tokenizer = sentencepiece(430)
    tokenizer["truncation"] = {"direction": "Right", "max_length": 19, "strategy": "LongestFirst", "stride": 0}
    tokenizer["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 2, "pad_type_id": 0,
        "pad_token": "</s>",
    }  # fmt: skip
    config = {
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 48, "initializer_range": 0.02, "intermediate_size": 96, "max_position_embeddings": 32768,
        "model_type": "mistral", "num_attention_heads": 4, "num_hidden_layers": 3, "num_key_value_heads": 2,
        "pad_token_id": 2, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 9,
        "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.35.0", "use_cache": True,
        "vocab_size": vocab_size(tokenizer),
    }  # fmt: skip
    tokenizer_config = llama_tokenizer_config(
        tokenizer, add_bos_token=True, add_eos_token=False, legacy=True, pad_token="</s>",
        additional_special_tokens=["<unk>", "<s>", "</s>"], spaces_between_special_tokens=False,
    )  # fmt: skip
    flips = {
        "eps": {"rms_norm_eps": 1e-06}, "theta": {"rope_theta": 1000000.0}, "window + 1": {"sliding_window": 10},
        "window - 1": {"sliding_window": 8}, "window ignored": {"sliding_window": None}, "tied": tie, "gqa": regroup,
    }  # fmt: skip
    texts = TEXTS + [LEADING_SPACE, ""]
    return dict(config=config, tokenizer=tokenizer, tokenizer_config=tokenizer_config, shards=1, flips=flips,
                texts=texts, max_length=72, seed=6)  # fmt: skip


def yi():
    tokenizer = sentencepiece(422, bos="<|startoftext|>", eos="<|endoftext|>", extra=(LONG_TOKEN,))
    tokenizer["post_processor"] = template(tokenizer)  # no BOS; tokenizers/llama_bos_off has the disagreeing file
    config = {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02,
        "intermediate_size": 64, "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 4,
        "num_hidden_layers": 3, "num_key_value_heads": 1, "pad_token_id": 0, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 5000000.0, "tie_word_embeddings": False,
        "torch_dtype": "float32", "transformers_version": "4.34.0", "use_cache": True,
        "vocab_size": vocab_size(tokenizer),
    }  # fmt: skip
    tokenizer_config = llama_tokenizer_config(
        tokenizer, add_bos_token=False, add_eos_token=False, model_max_length=4096, pad_token="<unk>"
    )
    flips = {
        "eps": {"rms_norm_eps": 1e-06}, "theta": {"rope_theta": 10000.0}, "theta of llama 3": {"rope_theta": 500000.0},
        "tied": tie,
    }  # fmt: skip
    return dict(config=config, tokenizer=tokenizer, tokenizer_config=tokenizer_config, shards=1, flips=flips,
                texts=one_token_in_the_middle(TEXTS, LONG_TOKEN), max_length=77, seed=7)  # fmt: skip


GOLDENS = {f.__name__: f for f in (qwen2, qwen2_window, llama3, llama_linear, mistral, zephyr, yi)}


def one_token_in_the_middle(texts, token):
    return [*texts[:2], token, *texts[2:]]


# ------------------------------------------------------------------------------------------- weights, flips


def random_weights(config, seed):
    """Weights large enough that every config value matters: small embeddings (so eps bites in the first norm),
    sharp attention, norms and biases away from 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in AutoModelForCausalLM.from_config(config).state_dict().items():
        shape = tuple(shape.shape)
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # not stored, as on the hub
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name == "model.embed_tokens.weight":
            w = noise * 0.01
        elif name == "model.norm.weight" and config.tie_word_embeddings:
            w = 30.0 * (1 + 0.3 * noise)  # small tied embeddings need a loud final norm
        elif "norm" in name:
            w = 1 + 0.3 * noise
        elif name.endswith("bias"):
            w = 0.4 * noise
        elif "q_proj" in name or "k_proj" in name:
            w = noise * 1.6 / math.sqrt(shape[1])
        elif "lm_head" in name:
            w = noise * 2.0 / math.sqrt(shape[1])
        else:
            w = noise * 1.2 / math.sqrt(shape[1])
        weights[name] = w.to(DTYPES[config_dtype(config)])
    return weights


def config_dtype(config):
    return str(config.dtype).removeprefix("torch.")


def zero(*endings):
    def edit(weights, config):
        for name in [n for n in weights if n.endswith(endings)]:
            weights[name] = torch.zeros_like(weights[name])

    return edit


def tie(weights, config):
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]


def untie(weights, config):
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].roll(1, 0)
    config.tie_word_embeddings = False


def head_dim(config):
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def regroup(weights, config):
    """Query head h reads key/value head h mod K where it should read h div (H / K)."""
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    order = sorted(range(heads), key=lambda h: (h % kv, h))
    rows = torch.tensor([h * head_dim(config) + d for h in order for d in range(head_dim(config))])
    for name in list(weights):
        if "q_proj" in name:
            weights[name] = weights[name][rows]
        elif "o_proj.weight" in name:
            weights[name] = weights[name][:, rows]


def interleave(weights, config):
    """Rotates neighbours (2d, 2d + 1) where it should rotate (d, d + Hd / 2)."""
    hd = head_dim(config)
    order = [2 * d for d in range(hd // 2)] + [2 * d + 1 for d in range(hd // 2)]
    for name in list(weights):
        if "q_proj" in name or "k_proj" in name:
            heads = weights[name].shape[0] // hd
            weights[name] = weights[name][torch.tensor([h * hd + d for h in range(heads) for d in order])]


# ----------------------------------------------------------------------------------------- the expected numbers


def build(config_json, weights, dtype, edit=None):
    config = AutoConfig.for_model(**copy.deepcopy(config_json))
    weights = {n: w.to(dtype) for n, w in weights.items()}
    if edit:
        edit(weights, config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).to(dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    assert not unexpected and missing in ([], tied), (missing, unexpected)
    return model.eval()


def watch(model, ids):
    """One sample, no padding → ([(mlp output [T, D], gradient of the summed nats [T, D]) per layer], token nats)."""
    seen = []

    def hook(_module, _inputs, out):
        out.retain_grad()
        seen.append(out)

    handles = [layer.mlp.register_forward_hook(hook) for layer in model.model.layers]
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    if logits.dtype == torch.bfloat16:
        logits = logits.float()  # as transformers does before its loss
    for handle in handles:
        handle.remove()
    nats = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
    if len(nats):
        nats.sum().backward()
    model.zero_grad(set_to_none=True)
    pairs = [(x.detach()[0].double(), None if x.grad is None else x.grad[0].double()) for x in seen]
    return pairs, nats.detach().double()


def expected_numbers(model, samples):
    """samples: list of id tensors → name → float64 tensor, as README.md lists them."""
    layers = model.config.num_hidden_layers
    values = [[] for _ in range(layers)]
    gradients = {r: [[] for _ in range(layers)] for r in ("sample", "batch", "token")}
    sample_nats = []
    for s, ids in enumerate(samples):
        group = samples[s // BATCH_SIZE * BATCH_SIZE :][:BATCH_SIZE]
        targets_of_batch = sum(max(len(g) - 1, 0) for g in group)
        seen, nats = watch(model, ids)
        sample_nats.append(nats.sum())
        for i, (x, g) in enumerate(seen):
            values[i].append(x)
            if len(ids) >= 2:
                gradients["token"][i].append(g)
                gradients["sample"][i].append(g / (len(ids) - 1))
                gradients["batch"][i].append(g / targets_of_batch)
    out = {}
    for i in range(layers):
        x = torch.cat(values[i])
        out[f"layer_{i}.values.mean"] = x.mean(0)
        out[f"layer_{i}.values.mean_abs"] = x.abs().mean(0)
        out[f"layer_{i}.values.sum_sq"] = x.square().sum(0)
        out[f"layer_{i}.values.max_abs"] = x.abs().amax(0)
        for reduction, per_layer in gradients.items():
            g = torch.cat(per_layer[i])
            out[f"layer_{i}.gradients_{reduction}.mean"] = g.mean(0)
            out[f"layer_{i}.gradients_{reduction}.mean_abs"] = g.abs().mean(0)
            out[f"layer_{i}.gradients_{reduction}.max_abs"] = g.abs().amax(0)
    out["sample_nats"] = torch.stack(sample_nats)
    out["loss_nats"] = torch.tensor([float(out["sample_nats"].sum()), sum(len(s) - 1 for s in samples)]).double()
    return out


def distance(found, expected):
    """Largest |found − expected| over the largest |expected|, per tensor; a signed mean is measured against mean_abs,
    since its own size is what cancellation left of it. → (worst, its name)"""
    worst = (0.0, "")
    for name, want in expected.items():
        scale = expected.get(name + "_abs", want).abs().max()
        worst = max(worst, (float((found[name] - want).abs().max() / scale), name))
    return worst


def check_flips(golden, weights, samples, expected):
    assert distance(expected_numbers(build(golden["config"], weights, torch.float64), samples), expected)[0] == 0.0
    moved = {}
    for name, flip in golden["flips"].items():
        config, edit = (golden["config"], flip) if callable(flip) else (golden["config"] | flip, None)
        found = expected_numbers(build(config, weights, torch.float64, edit), samples)
        moved[name] = distance(found, expected)[0]
        print(f"    {name:<26} moves {moved[name]:.3f}")
        assert moved[name] > MOVES, f"{name} moves the golden by {moved[name]:.2e} only"
    return moved


# -------------------------------------------------------------------------------- how far off bfloat16 is elsewhere


def make_bfloat16(name):
    """Relative L2 error of each array when transformers computes the golden in bfloat16: the measure of other engines."""
    folder = HERE / name
    expected = safetensors.torch.load_file(folder / "expected.safetensors")
    ids, ends = expected["ids"], expected["cu_seqlens"].tolist()
    samples = [ids[start:end] for start, end in zip(ends, ends[1:], strict=False)]
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.bfloat16).eval()
    found = expected_numbers(model, samples)
    errors = {k: float((v - expected[k]).norm() / expected[k].norm()) for k, v in found.items() if k.startswith("layer_")}
    write_json(folder / "bfloat16.json", {k: float(f"{v:.4g}") for k, v in errors.items()})
    print(f"{name}: bfloat16 against float64: {min(errors.values()):.1e} to {max(errors.values()):.1e}")


# ---------------------------------------------------------------------------------------- the scripts' algorithm


def scripts_numbers(folder, texts, max_length):
    """What the two Python scripts do: float32, one forward and backward per layer and batch, mean over batch means."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = [tokenizer(t, truncation=True, max_length=max_length)["input_ids"] for t in texts]
    assert len(ids) % BATCH_SIZE == 0 and all(len(s) == max_length for s in ids), [len(s) for s in ids]
    batches = torch.tensor(ids).split(BATCH_SIZE)
    out = {}
    for i, layer in enumerate(model.model.layers):
        means = {(what, agg): [] for what in ("values", "gradients") for agg in ("mean", "mean_abs")}
        for batch in batches:
            leaf = []

            def replace(_module, _inputs, output):
                leaf.append(output.detach().clone().requires_grad_(True))
                return leaf[0]

            handle = layer.mlp.register_forward_hook(replace)
            model(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch).loss.backward()
            handle.remove()
            model.zero_grad(set_to_none=True)
            for what, x in (("values", leaf[0].detach()), ("gradients", leaf[0].grad)):
                rows = x.flatten(0, 1)  # [N, D]; every position is valid
                means[what, "mean"].append(rows.mean(0))
                means[what, "mean_abs"].append(rows.abs().mean(0))
        for (what, agg), per_batch in means.items():
            v = torch.stack(per_batch).mean(0)
            out[f"layer_{i}.{what}.{agg}"] = v
            out[f"layer_{i}.{what}.{agg}.norm_sum_abs"] = v * len(v) / v.abs().sum()
    return out, [torch.tensor(s) for s in ids]


def write_scripts_golden(folder, golden, weights):
    texts, max_length = [t for t in TEXTS if len(t) > 80][:8], 24
    assert len(texts) == 8
    out, samples = scripts_numbers(folder, texts, max_length)
    # The program's way (one pass for all layers, `--loss_reduction batch`) must give the same numbers.
    ours = expected_numbers(build(golden["config"], weights, torch.float64), samples)
    wanted, found = {}, {}
    for i in range(golden["config"]["num_hidden_layers"]):
        for what, key in (("values", "values"), ("gradients", "gradients_batch")):
            for agg in ("mean", "mean_abs"):
                wanted[f"layer_{i}.{what}.{agg}"] = ours[f"layer_{i}.{key}.{agg}"]
                found[f"layer_{i}.{what}.{agg}"] = out[f"layer_{i}.{what}.{agg}"].double()
    worst = distance(found, wanted)
    print(f"    scripts' algorithm against one float64 pass: {worst[0]:.1e} ({worst[1]})")
    assert worst[0] < CONTROL, worst
    write_jsonl(folder / "full.jsonl", texts)
    out |= {"ids": torch.stack(samples)}
    write_tensors(folder / "expected_scripts.safetensors", out)
    return {"corpus": "full.jsonl", "max_length": max_length, "num_samples": len(texts), "batch_size": BATCH_SIZE}


# ----------------------------------------------------------------------------------------------------- files


def write_tensors(path, tensors):
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    path.chmod(0o644)  # the library leaves 0600


def write_json(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def write_jsonl(path, texts):
    lines = [json.dumps({"text": t}, ensure_ascii=False) for t in texts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_tokenizer(folder, tokenizer, tokenizer_config):
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", tokenizer_config)


def write_weights(folder, weights, shards):
    if shards == 1:
        write_tensors(folder / "model.safetensors", weights)
        return
    size = {n: w.numel() * w.element_size() for n, w in weights.items()}
    total, filled, files = sum(size.values()), 0, [{} for _ in range(shards)]
    for name, w in weights.items():
        files[min(filled * shards // total, shards - 1)][name] = w
        filled += size[name]
    weight_map = {}
    for k, part in enumerate(files, start=1):
        file = f"model-{k:05}-of-{shards:05}.safetensors"
        write_tensors(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def tokenize(folder, texts, max_length):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(t, truncation=True, max_length=max_length)["input_ids"] for t in texts], tokenizer


def make_golden(name):
    print(name)
    golden, folder = GOLDENS[name](), HERE / name
    config = AutoConfig.for_model(**copy.deepcopy(golden["config"]))
    weights = random_weights(config, golden["seed"])
    write_tokenizer(folder, golden["tokenizer"], golden["tokenizer_config"])
    write_json(folder / "config.json", golden["config"])
    write_weights(folder, weights, golden["shards"])
    write_jsonl(folder / "corpus.jsonl", golden["texts"])

    max_length = golden["max_length"]
    ids, tokenizer = tokenize(folder, golden["texts"], max_length)
    whole = tokenize(folder, golden["texts"], 10**6)[0]
    lengths = [len(s) for s in ids]
    one_token = [s for s, n in enumerate(lengths) if n == 1]
    truncated = [s for s, (a, b) in enumerate(zip(ids, whole, strict=True)) if len(a) < len(b)]
    window = golden["config"].get("sliding_window") or 0
    print(f"    {type(tokenizer).__name__}, lengths {lengths}")
    assert len(one_token) == 1 and truncated and min(n for n in lengths if n > 1) > window
    assert len(set(lengths)) > 3, "lengths should be ragged"
    assert max(max(s) for s in ids) < golden["config"]["vocab_size"]

    samples = [torch.tensor(s) for s in ids]
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").double().eval()
    expected = expected_numbers(model, samples)
    single = expected_numbers(build(golden["config"], weights, torch.float32), samples)
    control = distance(single, expected)
    print(f"    float32 against float64: {control[0]:.1e} ({control[1]})")
    assert control[0] < CONTROL, control
    moved = check_flips(golden, weights, samples, expected)

    tensors = expected | {
        "ids": torch.cat(samples),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
    }
    write_tensors(folder / "expected.safetensors", tensors)
    about = {
        "max_length": max_length, "batch_size": BATCH_SIZE, "num_samples": len(ids), "lengths": lengths,
        "one_token_samples": one_token, "truncated_samples": truncated, "values_count": sum(lengths),
        "gradients_count": sum(n for n in lengths if n > 1), "tokenizer_class_used": type(tokenizer).__name__,
        "float32_against_float64": float(f"{control[0]:.1e}"), "flips_move": {k: round(v, 3) for k, v in moved.items()},
    }  # fmt: skip
    if name == "qwen2":
        about["scripts"] = write_scripts_golden(folder, golden, weights)
    write_json(folder / "expected.json", about)
    size = sum(f.stat().st_size for f in folder.iterdir())
    print(f"    {size / 1024:.0f} KiB")
    assert size < 310 * 1024


# ----------------------------------------------------------------------- tokenizer cases: where versions differ


def tokenizer_cases():
    """name → (model_type, tokenizer.json, tokenizer_config.json, max_length). README.md tells what each is for."""
    sp = sentencepiece(410)
    no_prefix = copy.deepcopy(sp) | {"normalizer": PREPEND_REPLACE["normalizers"][1]}
    stored_left = copy.deepcopy(sp)
    stored_left["truncation"] = {"direction": "Left", "max_length": 19, "strategy": "LongestFirst", "stride": 0}
    llama = llama_tokenizer_config
    fast = llama(sp, tokenizer_class="PreTrainedTokenizerFast")
    bytes_bos = llama3_tokenizer()
    bos, eos = (t["content"] for t in bytes_bos["added_tokens"][:2])
    bytes_config = {
        "bos_token": bos, "eos_token": eos, "tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True,
        "add_eos_token": False, "unk_token": None, "legacy": True,
    }  # fmt: skip
    return {
        "llama_bos_on": ("llama", sp, llama(sp, add_bos_token=True, add_eos_token=False, legacy=False), 24),
        "llama_bos_off": ("llama", sp, llama(sp, add_bos_token=False, add_eos_token=False), 24),
        "llama_eos_on": ("llama", sp, llama(sp, add_bos_token=True, add_eos_token=True), 24),
        "llama_no_post": ("llama", sp | {"post_processor": None}, llama(sp), 24),
        "llama_legacy": ("llama", sp, llama(sp, add_bos_token=True, legacy=True), 24),
        "llama_no_prefix": ("llama", no_prefix, llama(sp, add_bos_token=False), 24),
        "llama_byte_level": ("llama", bytes_bos, bytes_config, 24),
        "fast_bos_off": ("llama", sp, fast | {"add_bos_token": False}, 24),
        "mistral_bos_off": ("mistral", sp, llama(sp, add_bos_token=False), 24),
        "mistral_left": ("mistral", sp, llama(sp, add_bos_token=True, truncation_side="left"), 24),
        "mistral_stored_left": ("mistral", stored_left, llama(sp, add_bos_token=True), 24),
        "qwen2_llama_class": ("qwen2", bytes_bos, bytes_config, 24),
    }


def make_tokenizer_cases():
    for name, (model_type, tokenizer, tokenizer_config, max_length) in tokenizer_cases().items():
        folder = HERE / "tokenizers" / name
        write_tokenizer(folder, tokenizer, tokenizer_config)
        write_json(folder / "config.json", {"model_type": model_type})
        bos, eos = tokenizer_config["bos_token"], tokenizer_config["eos_token"]
        inner = INNER_SPECIAL.format(bos=bos, eos=eos)
        texts = [TEXTS[0][:40], LEADING_SPACE, inner, TEXTS[1][:50], TEXTS[4], "", " ", "  two"]
        ids, used = tokenize(folder, texts, max_length)
        old = json.loads((folder / "ids.json").read_text()) if (folder / "ids.json").exists() else {}
        about = {"max_length": max_length, "texts": texts, "class_used": type(used).__name__, "transformers_5": ids}
        unchanged = all(old.get(k) == about[k] for k in ("texts", "max_length", "transformers_5"))
        about["transformers_4"] = old.get("transformers_4") if unchanged else None  # stale ids are worse than none
        write_json_flat(folder / "ids.json", about)


def write_json_flat(path, value):
    """One line per key: lists of ids stay readable."""
    lines = [f" {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in value.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


OLD_IDS = """
import json, sys
from transformers import AutoTokenizer, __version__
out = {"version": __version__, "ids": []}
for folder, texts, max_length in json.load(sys.stdin):
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        out["ids"].append([tokenizer(t, truncation=True, max_length=max_length)["input_ids"] for t in texts])
    except Exception as e:
        print(folder.split("/")[-1], type(e).__name__, str(e)[:200], file=sys.stderr)
        out["ids"].append(None)
print(json.dumps(out))
"""


def ask_transformers_4(python):
    """Fills ids.json of the tokenizer cases, and compares the goldens: the two versions must agree on those."""
    cases = []
    for folder in sorted((HERE / "tokenizers").iterdir()):
        about = json.loads((folder / "ids.json").read_text())
        cases.append((folder, about["texts"], about["max_length"], about))
    for name in GOLDENS:
        about = json.loads((HERE / name / "expected.json").read_text())
        cases.append((HERE / name, GOLDENS[name]()["texts"], about["max_length"], about))
    asked = json.dumps([(str(f), t, m) for f, t, m, _ in cases])
    answer = subprocess.run([python, "-c", OLD_IDS], input=asked, capture_output=True, text=True, check=True)
    print(answer.stderr)
    old = json.loads(answer.stdout)
    for (folder, texts, max_length, about), ids in zip(cases, old["ids"], strict=True):
        if folder.parent.name == "tokenizers":
            about["transformers_4"] = ids
            write_json_flat(folder / "ids.json", about)
            same = [a == b for a, b in zip(ids or [], about["transformers_5"], strict=False)]
            print(f"{folder.name:<22} texts on which 4 and 5 agree: {same}")
        elif ids is not None:  # 4.x cannot load a tokenizer_class of 5.x
            assert ids == tokenize(folder, texts, max_length)[0], f"{folder.name}: {old['version']} gives other ids"
    return old["version"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*GOLDENS, "tokenizers"], default=[*GOLDENS, "tokenizers"])
    parser.add_argument("--transformers_4", metavar="PYTHON")
    parser.add_argument("--bfloat16", action="store_true", help="make bfloat16.json of the goldens that are there, and stop")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.bfloat16:
        for name in GOLDENS:
            make_bfloat16(name)
        return
    path = HERE / "versions.json"
    versions = json.loads(path.read_text()) if path.exists() else {}
    versions |= {
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__, "safetensors": safetensors.__version__,
    }  # fmt: skip
    for name in args.only:
        if name != "tokenizers":
            make_golden(name)
            make_bfloat16(name)
    if "tokenizers" in args.only:
        make_tokenizer_cases()
    if args.transformers_4:
        versions["transformers_4"] = ask_transformers_4(args.transformers_4)
    write_json(path, versions)
    print(json.dumps(versions, indent=1))


if __name__ == "__main__":
    sys.exit(main())
