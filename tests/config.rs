//! `config.json` → `Config`: the published files, every generation and default, every refusal, and no panic.

#![allow(clippy::unwrap_used)]

#[path = "config/published.rs"]
mod published;

use std::path::Path;

use gradlens::model::{Activation, Config, Experts, Rope, RopeScaling};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

fn read(value: &Value) -> Result<Config, String> {
    Config::from_json(&value.to_string(), Path::new("config.json")).map_err(|error| error.to_string())
}

/// A small valid file of `model_type`, with `changes` laid over it (null stays null; absent is absent).
fn with(model_type: &str, changes: Value) -> Value {
    let mut file = json!({
        "model_type": model_type, "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    });
    let map = file.as_object_mut().unwrap();
    for (key, value) in changes.as_object().unwrap() {
        map.insert(key.clone(), value.clone());
    }
    file
}

fn ok(model_type: &str, changes: Value) -> Config {
    read(&with(model_type, changes)).unwrap()
}

/// Asserts that the file is refused with all of `words` in the message.
fn refused(value: &Value, words: &[&str]) {
    let message = read(value).expect_err(&format!("accepted {value}"));
    for word in words {
        assert!(message.contains(word), "{word:?} is not in: {message}");
    }
    assert!(message.contains("where:"), "no place: {message}");
}

const ALL: [&str; 3] = ["llama", "mistral", "qwen2"];

/// The values that `AutoConfig.from_pretrained` of transformers 5.24.0 gives for files without these keys.
#[test]
fn absent_keys_take_the_defaults_of_transformers() {
    for (model_type, max_position, window) in
        [("llama", 2048, None), ("mistral", 131_072, Some(4096)), ("qwen2", 32_768, None)]
    {
        let config = ok(model_type, json!({}));
        assert_eq!(config.rms_norm_eps, 1e-6);
        assert_eq!(config.rope, Rope { theta: 1e4, scaling: RopeScaling::None });
        assert_eq!(config.max_position_embeddings, max_position);
        assert_eq!(config.windows, vec![window; 4]);
        assert_eq!(config.head_dim, 16);
        assert!(!config.tie_word_embeddings);
        assert_eq!(ok(model_type, json!({ "num_key_value_heads": null, "head_dim": null })).num_kv_heads, 4);
    }
    let without_kv = |model_type| {
        let mut file = with(model_type, json!({ "num_attention_heads": 32 }));
        file.as_object_mut().unwrap().remove("num_key_value_heads");
        read(&file).unwrap().num_kv_heads
    };
    assert_eq!(ALL.map(without_kv), [32, 8, 32]);
    let mut file = with("qwen2", json!({}));
    file.as_object_mut().unwrap().remove("num_key_value_heads");
    refused(&file, &["num_key_value_heads", "divisor", "32 (the default"]);
}

#[test]
fn windows() {
    let sliding = |model_type, changes| ok(model_type, changes).windows;
    assert_eq!(sliding("mistral", json!({ "sliding_window": null })), vec![None; 4]);
    assert_eq!(sliding("mistral", json!({ "sliding_window": 7 })), vec![Some(7); 4]);
    assert_eq!(
        sliding("qwen2", json!({ "use_sliding_window": false, "sliding_window": 7, "max_window_layers": 0 })),
        vec![None; 4]
    );
    let on = json!({ "use_sliding_window": true, "sliding_window": 7, "max_window_layers": 3 });
    assert_eq!(sliding("qwen2", on), vec![None, None, None, Some(7)]);
    let on = json!({ "use_sliding_window": true, "max_window_layers": 0 });
    assert_eq!(sliding("qwen2", on), vec![Some(4096); 4]);
    assert_eq!(sliding("qwen2", json!({ "use_sliding_window": true })), vec![None; 4]);
    let on = json!({ "use_sliding_window": true, "sliding_window": null, "max_window_layers": 0 });
    assert_eq!(sliding("qwen2", on), vec![None; 4]);

    let types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"];
    let expected = vec![Some(7), None, Some(7), None];
    let listed = json!({ "layer_types": types, "sliding_window": 7 });
    assert_eq!(sliding("mistral", listed.clone()), expected);
    let on = json!({ "layer_types": types, "sliding_window": 7, "use_sliding_window": true });
    assert_eq!(sliding("qwen2", on), expected);
    refused(&with("qwen2", listed), &["layer_types", "there is no window"]);
    refused(&with("llama", json!({ "layer_types": types })), &["layer_types", "layer 0"]);
    assert_eq!(sliding("llama", json!({ "layer_types": vec!["full_attention"; 4] })), vec![None; 4]);
    refused(&with("qwen2", json!({ "layer_types": ["full_attention"] })), &["layer_types", "4 entries", "1"]);
    refused(
        &with(
            "qwen2",
            json!({ "layer_types": ["full_attention", "full_attention", "linear_attention", "x"] }),
        ),
        &["layer_types", "\"linear_attention\" for layer 2"],
    );
    refused(&with("qwen2", json!({ "layer_types": [1, 2, 3, 4] })), &["layer_types", "list of strings"]);

    refused(&with("llama", json!({ "sliding_window": 7 })), &["sliding_window", "hint:"]);
    let off = json!({ "sliding_window": 7, "use_sliding_window": false });
    assert_eq!(sliding("llama", off.clone()), vec![None; 4]);
    refused(&with("mistral", off), &["use_sliding_window", "contradicts"]);
    refused(&with("llama", json!({ "use_sliding_window": true })), &["use_sliding_window"]);
    for bad in [json!(0), json!(-1), json!(2.5), json!("7"), json!(1u64 << 60)] {
        refused(&with("mistral", json!({ "sliding_window": bad })), &["sliding_window", "integer"]);
    }
    refused(
        &with("qwen2", json!({ "use_sliding_window": true, "max_window_layers": -1 })),
        &["max_window_layers", "-1"],
    );
}

#[test]
fn windows_of_every_few_layers() {
    let types = |windows: &Config| windows.windows.iter().map(Option::is_some).collect::<Vec<_>>();
    assert_eq!(types(&ok("gemma2", json!({}))), [true, false, true, false]);
    let three = json!({ "sliding_window_pattern": 3, "sliding_window": 9 });
    let config = ok("gemma3_text", three);
    assert_eq!(config.windows, [Some(9), Some(9), None, Some(9)]);
    let all = json!({ "layer_types": vec!["full_attention"; 4], "sliding_window": null });
    assert_eq!(ok("gemma2", all).windows, vec![None; 4]);
    // transformers makes layers with a window all the same, and fails.
    refused(&with("gemma2", json!({ "sliding_window": null })), &["sliding_window", "there is no window"]);
    refused(&with("gemma2", json!({ "sliding_window_pattern": 2 })), &["sliding_window_pattern"]);
    // One mask for all layers, whatever layer_types says.
    let windowed = json!({ "sliding_window": 4, "layer_types": vec!["sliding_attention"; 4] });
    assert_eq!(ok("mixtral", windowed).windows, vec![Some(4); 4]);
    let mixed = json!({ "sliding_window": 4, "layer_types": vec!["full_attention"; 4] });
    refused(&with("mixtral", mixed), &["layer_types", "contradicts", "hint:"]);
}

#[test]
fn gemma_and_mixtral() {
    let gemma = ok("gemma2", json!({ "head_dim": 16, "query_pre_attn_scalar": 64 }));
    assert_eq!((gemma.norm_offset, gemma.embedding_scale, gemma.attention_scale), (1.0, 8.0, 0.125));
    assert_eq!((gemma.attention_softcap, gemma.logit_softcap), (Some(50.0), Some(30.0)));
    assert_eq!((gemma.head_dim, ok("gemma2", json!({})).head_dim), (16, 256));
    let none = json!({ "attn_logit_softcapping": null, "final_logit_softcapping": null });
    assert_eq!(ok("gemma2", none).logit_softcap, None);
    assert_eq!(gemma.activation, Activation::GeluTanh);
    let other = json!({ "hidden_activation": "gelu_pytorch_tanh", "hidden_act": "gelu" });
    refused(&with("gemma2", other), &["hidden_act", "contradicts", "delete the other key"]);
    let erf = json!({ "hidden_activation": "gelu" });
    refused(&with("gemma2", erf), &["hidden_activation", "one of silu", "\"gelu\""]);

    let plain = |theta| Rope { theta, scaling: RopeScaling::None };
    let gemma3 = ok("gemma3_text", json!({}));
    assert_eq!((gemma3.rope, gemma3.local_rope), (plain(1e6), Some(plain(1e4))));
    let linear = json!({ "rope_theta": 7, "rope_local_base_freq": 3, "rope_scaling": { "rope_type": "linear", "factor": 8 } });
    let gemma3 = ok("gemma3_text", linear);
    assert_eq!(gemma3.rope, Rope { theta: 7.0, scaling: RopeScaling::Linear { factor: 8.0 } });
    assert_eq!(gemma3.local_rope, Some(plain(3.0)));
    let layers = json!({ "rope_parameters": {
        "full_attention": { "rope_type": "linear", "factor": 8, "rope_theta": 7 },
        "sliding_attention": { "rope_type": "default", "rope_theta": 3 }
    } });
    assert_eq!(ok("gemma3_text", layers.clone()).rope, gemma3.rope);
    assert_eq!(ok("gemma3_text", layers.clone()).local_rope, gemma3.local_rope);
    refused(&with("llama", layers), &["different rotary embeddings"]);
    let flat = json!({ "rope_parameters": { "rope_type": "default", "rope_theta": 7 } });
    refused(&with("gemma3_text", flat), &["rope_parameters", "which layers", "hint:"]);
    refused(&with("gemma3_text", json!({ "attn_logit_softcapping": 5 })), &["attn_logit_softcapping"]);
    refused(&with("gemma3_text", json!({ "use_bidirectional_attention": true })), &["bidirectional"]);
    refused(&with("qwen3", json!({ "rope_local_base_freq": 5 })), &["rope_local_base_freq"]);

    assert_eq!(ok("mixtral", json!({})).experts, Some(Experts { count: 8, per_token: 2 }));
    let alias = json!({ "num_experts": 4, "num_experts_per_tok": 3 });
    assert_eq!(ok("mixtral", alias).experts, Some(Experts { count: 4, per_token: 3 }));
    let both = json!({ "num_experts": 4, "num_local_experts": 5 });
    refused(&with("mixtral", both), &["num_experts", "contradicts"]);
    refused(&with("mixtral", json!({ "num_experts_per_tok": 9 })), &["num_experts_per_tok", "at most", "9"]);
    refused(&with("mixtral", json!({ "num_local_experts": 2000 })), &["num_local_experts", "1024"]);
    let many = json!({ "num_local_experts": 1024, "num_hidden_layers": 16_384 });
    refused(&with("mixtral", many), &["impossibly many"]);
    refused(&with("llama", json!({ "num_local_experts": 8 })), &["a mixture of experts"]);
}

#[test]
fn rope_of_both_generations() {
    let linear = Rope { theta: 7.0, scaling: RopeScaling::Linear { factor: 2.0 } };
    for model_type in ALL {
        let rope = |changes| ok(model_type, changes).rope;
        let none = |theta| Rope { theta, scaling: RopeScaling::None };
        assert_eq!(rope(json!({ "rope_theta": 7, "rope_scaling": {} })), none(7.0));
        assert_eq!(
            rope(json!({ "rope_parameters": { "rope_type": "default" }, "rope_theta": 7 })),
            none(7.0)
        );
        assert_eq!(rope(json!({ "rope_parameters": { "rope_theta": 9.0 }, "rope_theta": 7 })), none(9.0));
        assert_eq!(
            rope(json!({ "rope_theta": 7, "rope_scaling": { "type": "linear", "factor": 2 } })),
            linear
        );
        assert_eq!(
            rope(json!({ "rope_parameters": { "rope_type": "linear", "factor": 2.0, "rope_theta": 7.0 } })),
            linear
        );
        // Saved for both generations at once.
        let both = json!({
            "rope_theta": 7, "rope_scaling": { "type": "linear", "factor": 2 },
            "rope_parameters": { "rope_type": "linear", "factor": 2, "rope_theta": 7 }
        });
        assert_eq!(rope(both), linear);
    }
    let llama3 = |inside: Value, outside: Value| {
        let mut scaling =
            json!({ "rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4 });
        scaling.as_object_mut().unwrap().extend(inside.as_object().unwrap().clone());
        let mut file = with("llama", json!({ "rope_scaling": scaling }));
        file.as_object_mut().unwrap().extend(outside.as_object().unwrap().clone());
        match read(&file).unwrap().rope.scaling {
            RopeScaling::Llama3 { original_max_position, .. } => original_max_position,
            other => panic!("{other:?}"),
        }
    };
    let key = "original_max_position_embeddings";
    assert_eq!(llama3(json!({ key: 16 }), json!({})), 16.0);
    assert_eq!(llama3(json!({ key: 16 }), json!({ key: 32 })), 32.0);
    assert_eq!(llama3(json!({}), json!({})), 2048.0);
}

#[test]
fn rope_refusals() {
    for kind in ["yarn", "dynamic", "longrope", "su", "ntk", "mrope", "proportional", ""] {
        for (object, name) in [("rope_scaling", "type"), ("rope_parameters", "rope_type")] {
            let file = with("llama", json!({ object: { name: kind, "factor": 2.0 } }));
            refused(&file, &["rotary scaling", object, &format!("{kind:?}"), "llama3"]);
        }
    }
    let scaling = |scaling: Value| with("llama", json!({ "rope_scaling": scaling }));
    refused(&scaling(json!({ "type": "linear" })), &["rope_scaling.factor", "nothing"]);
    refused(&scaling(json!({ "type": "linear", "factor": 0 })), &["rope_scaling.factor", "above zero"]);
    refused(&scaling(json!({ "factor": 4.0 })), &["rope_scaling.factor", "default"]);
    refused(&scaling(json!({ "type": "default", "mrope_section": [1, 2] })), &["mrope_section"]);
    refused(&scaling(json!({ "type": null, "factor": 4.0 })), &["rope_scaling.type", "a string"]);
    refused(&scaling(json!("linear")), &["rope_scaling", "an object"]);
    refused(
        &scaling(json!({ "rope_type": "default", "partial_rotary_factor": 0.5 })),
        &["part of each head"],
    );
    refused(
        &scaling(json!({ "rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4 })),
        &["high_freq_factor", "more than"],
    );
    refused(
        &with("qwen2", json!({ "rope_parameters": { "full_attention": { "rope_theta": 1e4 } } })),
        &["rope_parameters.full_attention", "different rotary"],
    );
    let both =
        json!({ "rope_scaling": { "type": "linear", "factor": 2 }, "rope_parameters": { "rope_theta": 7 } });
    refused(&with("llama", both), &["two different rotary"]);
    for theta in [json!(0), json!(-1), json!(null), json!("1e4")] {
        refused(&with("llama", json!({ "rope_theta": theta })), &["rope_theta", "above zero"]);
    }
}

#[test]
fn biases() {
    let three = |config: Config| (config.qkv_bias, config.out_bias, config.mlp_bias);
    assert_eq!(three(ok("llama", json!({ "attention_bias": true }))), (true, true, false));
    assert_eq!(three(ok("llama", json!({ "mlp_bias": true }))), (false, false, true));
    assert_eq!(three(ok("mistral", json!({ "attention_bias": false }))), (false, false, false));
    assert_eq!(three(ok("qwen2", json!({ "mlp_bias": false }))), (true, false, false));
    refused(&with("mistral", json!({ "attention_bias": true })), &["attention_bias", "biases"]);
    refused(&with("qwen2", json!({ "attention_bias": false })), &["attention_bias", "true"]);
    refused(&with("qwen2", json!({ "mlp_bias": true })), &["mlp_bias"]);
    refused(&with("llama", json!({ "attention_bias": "yes" })), &["attention_bias", "true or false"]);
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    for (key, value) in [
        ("quantization_config", json!({ "quant_method": "gptq", "bits": 4 })),
        ("attn_logit_softcapping", json!(50.0)),
        ("final_logit_softcapping", json!(30.0)),
        ("embedding_multiplier", json!(12.0)),
        ("residual_multiplier", json!(0.22)),
        ("attention_multiplier", json!(0.0078125)),
        ("logits_scaling", json!(8.0)),
        ("query_pre_attn_scalar", json!(256)),
        ("partial_rotary_factor", json!(0.5)),
        ("use_qk_norm", json!(true)),
        ("is_encoder_decoder", json!(true)),
        ("is_causal", json!(false)),
        ("clip_qkv", json!(8)),
        ("num_local_experts", json!(8)),
        ("per_layer_config", json!({ "0": { "head_dim": 8 } })),
        ("hidden_act", json!("gelu")),
        ("architectures", json!(["OtherForSequenceClassification"])),
    ] {
        for model_type in ALL {
            refused(&with(model_type, json!({ key: value })), &[&format!("key {key}")]);
            if key != "hidden_act" {
                ok(model_type, json!({ key: null }));
            }
        }
    }
    let neutral = json!({
        "is_encoder_decoder": false, "use_qk_norm": false, "logit_scale": 1, "residual_multiplier": 1.0,
        "pruned_heads": {}, "is_causal": true, "num_experts": 0, "hidden_act": "swish", "attention_dropout": 0.1
    });
    assert_eq!(ok("llama", neutral), ok("llama", json!({})));
}

#[test]
fn other_models_are_refused_by_name() {
    refused(
        &with("mamba", json!({})),
        &["model_type", "llama, mistral, mixtral, qwen2, qwen3, gemma2, gemma3_text", "\"mamba\"", "hint:"],
    );
    refused(
        &json!({ "model_type": "llava", "text_config": { "model_type": "llama" } }),
        &["text_config", "\"llava\"", "several modalities"],
    );
    refused(&json!({ "hidden_size": 4 }), &["model_type", "nothing"]);
    refused(&json!({ "model_type": 3 }), &["model_type", "a string", "3"]);
    for text in ["", "[]", "3", "{", "{\"model_type\": NaN}", "\u{feff}{}", "{\"hidden_size\": 1e999}"] {
        let error = Config::from_json(text, Path::new("some/config.json")).unwrap_err().to_string();
        assert!(error.contains("some/config.json"), "{error}");
    }
}

#[test]
fn sizes() {
    let sizes =
        ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"];
    for key in sizes {
        let mut file = with("llama", json!({}));
        file.as_object_mut().unwrap().remove(key);
        refused(&file, &[&format!("key {key}"), "nothing"]);
        refused(&with("llama", json!({ key: null })), &[&format!("key {key}"), "null"]);
    }
    for key in sizes.into_iter().chain(["num_key_value_heads", "head_dim", "max_position_embeddings"]) {
        for bad in [json!(0), json!(-4), json!(4.5), json!(64.0), json!("64"), json!(true), json!(u64::MAX)] {
            refused(&with("llama", json!({ key: bad })), &[&format!("key {key}"), "an integer from 1 to"]);
        }
    }
    refused(
        &with("llama", json!({ "num_key_value_heads": 3 })),
        &["num_key_value_heads", "divisor", "4", "3"],
    );
    refused(&with("llama", json!({ "num_key_value_heads": 8 })), &["num_key_value_heads"]);
    refused(&with("llama", json!({ "head_dim": 15 })), &["head_dim", "even"]);
    refused(&with("llama", json!({ "hidden_size": 60 })), &["head_dim", "even", "15"]);
    refused(&with("llama", json!({ "hidden_size": 62 })), &["head_dim", "divide", "62"]);
    assert_eq!(ok("llama", json!({ "hidden_size": 62, "head_dim": 32 })).head_dim, 32);
    let most = 1 << 24;
    let huge = json!({
        "hidden_size": most, "intermediate_size": most, "num_hidden_layers": 1 << 14, "vocab_size": most,
        "num_attention_heads": most, "num_key_value_heads": most, "head_dim": most
    });
    refused(&with("llama", huge), &["impossibly large"]);
    for bad in [json!(0), json!(-1e-6), json!(null), json!("1e-6")] {
        refused(&with("llama", json!({ "rms_norm_eps": bad })), &["rms_norm_eps", "above zero"]);
    }
}

/// Any JSON value, a few levels deep.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (0u64..9).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
        Just(Value::from("llama3")),
        Just(Value::from("sliding_attention")),
    ];
    leaf.prop_recursive(3, 24, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::vec((prop::sample::select(KEYS), inner), 0..6)
                .prop_map(|pairs| Value::Object(pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect())),
        ]
    })
}

const KEYS: &[&str] = &[
    "model_type",
    "architectures",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rope_type",
    "type",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "quantization_config",
    "logit_scale",
    "text_config",
];

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2000) })]

    #[test]
    fn any_text_or_json_does_not_panic(text in ".{0,64}", value in any_json()) {
        let _ = Config::from_json(&text, Path::new("x"));
        let _ = read(&value);
    }

    /// A valid file with some keys replaced by anything either is refused or gives a sound configuration.
    #[test]
    fn mutated_files_are_refused_or_sound(
        model_type in prop::sample::select(&ALL[..]),
        changes in prop::collection::vec((prop::sample::select(KEYS), any_json()), 0..4),
    ) {
        let changes: Map<String, Value> = changes.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
        if let Ok(config) = read(&with(model_type, Value::Object(changes))) {
            prop_assert_eq!(config.windows.len(), config.num_layers);
            prop_assert!(config.num_heads.is_multiple_of(config.num_kv_heads));
            prop_assert!(config.head_dim >= 2 && config.head_dim.is_multiple_of(2));
            prop_assert!(config.rms_norm_eps > 0.0 && config.rope.theta > 0.0 && config.rope.theta.is_finite());
            prop_assert!(config.windows.iter().flatten().all(|&w| w > 0));
        }
    }
}
