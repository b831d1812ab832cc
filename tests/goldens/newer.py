"""The goldens of Mixtral, Gemma-2, Gemma-3 and Qwen3: GOLDENS names a function for each, as llamas.py does.

`shape(name, w)` changes a random weight (float64, by transformers' name for it) before it is rounded to the stored type;
`store(weights)` gives them the names and layouts of the file; `moe` says what the routing of the golden must be like.
"""

import math

from flips import (
    bare,
    exchanged,
    gate_is_up,
    interleave,
    no_derivative_of_cap,
    no_norm,
    no_router_gradient,
    no_scale,
    norm_over_all_heads,
    not_renormalised,
    regroup,
    rolled,
    tie,
    untie,
)
from llamas import WRITTEN_BY
from texts import (
    INNER_SPECIAL,
    LEADING_SPACE,
    LONG_TOKEN,
    TEXTS,
    decoder_table,
    gemma_tokenizer,
    gemma_tokenizer_config,
    llama_tokenizer_config,
    one_token_in_the_middle,
    qwen2_tokenizer,
    sentencepiece,
    vocab_size,
)

# -------------------------------------------------------------------------------------------------- Mixtral


def pieces(*cuts):
    """(text, first character, end): texts in which no token of that golden's seed is nearly given to another expert."""
    return [*(TEXTS[i][start:end] for i, start, end in cuts), ""]


def routed(scales, shifts, layer, expert):
    """Router rows of different sizes and with different shares of a direction that all tokens have in common, so that the
    experts are loaded unevenly; in `layer`, `expert` stands against that direction and gets no token.

    The direction is dimension 0: the embedding has the same number there for every token, up to `layer` hardly anything
    is added to it, and the norm before the router makes it large."""

    def shape(name, w):
        parts = name.split(".")
        at = int(parts[2]) if parts[1] == "layers" else None
        if name == "model.embed_tokens.weight":
            w *= 3.0
            w[:, 0] = 0.1
        elif "experts" in name:  # [E, out, in]
            w *= math.sqrt(w.shape[1] / w.shape[2])
            if "down_proj" in name and at < layer:
                w[:, 0] *= 0.02
        elif "o_proj" in name and at <= layer:
            w[0] *= 0.02
        elif "post_attention_layernorm" in name and at == layer:
            w[0] = 8.0
        elif name.endswith("mlp.gate.weight"):
            for e, (scale, shift) in enumerate(zip(scales, shifts, strict=True)):
                w[e] *= scale
                w[e, 0] = shift
            if at == layer:
                w[expert] *= 0.5
                w[expert, 0] = -12.0
        return w

    return shape


def as_on_the_hub(weights):
    """transformers' fused experts [E, 2I, D], [E, D, I] → w1 (gate), w3 (up), w2 (down) of each, as Mistral stored them."""
    out = {}
    for name, w in weights.items():
        name = name.replace(".mlp.", ".block_sparse_moe.")
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(w):
                gate, up = both.chunk(2)
                stem = f"{name.removesuffix('gate_up_proj')}{e}"
                out |= {f"{stem}.w1.weight": gate.contiguous(), f"{stem}.w3.weight": up.contiguous()}
        elif name.endswith("experts.down_proj"):
            out |= {f"{name.removesuffix('down_proj')}{e}.w2.weight": down.contiguous() for e, down in enumerate(w)}
        else:
            out[name] = w
    return out


MIXTRAL_FLIPS = {
    "eps": {"rms_norm_eps": 1e-04}, "window obeyed": {"sliding_window": 8}, "top-k 1": {"num_experts_per_tok": 1},
    "top-k 3": {"num_experts_per_tok": 3}, "act": {"hidden_act": "gelu"}, "not renormalised": not_renormalised(),
    "no router gradient": no_router_gradient(), "experts permuted": rolled("mlp.experts."),
    "router rows permuted": rolled("mlp.gate.weight"), "gate is up": gate_is_up, "tied": tie,
}  # fmt: skip


def mixtral():
    tokenizer = sentencepiece(400)
    config = {
        "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02, "intermediate_size": 40,
        "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 4, "num_experts_per_tok": 2,
        "num_hidden_layers": 3, "num_key_value_heads": 2, "num_local_experts": 6, "output_router_logits": False,
        "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0",
        "use_cache": True, "vocab_size": vocab_size(tokenizer),
    }  # fmt: skip
    tokenizer_config = llama_tokenizer_config(
        tokenizer, add_bos_token=True, add_eos_token=False, additional_special_tokens=[], legacy=True,
        spaces_between_special_tokens=False,
    )  # fmt: skip
    flips = MIXTRAL_FLIPS | {"theta": {"rope_theta": 10000.0}, "gqa": regroup}
    shape = routed([1.4, 1.0, 1.3, 1.0, 1.1, 1.4], [0.2, 0.0, -0.2, 0.0, 0.2, -0.2], layer=1, expert=3)
    return dict(config=config, tokenizer=tokenizer, tokenizer_config=tokenizer_config, shards=2, flips=flips,
                texts=pieces((4, 6, 70), (5, 4, 56), (6, 14, 66), (7, 0, 90), (7, 43, 95), (7, 64, 122), (8, 0, 64), (8, 27, 79)),
                max_length=40, seed=298, shape=shape, store=as_on_the_hub,
                moe={"empty": (1, 3)})  # fmt: skip


