//! The golden SAEs: what the SAE libraries compute on the samples of a golden model, and sums compared with it.

use std::fs;
use std::path::PathBuf;

use gradlens::backend::{FeatureSums, FeatureValues, Fit, Moments, SaeGradient};
use serde_json::Value;

use crate::common::{relative_l2, tolerance};
use crate::golden::{Expected, folder, mean};

pub const SAE_GOLDENS: &[&str] = &[
    "dl_batchtopk",
    "dl_batchtopk_bfloat16",
    "dl_gated",
    "dl_jumprelu",
    "dl_matryoshka",
    "dl_new",
    "dl_standard",
    "dl_topk",
    "gemma_scope",
    "gemma_scope_2",
    "gemma_scope_fortran",
    "lens_batchtopk",
    "lens_gated",
    "lens_gated_rescale",
    "lens_jumprelu",
    "lens_jumprelu_layer_norm",
    "lens_standard",
    "lens_standard_old",
    "lens_standard_rescale",
    "lens_topk",
    "lens_topk_old",
    "lens_topk_rescaled",
    "lens_topk_rescaled_layer_norm",
    "llama_scope",
    "llama_scope_saelens",
    "sparsify_groupmax",
    "sparsify_topk",
];

/// Which tokens the sums are over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Of {
    Every,
    /// Positions 0, 3, 6, … of each sample; only `dl_batchtopk` has numbers for them.
    Third,
}

/// One case: see tests/goldens/README.md.
pub struct SaeGolden {
    pub folder: PathBuf,
    /// The golden whose model and samples it is for.
    pub model: String,
    /// As `--site` has it.
    pub site: String,
    /// Flags that the SAE needs beside `--sae`.
    pub arguments: Vec<String>,
    pub layers: Vec<usize>,
    /// F.
    pub features: usize,
    pub json: Value,
    pub expected: Expected,
}

impl SaeGolden {
    pub fn open(name: &str) -> Self {
        let folder = folder("sae").join(name);
        let json: Value = serde_json::from_slice(&fs::read(folder.join("expected.json")).unwrap()).unwrap();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let list = |key: &str| json[key].as_array().unwrap().clone();
        Self {
            model: text(&json["model"]),
            site: text(&json["site"]),
            arguments: list("arguments").iter().map(text).collect(),
            layers: list("layers").iter().map(|layer| layer.as_u64().unwrap() as usize).collect(),
            features: json["features"].as_u64().unwrap() as usize,
            expected: Expected::read(&folder.join("expected.safetensors")),
            folder,
            json,
        }
    }

    /// The value of a flag in `arguments`.
    pub fn argument(&self, flag: &str) -> Option<&str> {
        let at = self.arguments.iter().position(|argument| argument == flag)?;
        Some(&self.arguments[at + 1])
    }

    /// What `--sae` is, with `{layer}`.
    pub fn template(&self) -> PathBuf {
        self.folder.join(self.json["sae"].as_str().unwrap())
    }

    /// A layer's SAE.
    pub fn sae(&self, layer: usize) -> PathBuf {
        self.template().to_str().unwrap().replace("{layer}", &layer.to_string()).into()
    }

    pub fn count(&self, key: &str) -> u64 {
        self.json[key].as_u64().unwrap()
    }

    pub fn of_layer(&self, layer: usize, key: &str) -> f64 {
        self.json[format!("layer_{layer}")][key].as_f64().unwrap()
    }

    pub fn get(&self, layer: usize, of: Of, array: &str) -> &[f64] {
        match of {
            Of::Every => self.expected.get(&format!("layer_{layer}.{array}")),
            Of::Third => self.expected.get(&format!("layer_{layer}.stride_3.{array}")),
        }
    }

    /// Sums of the `error` splice with the loss reduced by sample. Sums that are not there are not looked at.
    pub fn check(&self, layer: usize, of: Of, gradient: SaeGradient, sums: &FeatureSums) {
        if let Some(values) = &sums.values {
            self.check_values(layer, of, values);
        }
        let key = match gradient {
            SaeGradient::All => "gradients",
            SaeGradient::Active => "gradients_active",
        };
        for (key, moments) in [(key, &sums.gradients), ("attribution", &sums.attribution)] {
            if let Some(moments) = moments {
                self.check_means(layer, of, key, moments);
            }
        }
    }

    /// Sums of the `replace` splice with the loss reduced by sample, of all features' gradients. Values are those of `error`.
    pub fn check_replaced(&self, layer: usize, of: Of, sums: &FeatureSums) {
        for (key, moments) in
            [("replace.gradients", &sums.gradients), ("replace.attribution", &sums.attribution)]
        {
            if let Some(moments) = moments {
                self.check_means(layer, of, key, moments);
            }
        }
    }

    /// A fit over the tokens that are not first in their sample.
    pub fn check_fit(&self, layer: usize, fit: &Fit) {
        assert_eq!(fit.tokens, self.count("fit_tokens"));
        // Ten digits are stored; one firing more or less is 2e-3.
        assert!((fit.l0() - self.of_layer(layer, "l0")).abs() < 1e-6, "L0 {} at layer {layer}", fit.l0());
        let expected = self.of_layer(layer, "fvu");
        assert!(
            (fit.fvu() / expected - 1.0).abs() < 1e-5,
            "FVU {} for {expected} at layer {layer}",
            fit.fvu()
        );
    }

    fn check_values(&self, layer: usize, of: Of, values: &FeatureValues) {
        let moments = &values.moments;
        if of == Of::Every {
            assert_eq!(moments.count, self.count("values_count"));
        }
        assert_eq!(moments.sum, moments.sum_abs, "activations are not negative");
        self.compare(layer, of, "values.mean", &mean(&moments.sum, moments.count));
        self.compare(layer, of, "values.sum_sq", &moments.sum_sq);
        self.compare(layer, of, "values.max", &moments.max_abs);
        let fired: Vec<f64> = values.fired.iter().map(|&n| n as f64).collect();
        assert_eq!(
            fired,
            self.get(layer, of, "values.fired"),
            "{} fired at layer {layer}",
            self.folder.display()
        );
        let max_at = self.get(layer, of, "values.max_at").chunks_exact(2);
        for (feature, (found, expected)) in values.max_at.iter().zip(max_at).enumerate() {
            if expected[0] >= 0.0 {
                let found = [found.sample as f64, f64::from(found.position)];
                assert_eq!(found, expected, "feature {feature} of layer {layer}");
            }
        }
    }

    fn check_means(&self, layer: usize, of: Of, key: &str, moments: &Moments) {
        if of == Of::Every {
            assert_eq!(moments.count, self.count("gradients_count"));
        }
        self.compare(layer, of, &format!("{key}.mean"), &mean(&moments.sum, moments.count));
        self.compare(layer, of, &format!("{key}.mean_abs"), &mean(&moments.sum_abs, moments.count));
    }

    fn compare(&self, layer: usize, of: Of, array: &str, found: &[f64]) {
        let error = relative_l2(found, self.get(layer, of, array));
        let place = format!("{}, layer {layer}, {of:?}, {array}", self.folder.display());
        assert!(error <= tolerance::GOLDEN, "{place}: relative L2 {error:e}");
    }
}
