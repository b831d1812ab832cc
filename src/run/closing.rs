//! What is said when the numbers are there: one screen, and the rest for `runtime_output.txt`.

use crate::engine::Totals;
use crate::model::op::Site;
use crate::output::Log;
use crate::output::report::{self, LayerSummary};
use crate::plan::Plan;
use crate::source::SourceCounts;
use crate::stats::{Direction, LayerMoments, Quantity};
use crate::units::thousands;

/// Position 0 dominates a layer where it holds this share of Σ|v|,
const SINK_SHARE: f64 = 0.2;
/// and so many times the share that it has of the tokens: of short samples it is a good part anyway.
const SINK_TIMES: f64 = 4.0;

/// The layers' statistics of one quantity.
pub(super) struct Table {
    pub quantity: Quantity,
    /// What the numbers are.
    pub title: String,
    pub rows: Vec<LayerSummary>,
}

/// Prints the table that was asked for, with as many layers as fit one screen; where a folder is saved, its
/// `runtime_output.txt` gets the other quantities and the layers left out.
pub(super) fn show(tables: &[Table], plan: &Plan, log: &Log) {
    let saved = plan.outputs.iter().any(|(_, output)| output.save_outputs);
    let item = if plan.sae.is_some() { "feature" } else { "dimension" };
    for Table { quantity, title, rows } in tables {
        let full = report::table(title, item, rows);
        // The demo shows both tables of dimensions, and has more to say of features.
        if *quantity != plan.quantity && (!plan.is_demo() || plan.sae.is_some()) {
            log.keep(&full);
            continue;
        }
        let (shown, step) = report::on_one_screen(rows);
        if step == 1 || !saved {
            log.out(&full);
            continue;
        }
        let every = report::every(step);
        let about = format!("{every} of {} layers, and the last; runtime_output.txt has all", rows.len());
        log.out(&format!("{}({about})\n", report::table(title, item, &shown)));
        log.keep(&full);
    }
}

/// A warning about one site, named where there are several.
pub(super) fn at_site(plan: &Plan, site: Site, warning: &str) -> String {
    match plan.engine.sites.len() {
        1 => warning.to_owned(),
        _ => format!("{}: {warning}", site.name()),
    }
}

/// What to say where position 0 dominates layers: the mean over tokens is then that of another kind of token.
pub(super) fn sink_warning(layers: &[(usize, &LayerMoments)], direction: Direction) -> Option<String> {
    let shares = layers.iter().filter_map(|&(layer, moments)| {
        let (at_0, all) = (moments.at_0(direction)?, moments.get(direction)?);
        Some((layer, moments.position_0_share(direction)?, at_0.count as f64 / all.count as f64))
    });
    let dominated = shares.filter(|(_, share, of_tokens)| *share >= SINK_SHARE.max(SINK_TIMES * of_tokens));
    let dominated: Vec<_> = dominated.collect();
    let (layer, share, of_tokens) = dominated.iter().max_by(|a, b| a.1.total_cmp(&b.1))?;
    let others = match dominated.len() {
        1 => String::new(),
        count => format!(", the most of {count} such layers"),
    };
    Some(format!(
        "attention sink: in layer {layer} position 0 holds {:.1}% of the sum of |v| with {:.1}% of the tokens{others}; \
         its mean and mean_abs say more about one position of each sample than about the rest; --skip_first 1 leaves it out",
        100.0 * share,
        100.0 * of_tokens
    ))
}

/// What was read and what it cost, in a few lines.
pub(super) fn summary(counts: &SourceCounts, totals: &Totals, compute_s: f64) -> String {
    let mut text = format!(
        "texts   {} read, {} kept, {} too short, {} cut to the longest sample\ntokens  {} at {} tokens/s",
        thousands(counts.texts.read),
        thousands(counts.texts.kept),
        thousands(counts.texts.too_short),
        thousands(counts.truncated),
        thousands(totals.tokens),
        thousands((totals.tokens as f64 / compute_s).round() as u64)
    );
    if let Some(nats) = totals.loss_nats {
        let mean = nats / totals.targets as f64;
        text += &format!("\nloss    {mean:.4} nats per token, perplexity {:.2}", mean.exp());
    }
    text + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Chunk;
    use crate::backend::cpu::Cpu;
    use crate::source::TextCounts;
    use crate::stats::{MomentSink, Sink, Tap};

    /// One sample of `tokens` tokens, at whose first one layer l has the value `first[l]`; 1 everywhere else.
    fn warning(tokens: usize, first: &[f32]) -> Option<String> {
        let cpu = Cpu::<f32>::new();
        let widths = (0..first.len()).map(|layer| ((layer, Site::Mlp), 1)).collect();
        let mut sink = MomentSink::new(&widths);
        let chunk = Chunk {
            ids: vec![0; tokens],
            cu_seqlens: vec![0, tokens],
            indices: vec![0],
            loss_scales: vec![1.0],
        };
        for (layer, &value) in first.iter().enumerate() {
            let mut rows = vec![1.0; tokens];
            rows[0] = value;
            let tap = Tap { layer, site: Site::Mlp, direction: Direction::Values };
            sink.push(&cpu, tap, &chunk, &cpu.from_slice(&rows, 1)).unwrap();
        }
        let sites = sink.read(&cpu).unwrap();
        let layers: Vec<_> = sites.iter().map(|(&(layer, _), moments)| (layer, moments)).collect();
        assert_eq!(sink_warning(&layers, Direction::Gradients), None, "there are none");
        sink_warning(&layers, Direction::Values)
    }

    #[test]
    fn a_dominant_position_is_said() {
        // 99 tokens of 1 beside one of 24 (19.5 %), 25 (20.2 %), −297 (75 %).
        assert_eq!(warning(100, &[1.0, 24.0, 0.0]), None);
        let one = warning(100, &[1.0, 25.0, 24.0]).unwrap();
        assert!(one.contains("in layer 1 position 0 holds 20.2% of"), "{one}");
        assert!(one.contains("with 1.0% of the tokens; its mean"), "{one}");
        let two = warning(100, &[1.0, 25.0, -297.0, 2.0]).unwrap();
        assert!(two.contains("in layer 2 position 0 holds 75.0% of"), "{two}");
        assert!(two.contains(", the most of 2 such layers;"), "{two}");
    }

    #[test]
    fn numbers_of_the_summary_have_separators() {
        let texts = TextCounts { read: 12_000, kept: 11_500, too_short: 500 };
        let counts = SourceCounts { texts, truncated: 1_234, ..SourceCounts::default() };
        let totals = Totals { tokens: 1_234_567, ..Totals::default() };
        assert_eq!(
            summary(&counts, &totals, 100.0),
            "texts   12,000 read, 11,500 kept, 500 too short, 1,234 cut to the longest sample\n\
             tokens  1,234,567 at 12,346 tokens/s\n"
        );
    }

    /// Of 5 tokens one is 20 %: it dominates from 80 % on.
    #[test]
    fn short_samples_are_no_sinks() {
        assert_eq!(warning(5, &[15.9]), None);
        assert!(warning(5, &[16.1]).is_some());
        assert_eq!(warning(1, &[5.0]), None, "all there is");
    }
}
