//! The configurations on the hub, with their numeric facts.

use gradlens::model::{Activation, Config, Rope, RopeScaling, describe};
use serde_json::{Value, json};

use super::read;

#[test]
fn published_files() {
    // Qwen/Qwen2.5-0.5B
    let config = read(&json!({
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
        "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
        "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16", "transformers_version": "4.40.1", "use_cache": true, "use_mrope": false,
        "use_sliding_window": false, "vocab_size": 151936
    }))
    .unwrap();
    let expected = Config {
        model_type: "qwen2".into(),
        names: &gradlens::model::arch::find("qwen2").unwrap().names,
        hidden_size: 896,
        intermediate_size: 4864,
        num_layers: 24,
        num_heads: 14,
        num_kv_heads: 2,
        head_dim: 64,
        vocab_size: 151_936,
        rms_norm_eps: 1e-6,
        norm_offset: 0.0,
        embedding_scale: 1.0,
        attention_scale: 0.125,
        attention_softcap: None,
        logit_softcap: None,
        rope: Rope { theta: 1e6, scaling: RopeScaling::None },
        local_rope: None,
        windows: vec![None; 24],
        qkv_bias: true,
        out_bias: false,
        mlp_bias: false,
        tie_word_embeddings: true,
        max_position_embeddings: 32_768,
        activation: Activation::Silu,
        experts: None,
    };
    assert_eq!(config, expected);

    // Qwen/Qwen2.5-7B
    let config = read(&json!({
        "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 3584,
        "intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28,
        "model_type": "qwen2", "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 131072,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_mrope": false,
        "use_sliding_window": false, "vocab_size": 152064
    }))
    .unwrap();
    assert_eq!((config.head_dim, config.num_kv_heads, config.vocab_size), (128, 4, 152_064));
    assert!(!config.tie_word_embeddings && config.windows == vec![None; 28]);

    // meta-llama/Llama-3.1-8B
    let scaling = json!({
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"
    });
    let config = read(&json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072,
        "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": scaling,
        "rope_theta": 500000.0, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "vocab_size": 128256
    }))
    .unwrap();
    let llama3 = |factor| RopeScaling::Llama3 {
        factor,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position: 8192.0,
    };
    assert_eq!(config.rope, Rope { theta: 5e5, scaling: llama3(8.0) });
    assert_eq!((config.head_dim, config.rms_norm_eps), (128, 1e-5));
    assert!(!config.qkv_bias && !config.out_bias && !config.mlp_bias);

    // meta-llama/Llama-3.2-1B
    let config = read(&json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_scaling": {
            "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"
        },
        "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "vocab_size": 128256
    }))
    .unwrap();
    assert_eq!(config.rope, Rope { theta: 5e5, scaling: llama3(32.0) });
    assert!(config.tie_word_embeddings && config.head_dim == 64 && config.num_layers == 16);

    // mistralai/Mistral-7B-v0.1, and HuggingFaceH4/zephyr-7b-beta, which differs in what the maths ignores
    for extra in [json!({}), json!({ "_name_or_path": "mistralai/Mistral-7B-v0.1", "pad_token_id": 2 })] {
        let mut file = json!({
            "architectures": ["MistralForCausalLM"], "hidden_act": "silu", "hidden_size": 4096,
            "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
            "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
            "tie_word_embeddings": false, "torch_dtype": "bfloat16", "vocab_size": 32000
        });
        file.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let config = read(&file).unwrap();
        assert_eq!(config.windows, vec![Some(4096); 32]);
        assert_eq!((config.head_dim, config.num_kv_heads, config.rope.theta), (128, 8, 1e4));
    }

    // 01-ai/Yi-34B
    let config = read(&json!({
        "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": 7168,
        "intermediate_size": 20480, "max_position_embeddings": 4096, "model_type": "llama",
        "num_attention_heads": 56, "num_hidden_layers": 60, "num_key_value_heads": 8, "pad_token_id": 0,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 5000000.0,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "vocab_size": 64000
    }))
    .unwrap();
    assert_eq!((config.head_dim, config.num_layers, config.vocab_size), (128, 60, 64_000));
    assert_eq!(config.rope, Rope { theta: 5e6, scaling: RopeScaling::None });
}

/// Of each model in `published.json`: exactly its parameters, and every tensor of its checkpoint by name. (The published
/// sizes and numbers of tensors; of a tied head, which some files hold a second time, none.)
#[test]
fn published_models_have_their_parameters_and_tensors() {
    let models: Value = serde_json::from_str(include_str!("published.json")).unwrap();
    for model in models.as_array().unwrap() {
        let (name, file) = (&model["name"], &model["config"]);
        let config = read(file).unwrap();
        let spec = describe(&config);
        assert_eq!(spec.num_parameters(), model["parameters"].as_u64().unwrap(), "{name}");
        let mut found: Vec<&str> = spec.weights.iter().map(|weight| weight.name.as_str()).collect();
        let mut expected = tensors(file, config.num_layers);
        assert_eq!(expected.len() as u64, model["tensors"].as_u64().unwrap(), "{name}");
        found.sort_unstable();
        expected.sort_unstable();
        assert_eq!(found, expected, "{name}");
    }
}

/// The names that checkpoints on the hub have.
fn tensors(config: &Value, layers: usize) -> Vec<String> {
    let is = |model_type: &str| config["model_type"] == model_type;
    let mut names = vec!["model.embed_tokens.weight".to_owned(), "model.norm.weight".to_owned()];
    // The file of Gemma does not say that the head is tied.
    if config["tie_word_embeddings"] == false {
        names.push("lm_head.weight".into());
    }
    let mut modules = vec!["input_layernorm", "post_attention_layernorm"];
    modules.extend(["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]);
    if is("gemma2") || is("gemma3_text") {
        modules.extend(["pre_feedforward_layernorm", "post_feedforward_layernorm"]);
    }
    if is("qwen3") || is("gemma3_text") {
        modules.extend(["self_attn.q_norm", "self_attn.k_norm"]);
    }
    for layer in 0..layers {
        let own = |module: &str| format!("model.layers.{layer}.{module}.weight");
        names.extend(modules.iter().map(|module| own(module)));
        if is("qwen2") {
            names.extend(["q", "k", "v"].map(|p| format!("model.layers.{layer}.self_attn.{p}_proj.bias")));
        }
        if is("mixtral") {
            names.push(own("block_sparse_moe.gate"));
            let experts = (0..8).flat_map(|expert| [1, 2, 3].map(|w| (expert, w)));
            names.extend(experts.map(|(expert, w)| own(&format!("block_sparse_moe.experts.{expert}.w{w}"))));
        } else {
            names.extend(["gate", "up", "down"].map(|p| own(&format!("mlp.{p}_proj"))));
        }
    }
    names
}
