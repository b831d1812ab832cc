//! The name of the folder that a run makes for itself. Downstream code parses it, so it is exactly the contract's.

use super::python::float_repr;
use time::{OffsetDateTime, PrimitiveDateTime};

/// What the name of the folder is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct FolderName<'a> {
    /// What the arrays are of: `layer_activations` or `sae_features`.
    pub kind: &'a str,
    /// Hub id or local folder, as typed.
    pub model_name: &'a str,
    /// Where in the blocks, if not at the output of the MLP.
    pub site: Option<&'a str>,
    /// `--num_samples`, also when fewer were found.
    pub num_samples: usize,
    /// `--batch_size`.
    pub batch_size: usize,
    /// What [`layers_label`] makes of `--layers`.
    pub layers: &'a str,
    /// `--power`.
    pub power: Option<f64>,
    /// Wall clock at the start of the run, local time.
    pub timestamp: PrimitiveDateTime,
}

impl FolderName<'_> {
    /// `{kind}_model_{model}{_site_S}_num_samples_{N}_batch_size_{B}_layers_{L}{_power_P}_{YYYYmmdd_HHMMSS}`,
    /// where `/` of the model's name becomes `_`.
    pub fn render(&self) -> String {
        // A backslash separates folders on Windows only; the scripts leave it alone elsewhere.
        let model = self.model_name.replace('/', "_");
        let model = if cfg!(windows) { model.replace(['\\', ':'], "_") } else { model };
        let power = self.power.map(|power| format!("_power_{}", float_repr(power))).unwrap_or_default();
        let site = self.site.map(|site| format!("_site_{site}")).unwrap_or_default();
        format!(
            "{}_model_{model}{site}_num_samples_{}_batch_size_{}_layers_{}{power}_{}",
            self.kind,
            self.num_samples,
            self.batch_size,
            self.layers,
            compact(self.timestamp)
        )
    }
}

/// `{L}` of the folder's name: the flag without blanks, `-` → `to`, `,` → `_` (`0-3,8` → `0to3_8`); without the flag
/// all `layer_count` layers of the model (`0to23`).
pub fn layers_label(flag: Option<&str>, layer_count: usize) -> String {
    match flag {
        Some(flag) => flag.split_whitespace().collect::<String>().replace('-', "to").replace(',', "_"),
        None => format!("0to{}", layer_count.saturating_sub(1)),
    }
}

/// The local wall clock, or UTC where the local offset cannot be told (as in a program that already runs threads).
/// Taken once, at the start of a run: the folder's name and all metadata carry the same instant.
pub fn now() -> PrimitiveDateTime {
    let now = OffsetDateTime::now_local().unwrap_or_else(|_| OffsetDateTime::now_utc());
    PrimitiveDateTime::new(now.date(), now.time())
}

/// `YYYYmmdd_HHMMSS`: in the folder's name and in the `.npz` metadata.
pub fn compact(time: PrimitiveDateTime) -> String {
    let (year, month, day) = (time.year(), u8::from(time.month()), time.day());
    let (hour, minute, second) = time.as_hms();
    format!("{year:04}{month:02}{day:02}_{hour:02}{minute:02}{second:02}")
}

/// `YYYY-mm-dd HH:MM:SS`: in `metadata.json`.
pub fn readable(time: PrimitiveDateTime) -> String {
    let (year, month, day) = (time.year(), u8::from(time.month()), time.day());
    let (hour, minute, second) = time.as_hms();
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use time::macros::datetime;

    fn name(model_name: &str, layers: &str, power: Option<f64>) -> String {
        let timestamp = datetime!(2025-01-02 03:04:05);
        let kind = "layer_activations";
        let site = None;
        FolderName { kind, model_name, site, num_samples: 500, batch_size: 4, layers, power, timestamp }
            .render()
    }

    #[test]
    fn names_are_the_contracts() {
        assert_eq!(
            name("Qwen/Qwen2.5-0.5B", "0to23", None),
            "layer_activations_model_Qwen_Qwen2.5-0.5B_num_samples_500_batch_size_4_layers_0to23_20250102_030405"
        );
        assert_eq!(
            name("/data/m", "0_5_10", Some(2.0)),
            "layer_activations_model__data_m_num_samples_500_batch_size_4_layers_0_5_10_power_2.0_20250102_030405"
        );
        assert!(name("m", "0", Some(1e-5)).contains("_layers_0_power_1e-05_2025"));
        let timestamp = datetime!(2025-01-02 03:04:05);
        let elsewhere = FolderName {
            kind: "layer_activations",
            model_name: "m",
            site: Some("resid_post"),
            num_samples: 7,
            batch_size: 4,
            layers: "0",
            power: None,
            timestamp,
        };
        assert!(
            elsewhere.render().starts_with("layer_activations_model_m_site_resid_post_num_samples_7_batch")
        );
    }

    #[test]
    fn layers_are_the_flag() {
        assert_eq!(layers_label(Some("0-23"), 24), "0to23");
        assert_eq!(layers_label(Some("0,5,10"), 24), "0_5_10");
        assert_eq!(layers_label(Some("0-3, 8"), 24), "0to3_8");
        assert_eq!(layers_label(None, 24), "0to23");
        assert_eq!(layers_label(None, 1), "0to0");
    }

    #[test]
    fn times() {
        assert_eq!(compact(datetime!(2025-11-02 23:59:08)), "20251102_235908");
        assert_eq!(readable(datetime!(2025-11-02 23:59:08)), "2025-11-02 23:59:08");
        assert_eq!(compact(now()).len(), 15);
    }
}
