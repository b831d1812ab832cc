"""The goldens of Llama, Mistral and Qwen2: GOLDENS names a function for each.

A function gives config.json, tokenizer.json, tokenizer_config.json, and how to store and to perturb the model.
`flips`: name → the config values to overwrite, or an edit of flips.py to the same effect.
"""

from flips import interleave, regroup, tie, untie, zero
from texts import (
    INNER_SPECIAL,
    LEADING_SPACE,
    LONG_TOKEN,
    TEXTS,
    decoder_table,
    llama3_tokenizer,
    llama_tokenizer_config,
    one_token_in_the_middle,
    qwen2_tokenizer,
    sentencepiece,
    template,
    vocab_size,
)

WRITTEN_BY = "5.23.0"  # the transformers version in files of transformers 5's style


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
        "tie_word_embeddings": False, "transformers_version": WRITTEN_BY, "use_cache": True,
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
        "tie_word_embeddings": False, "transformers_version": WRITTEN_BY, "use_cache": True,
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
