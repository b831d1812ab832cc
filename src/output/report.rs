//! The table on stdout at the end of a run: one line per layer.

/// Columns of a terminal that the table never exceeds.
const WIDTH: usize = 100;
/// A cell of which nothing is known.
const UNKNOWN: &str = "-";
/// Rows of the table that fit one screen with what is said around it.
const ROWS: usize = 28;

/// One line of the table.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSummary {
    /// Number of the layer in the model.
    pub layer: usize,
    /// Tokens that entered its statistics.
    pub tokens: u64,
    /// Mean over the dimensions of the signed mean over tokens.
    pub mean: f64,
    /// Mean over the dimensions of the mean |v| over tokens, where that is known.
    pub mean_abs: Option<f64>,
    /// The largest |v| of any token and dimension, where that is known.
    pub max_abs: Option<f64>,
    /// Which part of Σ|v| position 0 holds, where that is known.
    pub position_0_share: Option<f64>,
    /// (dimension, value), largest |value| first.
    pub top: Vec<(usize, f64)>,
}

impl LayerSummary {
    /// Sums up one layer. `mean`, `mean_abs` and `max_abs` are `[D]`, per dimension over tokens, or empty; `ranked` (`[D]`) is the
    /// array whose `count` largest |v| are named: what was written to the files.
    pub fn new(
        layer: usize,
        tokens: u64,
        mean: &[f64],
        mean_abs: &[f64],
        max_abs: &[f64],
        position_0_share: Option<f64>,
        ranked: &[f32],
        count: usize,
    ) -> Self {
        let average = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        Self {
            layer,
            tokens,
            mean: average(mean),
            mean_abs: (!mean_abs.is_empty()).then(|| average(mean_abs)),
            max_abs: max_abs.iter().copied().reduce(f64::max),
            position_0_share,
            top: top(ranked, count),
        }
    }
}

/// The `count` dimensions of the largest |v|, largest first; of equals the lower dimension comes first.
/// NaN counts as the largest: it must not go unseen.
pub fn top(values: &[f32], count: usize) -> Vec<(usize, f64)> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].abs().total_cmp(&values[a].abs()).then(a.cmp(&b)));
    order.into_iter().take(count).map(|dimension| (dimension, f64::from(values[dimension]))).collect()
}

/// The table. `quantity` names what the numbers are, as in `gradients of the loss at mlp (nats per unit)`, and `item`
/// what they are of: `dimension` or `feature`.
///
/// Columns: layer, tokens, mean, mean|.|, max|.|, position 0's share, as far as they are known of any row, then as many
/// `item:value` as fit in 100 columns.
pub fn table(quantity: &str, item: &str, rows: &[LayerSummary]) -> String {
    let number = |number: Option<f64>| number.map_or(UNKNOWN.into(), significant);
    let share = |share: f64| format!("{:.1}%", 100.0 * share);
    let columns: Vec<(&str, Vec<String>)> = vec![
        ("layer", rows.iter().map(|row| row.layer.to_string()).collect()),
        ("tokens", rows.iter().map(|row| row.tokens.to_string()).collect()),
        ("mean", rows.iter().map(|row| significant(row.mean)).collect()),
        ("mean|.|", rows.iter().map(|row| number(row.mean_abs)).collect()),
        ("max|.|", rows.iter().map(|row| number(row.max_abs)).collect()),
        ("pos 0", rows.iter().map(|row| row.position_0_share.map_or(UNKNOWN.into(), share)).collect()),
    ];
    let known = columns.into_iter().filter(|(_, cells)| cells.iter().any(|cell| cell != UNKNOWN));
    let columns: Vec<(&str, Vec<String>, usize)> = known
        .map(|(title, cells)| {
            let width = cells.iter().map(String::len).chain([title.len()]).max().unwrap_or(0);
            (title, cells, width)
        })
        .collect();
    let line = |cell: &dyn Fn(&str, &[String]) -> String| {
        let aligned = columns.iter().map(|(title, cells, width)| format!("{:>width$}", cell(title, cells)));
        aligned.collect::<Vec<_>>().join("  ")
    };

    let mut text =
        format!("{quantity}\n{}  largest |v| as {item}:value\n", line(&|title, _| title.to_owned()));
    for (number, row) in rows.iter().enumerate() {
        let mut line = line(&|_, cells| cells[number].clone());
        for (dimension, value) in &row.top {
            let item = format!("  {dimension}:{}", significant(*value));
            if line.len() + item.len() > WIDTH {
                break;
            }
            line.push_str(&item);
        }
        text.push_str(&line);
        text.push('\n');
    }
    text
}

/// The rows that fit one screen, evenly spaced, the first and the last among them; and how far they are apart.
pub fn on_one_screen(rows: &[LayerSummary]) -> (Vec<LayerSummary>, usize) {
    let last = rows.len().saturating_sub(1);
    let step = last.div_ceil(ROWS - 1).max(1);
    let shown = (0..rows.len()).filter(|index| index % step == 0 || *index == last);
    (shown.map(|index| rows[index].clone()).collect(), step)
}

