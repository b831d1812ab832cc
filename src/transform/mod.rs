//! Power and normalisation: pure functions on result arrays.
//!
//! The engine hands over two float64 arrays per layer, the mean and the mean absolute value of each dimension
//! (`[D]`). [`render`] turns them into the arrays that are written: aggregation chosen, power applied, then
//! normalised, all in float64 and rounded to float32 once at the end.

pub mod normalise;
pub mod power;

use clap::ValueEnum;
use normalise::Outcome;

/// What `--aggregation_mode` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum AggregationMode {
    /// Mean over tokens, signs kept
    Mean,
    /// Mean of absolute values over tokens
    MeanAbs,
    /// Both of them, in separate arrays
    Both,
}

impl AggregationMode {
    /// The aggregations that are written, in this order.
    pub fn aggregations(self) -> &'static [Aggregation] {
        match self {
            Self::Mean => &[Aggregation::Mean],
            Self::MeanAbs => &[Aggregation::MeanAbs],
            Self::Both => &[Aggregation::Mean, Aggregation::MeanAbs],
        }
    }

    /// The spelling on the command line and in metadata.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mean => "mean",
            Self::MeanAbs => "mean_abs",
            Self::Both => "both",
        }
    }
}

/// How the tokens of one dimension become one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Aggregation {
    /// Σv / tokens
    Mean,
    /// Σ|v| / tokens
    MeanAbs,
}

impl Aggregation {
    /// The spelling in file names, keys and metadata.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mean => "mean",
            Self::MeanAbs => "mean_abs",
        }
    }
}

/// What `--normalize_gradients` (or `--normalize_mode`) asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum NormaliseMode {
    /// Raw values
    None,
    /// v·D/Σ|v|: magnitudes average to 1
    SumAbs,
    /// v·D/Σv: values average to 1
    Sum,
    /// sum and sum_abs, in separate arrays
    Both,
    /// none, sum and sum_abs, in separate arrays
    All,
}

impl NormaliseMode {
    /// The normalisations that are written, in this order.
    pub fn normalisations(self) -> &'static [Normalisation] {
        match self {
            Self::None => &[Normalisation::None],
            Self::SumAbs => &[Normalisation::SumAbs],
            Self::Sum => &[Normalisation::Sum],
            Self::Both => &[Normalisation::Sum, Normalisation::SumAbs],
            Self::All => &[Normalisation::None, Normalisation::Sum, Normalisation::SumAbs],
        }
    }

    /// Whether keys and file names say which normalisation they hold (`…_norm_sum`): only where there are several.
    pub fn labelled(self) -> bool {
        matches!(self, Self::Both | Self::All)
    }

    /// The spelling on the command line and in metadata.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::SumAbs => "sum_abs",
            Self::Sum => "sum",
            Self::Both => "both",
            Self::All => "all",
        }
    }
}

/// One way of scaling a layer's values; [`normalise::apply`] has the formulas.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Normalisation {
    /// v
    None,
    /// v·D/Σv
    Sum,
    /// v·D/Σ|v|
    SumAbs,
}

impl Normalisation {
    /// The spelling in metadata.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Sum => "sum",
            Self::SumAbs => "sum_abs",
        }
    }

    /// The spelling in keys, file names and `layer_statistics`: `norm_sum`.
    pub fn label(self) -> &'static str {
        match self {
            Self::None => "norm_none",
            Self::Sum => "norm_sum",
            Self::SumAbs => "norm_sum_abs",
        }
    }
}

/// What is done to the two arrays of every layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TransformSpec {
    /// Which aggregations are rendered.
    pub mode: AggregationMode,
    /// Which normalisations are rendered.
    pub normalise: NormaliseMode,
    /// `sign(v)·|v|^p` before normalisation; finite and > 0 ([`power::check`]).
    pub power: Option<f64>,
}

/// One finished array and what it is.
#[derive(Clone, Debug, PartialEq)]
pub struct Rendered {
    /// Number of the layer in the model, from 0.
    pub layer: usize,
    /// How tokens were aggregated.
    pub aggregation: Aggregation,
    /// Present only where one run writes several normalisations (`both`, `all`).
    pub normalisation: Option<Normalisation>,
    /// One value per dimension, `[D]`.
    pub values: Vec<f32>,
}

impl Rendered {
    /// The part of the key after the layer: `mean`, `mean_abs_norm_sum`.
    pub fn variant(&self) -> String {
        match self.normalisation {
            None => self.aggregation.name().to_owned(),
            Some(normalisation) => format!("{}_{}", self.aggregation.name(), normalisation.label()),
        }
    }

    /// The key in `consolidated_results.npz`: `layer_0_mean_abs`, `layer_0_mean_norm_sum`.
    pub fn key(&self) -> String {
        format!("layer_{}_{}", self.layer, self.variant())
    }

    /// The name of the `.npy` file without its extension. It says `_gradients` for values too: downstream code finds
    /// the files by that ending.
    pub fn npy_stem(&self) -> String {
        format!("{}_gradients", self.key())
    }
}

/// What [`render`] gives for one layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rendering {
    /// Aggregations outside, normalisations inside, in the order of the modes.
    pub arrays: Vec<Rendered>,
    /// Whole sentences to print as warnings.
    pub warnings: Vec<String>,
}

/// Renders the arrays of one layer: aggregation → power → normalisation, in float64, stored as float32.
///
/// `mean` and `mean_abs` are `[D]`, over tokens, in the unit of the site (a gradient: nats per unit of it). What cannot
/// be normalised (a zero sum, no finite factor) is kept as it is and warned about; so are values which float32
/// cannot hold.
pub fn render(spec: &TransformSpec, layer: usize, mean: &[f64], mean_abs: &[f64]) -> Rendering {
    let mut rendering = Rendering::default();
    for &aggregation in spec.mode.aggregations() {
        let mut powered = match aggregation {
            Aggregation::Mean => mean.to_vec(),
            Aggregation::MeanAbs => mean_abs.to_vec(),
        };
        if let Some(power) = spec.power {
            power::apply(&mut powered, power);
        }
        for &normalisation in spec.normalise.normalisations() {
            let mut values = powered.clone();
            let outcome = normalise::apply(&mut values, normalisation);
            let values: Vec<f32> = values.into_iter().map(|value| value as f32).collect();
            let place = format!("layer {layer}, {}", aggregation.name());
            rendering.warnings.extend(warning(&place, normalisation, outcome, &values));
            rendering.arrays.push(Rendered {
                layer,
                aggregation,
                normalisation: spec.normalise.labelled().then_some(normalisation),
                values,
            });
        }
    }
    rendering
}

/// What there is to say about one array, if anything. `values`: `[D]`.
fn warning(place: &str, normalisation: Normalisation, outcome: Outcome, values: &[f32]) -> Option<String> {
    let name = normalisation.name();
    match outcome {
        Outcome::ZeroSum => {
            Some(format!("{place}: the sum is zero, so `{name}` normalisation left the values unchanged"))
        }
        Outcome::NoFactor => Some(format!(
            "{place}: the sum is too small, too large or not a number, so `{name}` normalisation left the values unchanged"
        )),
        Outcome::Scaled => {
            let count = values.iter().filter(|value| !value.is_finite()).count();
            (count > 0).then(|| {
                format!(
                    "{place}, normalisation `{name}`: {count} of {} values are NaN or beyond the range of float32",
                    values.len()
                )
            })
        }
    }
}

#[cfg(test)]
mod tests;