def mixtral_fused():
    tokenizer = sentencepiece(380)
    config = {
        "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "dtype": "bfloat16",
        "eos_token_id": 2, "head_dim": 8, "hidden_act": "silu", "hidden_size": 24, "initializer_range": 0.02,
        "intermediate_size": 32, "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 4,
        "num_experts_per_tok": 2, "num_hidden_layers": 2, "num_key_value_heads": 1, "num_local_experts": 4,
        "output_router_logits": False, "pad_token_id": None, "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"}, "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0, "sliding_window": None, "tie_word_embeddings": False,
        "transformers_version": WRITTEN_BY, "use_cache": True, "vocab_size": vocab_size(tokenizer),
    }  # fmt: skip
    tokenizer_config = {
        "backend": "tokenizers", "bos_token": "<s>", "clean_up_tokenization_spaces": False, "eos_token": "</s>",
        "is_local": False, "model_max_length": 32768, "tokenizer_class": "TokenizersBackend", "unk_token": "<unk>",
    }  # fmt: skip
    flips = MIXTRAL_FLIPS | {"theta": {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}}
    shape = routed([1.4, 1.0, 1.2, 1.8], [0.3, -0.3, 0.0, 0.3], layer=0, expert=2)
    return dict(config=config, tokenizer=tokenizer, tokenizer_config=tokenizer_config, shards=1, flips=flips,
                texts=pieces((0, 0, 64), (1, 0, 64), (3, 4, 76), (4, 0, 72), (5, 0, 64), (7, 60, 112), (8, 31, 95)),
                max_length=40, seed=379, shape=shape,
                moe={"empty": (0, 2)})  # fmt: skip


# ---------------------------------------------------------------------------------------------------- Gemma


def gemma_shape(name, w):
    """Norms are (1 + w)·x̂. The embedding is multiplied by √D; it is small enough for eps to matter even then."""
    if name == "model.embed_tokens.weight":
        return w * 0.15
    if name == "model.norm.weight":
        return w * 7.0 - 1
    return w - 1 if "norm" in name else w