/// A stride in words: `every 3rd`.
pub fn every(step: usize) -> String {
    match step {
        2 => "every 2nd".into(),
        3 => "every 3rd".into(),
        _ => format!("every {step}th"),
    }
}

/// Four significant digits, in the shorter of fixed and scientific notation: `12.35`, `-0.001235`, `1.235e-9`.
pub fn significant(number: f64) -> String {
    if !number.is_finite() || number == 0.0 {
        return number.to_string();
    }
    let scientific = format!("{number:.3e}");
    // The exponent after rounding: 9999.6 is 1.000e4 here.
    let exponent =
        scientific.split_once('e').and_then(|(_, exponent)| exponent.parse::<i32>().ok()).unwrap_or(0);
    match exponent {
        -3..=3 => format!("{number:.*}", (3 - exponent) as usize),
        4 | 5 => format!("{number:.0}"),
        _ => scientific,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_four_digits() {
        for (number, expected) in [
            (0.0, "0"),
            (12.345, "12.35"),
            (-0.0012345, "-0.001234"),
            (0.00012345, "1.234e-4"),
            (999.96, "1000"),
            (9999.6, "10000"),
            (123456.7, "123457"),
            (1234567.0, "1.235e6"),
            (1.0, "1.000"),
            (f64::NAN, "NaN"),
            (f64::NEG_INFINITY, "-inf"),
        ] {
            assert_eq!(significant(number), expected);
        }
    }

    #[test]
    fn the_table_is_pinned() {
        let first =
            LayerSummary::new(0, 4096, &[0.5, -1.5], &[0.75, 1.5], &[3.0, 7.0], Some(0.123), &[0.5, -1.5], 5);
        let last = LayerSummary { layer: 79, tokens: 12_345_678, ..first.clone() };
        assert_eq!(
            table("values at mlp", "dimension", &[first, last]),
            "values at mlp\n\
             layer    tokens     mean  mean|.|  max|.|  pos 0  largest |v| as dimension:value\n    \
             0      4096  -0.5000    1.125   7.000  12.3%  1:-1.500  0:0.5000\n   \
             79  12345678  -0.5000    1.125   7.000  12.3%  1:-1.500  0:0.5000\n"
        );
    }

    #[test]
    fn columns_of_which_nothing_is_known_are_left_out() {
        let row = LayerSummary::new(0, 9, &[0.5, -1.5], &[], &[], None, &[0.5, -1.5], 1);
        assert_eq!(
            table("means", "feature", &[row]),
            "means\nlayer  tokens     mean  largest |v| as feature:value\n    0       9  -0.5000  1:-1.500\n"
        );
    }

    #[test]
    fn never_wider_than_a_hundred_columns() {
        let row = LayerSummary {
            layer: 79,
            tokens: 123_456_789_012,
            mean: -1.234e-10,
            mean_abs: Some(1.234e-10),
            max_abs: Some(1.234e-10),
            position_0_share: Some(1.0),
            top: vec![(65_535, -1.234e-10); 9],
        };
        let text = table("gradients", "feature", &vec![row; 80]);
        assert_eq!(text.lines().count(), 82);
        assert!(text.lines().all(|line| line.len() <= WIDTH), "{text}");
        assert!(text.contains("65535:-1.234e-10"));
    }

    #[test]
    fn a_screen_takes_evenly_spaced_rows() {
        let row = LayerSummary::new(0, 1, &[1.0], &[1.0], &[1.0], None, &[1.0], 1);
        let shown = |count: usize| {
            let rows: Vec<_> = (0..count).map(|layer| LayerSummary { layer, ..row.clone() }).collect();
            let (shown, step) = on_one_screen(&rows);
            (shown.iter().map(|row| row.layer).collect::<Vec<_>>(), step)
        };
        assert_eq!(shown(0), (vec![], 1));
        for count in 1..=28 {
            assert_eq!(shown(count), ((0..count).collect(), 1));
        }
        assert_eq!(shown(32), ((0..32).step_by(2).chain([31]).collect(), 2));
        assert_eq!(shown(80), ((0..80).step_by(3).chain([79]).collect(), 3));
        for count in 29..300 {
            let (layers, step) = shown(count);
            assert!(layers.len() <= ROWS && layers.len() > ROWS / 2, "{count}: {layers:?}");
            assert_eq!((layers[0], layers[layers.len() - 1], layers[1]), (0, count - 1, step));
        }
        assert_eq!([2, 3, 4].map(every), ["every 2nd", "every 3rd", "every 4th"]);
    }

    #[test]
    fn top_breaks_ties_by_dimension_and_shows_nan() {
        assert_eq!(top(&[1.0, -3.0, 3.0, 2.0], 3), [(1, -3.0), (2, 3.0), (3, 2.0)]);
        assert_eq!(top(&[1.0, f32::NAN], 1)[0].0, 1);
        assert!(top(&[], 3).is_empty());
    }
}