GEMMA_FLIPS = {
    "eps": {"rms_norm_eps": 1e-05}, "scores by head_dim": {"query_pre_attn_scalar": 16},
    "act": {"hidden_activation": "silu"}, "w for 1 + w": bare("norm"),
    "post and pre norm swapped": exchanged("post_attention_layernorm", "pre_feedforward_layernorm"),
    "mlp's norms swapped": exchanged("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    "attention's norms swapped": exchanged("input_layernorm", "post_attention_layernorm"),
    "post norms swapped": exchanged("post_attention_layernorm", "post_feedforward_layernorm"),
    "embedding not scaled": no_scale(), "untied": untie, "gqa": regroup, "rope pairs": interleave,
}  # fmt: skip


def gemma2():
    tokenizer = gemma_tokenizer(400)
    config = {
        "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": 2.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
        "final_logit_softcapping": 3.0, "head_dim": 16, "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 40, "initializer_range": 0.02,
        "intermediate_size": 56, "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 4,
        "num_hidden_layers": 4, "num_key_value_heads": 2, "pad_token_id": 0, "query_pre_attn_scalar": 24,
        "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 7, "torch_dtype": "bfloat16",
        "transformers_version": "4.42.4", "use_cache": True, "vocab_size": vocab_size(tokenizer),
    }  # fmt: skip
    sliding, full = ["sliding_attention"], ["full_attention"]
    flips = GEMMA_FLIPS | {
        "theta": {"rope_theta": 1000000.0}, "window + 1": {"sliding_window": 8}, "window - 1": {"sliding_window": 6},
        "window ignored": {"layer_types": full * 4}, "window everywhere": {"layer_types": sliding * 4},
        "other layers windowed": {"layer_types": (full + sliding) * 2},
        "scores not capped": {"attn_logit_softcapping": None}, "logits not capped": {"final_logit_softcapping": None},
        "no derivative of the scores' cap": no_derivative_of_cap(4),
        "no derivative of the logits' cap": no_derivative_of_cap(3),
    }  # fmt: skip
    texts = [*TEXTS, LEADING_SPACE, INNER_SPECIAL.format(eos="<eos>", bos="<bos>"), ""]
    return dict(config=config, tokenizer=tokenizer, tokenizer_config=gemma_tokenizer_config(tokenizer), shards=2,
                flips=flips, texts=texts, max_length=66, seed=10, shape=gemma_shape)  # fmt: skip


def gemma3():
    tokenizer = gemma_tokenizer(410)
    scaling = {"factor": 8.0, "rope_type": "linear"}
    config = {
        "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 6],
        "final_logit_softcapping": None, "head_dim": 16, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 40,
        "initializer_range": 0.02, "intermediate_size": 56, "max_position_embeddings": 32768,
        "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 4, "num_key_value_heads": 1,
        "pad_token_id": 0, "query_pre_attn_scalar": 10, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
        "rope_scaling": scaling, "rope_theta": 1000000, "sliding_window": 9, "sliding_window_pattern": 3,
        "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "use_cache": True,
        "vocab_size": vocab_size(tokenizer) + 6,
    }  # fmt: skip
    flips = {k: v for k, v in GEMMA_FLIPS.items() if k != "gqa"} | {
        "theta": {"rope_theta": 10000}, "local theta": {"rope_local_base_freq": 1000000},
        "bases swapped": {"rope_theta": 10000, "rope_local_base_freq": 1000000},
        "no scaling": {"rope_scaling": None}, "scale factor": {"rope_scaling": scaling | {"factor": 4.0}},
        "scaling everywhere": {
            "rope_parameters": {
                "full_attention": scaling | {"rope_theta": 1000000.0},
                "sliding_attention": scaling | {"rope_theta": 10000.0},
            },
            "rope_scaling": None,
        },
        "window + 1": {"sliding_window": 10}, "window - 1": {"sliding_window": 8},
        "pattern of 2": {"sliding_window_pattern": 2}, "pattern of 6": {"sliding_window_pattern": 6},
        "logits capped": {"final_logit_softcapping": 3.0}, "no q norm": no_norm("q_norm"),
        "no k norm": no_norm("k_norm"), "q and k norm swapped": exchanged("q_norm", "k_norm"),
        "w for 1 + w in q and k norm": bare("q_norm", "k_norm"),
    }  # fmt: skip
    texts = [*TEXTS, LEADING_SPACE, INNER_SPECIAL.format(eos="<eos>", bos="<bos>"), ""]
    return dict(config=config, tokenizer=tokenizer, tokenizer_config=gemma_tokenizer_config(tokenizer), shards=1,
                flips=flips, texts=texts, max_length=62, seed=11, shape=gemma_shape)  # fmt: skip


# ---------------------------------------------------------------------------------------------------- Qwen3


def qwen3():
    tokenizer = qwen2_tokenizer()
    end = tokenizer["added_tokens"][0]["id"]
    config = {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": end,
        "eos_token_id": end + 2, "head_dim": 16, "hidden_act": "silu", "hidden_size": 40, "initializer_range": 0.02,
        "intermediate_size": 64, "max_position_embeddings": 40960, "max_window_layers": 3, "model_type": "qwen3",
        "num_attention_heads": 4, "num_hidden_layers": 3, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
        "vocab_size": vocab_size(tokenizer) + 8,
    }  # fmt: skip
    tokenizer_config = {
        "add_bos_token": False, "add_prefix_space": False, "added_tokens_decoder": decoder_table(tokenizer),
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "bos_token": None,
        "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "errors": "replace",
        "model_max_length": 131072, "pad_token": "<|endoftext|>", "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer", "unk_token": None,
    }  # fmt: skip
    flips = {
        "eps": {"rms_norm_eps": 1e-05}, "theta": {"rope_theta": 10000}, "act": {"hidden_act": "gelu"},
        "no q norm": no_norm("q_norm"), "no k norm": no_norm("k_norm"), "no q and k norm": no_norm("q_norm", "k_norm"),
        "q and k norm swapped": exchanged("q_norm", "k_norm"), "q norm over all heads": norm_over_all_heads(),
        "window obeyed": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, "untied": untie,
        "gqa": regroup, "rope pairs": interleave,
    }  # fmt: skip
    texts = one_token_in_the_middle(TEXTS, LONG_TOKEN) + [INNER_SPECIAL.format(eos="<|im_end|>", bos="<|im_start|>")]
    return dict(config=config, tokenizer=tokenizer, tokenizer_config=tokenizer_config, shards=1, flips=flips,
                texts=texts, max_length=60, seed=12, shape=sharp)  # fmt: skip


def sharp(name, w):
    return w * 1.7 if "q_norm" in name else w


GOLDENS = {f.__name__: f for f in (mixtral, mixtral_fused, gemma2, gemma3, qwen3)}
