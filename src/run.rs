//! Plan → results: the only file that sees every stage.

use std::error::Error as _;
use std::time::Instant;

use serde_json::{Map, json};

use crate::backend::Moments;
use crate::backend::cpu::Cpu;
use crate::engine::{Engine, Model, Totals};
use crate::error::{Error, Result};
use crate::model::op::Site;
use crate::output::npy::Array;
use crate::output::report::{self, LayerSummary, thousands};
use crate::output::{self, Log, RunRecord, Target, Timing};
use crate::plan::Plan;
use crate::source::{Passes, SourceCounts, TextCounts, nothing_kept};
use crate::stats::{Direction, MomentSink};
use crate::transform;

/// Seconds between two lines of progress.
const PROGRESS_S: f64 = 5.0;

/// Runs a plan from its texts to its files, saying on `log` what happens.
///
/// # Errors
/// Texts that cannot be read or leave nothing to do, a NaN in the model, a target that cannot be written. Nothing
/// half-written stays behind.
pub fn run(plan: &Plan, log: &Log) -> Result<()> {
    let started = Instant::now();
    plan.notes.iter().for_each(|note| log.out(note));
    plan.warnings.iter().for_each(|warning| log.warn(warning));
    if plan.dry_run {
        return dry_run(plan, log);
    }
    let mut target = Target::prepare(&plan.output)?;
    let mut timing = Timing::default();
    use_threads(plan.threads)?;

    // Texts before weights: a dataset that cannot be read says so at once, not after a large model is loaded.
    let opening = Instant::now();
    let tokens = plan.open_tokens()?;
    if let Some(note) = tokens.note() {
        log.warn(note);
    }
    let mut passes = Passes::start(plan.open_texts()?, tokens, plan.passes);
    let mut next = passes.next().transpose()?;
    if next.is_none() {
        check_counts(plan, &passes.counts(), &Totals::default())?;
    }
    let mut preparation_s = opening.elapsed().as_secs_f64();

    let loading = Instant::now();
    let cpu = Cpu::<f32>::new();
    let model = Model::load(&cpu, plan.spec.clone(), &plan.tensors)?;
    timing.set("model_loading", loading.elapsed().as_secs_f64());

    let mut sink = MomentSink::new(&plan.engine.layers, plan.spec.hidden_size);
    let mut engine = Engine::new(&cpu, &model, plan.engine.clone());
    let (mut compute_s, mut said) = (0.0, Instant::now());
    while let Some(pass) = next {
        let computing = Instant::now();
        engine.run(&pass, &mut sink)?;
        compute_s += computing.elapsed().as_secs_f64();
        if said.elapsed().as_secs_f64() >= PROGRESS_S {
            said = Instant::now();
            log.note(&progress(engine.totals(), plan.texts.num_samples, compute_s));
        }
        let waiting = Instant::now();
        next = passes.next().transpose()?;
        preparation_s += waiting.elapsed().as_secs_f64();
    }
    timing.set("dataset_preparation", preparation_s);
    timing.set("compute", compute_s);

    let counts = passes.counts();
    let totals = engine.totals();
    check_counts(plan, &counts, totals)?;
    warn_of_few(&counts.texts, plan, log);
    let (mut record, ranked) = record(plan, &counts, totals, &sink, timing, log);
    output::write_arrays(&mut target, &mut record)?;
    record.timing.total_layers();
    record.timing.set("total_runtime", started.elapsed().as_secs_f64());
    output::write_records(&target, &record)?;

    log.out(&summary(&counts, totals, compute_s));
    log.out(&ranked);
    log.out(&output::timing::summary(&record.timing));
    target.finish(log)?;
    Ok(())
}

/// Prints the plan and what the dataset holds.
fn dry_run(plan: &Plan, log: &Log) -> Result<()> {
    // Opened and dropped: what it made is removed again.
    drop(Target::prepare(&plan.output)?);
    if let Some(note) = plan.open_tokens()?.note() {
        log.warn(note);
    }
    let mut texts = plan.open_texts()?;
    texts.by_ref().try_for_each(|text| text.map(drop))?;
    let counts = texts.counts();
    if counts.kept == 0 {
        return Err(nothing_kept(&counts, &plan.texts));
    }
    warn_of_few(&counts, plan, log);
    log.out(plan.to_string().trim_end());
    log.out(&format!(
        "dataset      {} texts read, {} kept, {} too short",
        thousands(counts.read),
        thousands(counts.kept),
        thousands(counts.too_short)
    ));
    Ok(())
}

/// Says so where the dataset has fewer texts than asked for.
fn warn_of_few(counts: &TextCounts, plan: &Plan, log: &Log) {
    if (counts.kept as usize) < plan.texts.num_samples {
        let (kept, asked) = (thousands(counts.kept), thousands(plan.texts.num_samples as u64));
        log.warn(&format!("the dataset has {kept} texts to keep, fewer than the {asked} asked for"));
    }
}

/// Makes rayon's pool, which everything parallel uses, of this many threads.
///
/// A process has one such pool: a second run in it takes the pool as it is, which changes no result.
fn use_threads(threads: usize) -> Result<()> {
    let made = rayon::ThreadPoolBuilder::new().num_threads(threads).build_global();
    match made {
        // A refusal of the system has a cause; without one the pool was there. (Where there is none, rayon panics
        // when it is asked for its number of threads.)
        Err(refusal) if refusal.source().is_some() || rayon::current_num_threads() != threads => {
            Err(Error::new(format!("cannot start {threads} threads"))
                .at("--threads")
                .expected("as many threads as the system grants, the same in all runs of one process")
                .found(refusal)
                .hint("leave --threads out for one thread per core"))
        }
        _ => Ok(()),
    }
}

fn progress(totals: &Totals, num_samples: usize, compute_s: f64) -> String {
    let done = totals.samples as f64 / num_samples as f64;
    format!(
        "{} of {} samples, {} tokens, {:.0} tokens/s, about {:.0} s left",
        thousands(totals.samples),
        thousands(num_samples as u64),
        thousands(totals.tokens),
        totals.tokens as f64 / compute_s,
        compute_s * (1.0 / done - 1.0).max(0.0)
    )
}

/// Refuses a run that had nothing to count.
fn check_counts(plan: &Plan, counts: &SourceCounts, totals: &Totals) -> Result<()> {
    if counts.texts.kept == 0 {
        return Err(nothing_kept(&counts.texts, &plan.texts));
    }
    if totals.tokens == 0 || (plan.engine.gradients && totals.targets == 0) {
        let expected = match plan.engine.gradients {
            true => "a text of at least two tokens: the loss predicts each token from those before it",
            false => "a text of at least one token",
        };
        return Err(Error::new("the kept texts hold too few tokens")
            .at(plan.texts.dataset.display())
            .expected(expected)
            .found(format!("{} tokens in {} texts", totals.tokens, counts.texts.kept)));
    }
    Ok(())
}

/// What was read and what it cost, in a few lines.
fn summary(counts: &SourceCounts, totals: &Totals, compute_s: f64) -> String {
    let mut text = format!(
        "texts   {} read, {} kept, {} too short, {} cut to the longest sample\ntokens  {} at {:.0} tokens/s",
        thousands(counts.texts.read),
        thousands(counts.texts.kept),
        thousands(counts.texts.too_short),
        thousands(counts.truncated),
        thousands(totals.tokens),
        totals.tokens as f64 / compute_s
    );
    if let Some(nats) = totals.loss_nats {
        let mean = nats / totals.targets as f64;
        text += &format!("\nloss    {mean:.4} nats per token, perplexity {:.2}", mean.exp());
    }
    text + "\n"
}

/// Everything the files hold, and the table for the screen.
fn record<'a>(
    plan: &Plan,
    counts: &SourceCounts,
    totals: &Totals,
    sink: &'a MomentSink,
    mut timing: Timing,
    log: &Log,
) -> (RunRecord<'a>, String) {
    let mut rendered = Vec::new();
    let mut statistics = Vec::new();
    let mut tables = Vec::new();
    for direction in [Direction::Values, Direction::Gradients] {
        let mut rows = Vec::new();
        for (&layer, moments) in sink.layers() {
            let Some(moments) = moments.get(direction) else { continue };
            let (mean, mean_abs) = (over(&moments.sum, moments), over(&moments.sum_abs, moments));
            let rendering = transform::render(&plan.transform, layer, &mean, &mean_abs);
            let ranked = rendering.arrays.last().map_or(&[][..], |array| &array.values);
            rows.push(LayerSummary::new(layer, moments.count, &mean, &mean_abs, &moments.max_abs, ranked, 5));
            statistics.extend(named(layer, direction, moments));
            if direction == plan.direction {
                rendering.warnings.iter().for_each(|warning| log.warn(warning));
                rendered.extend(rendering.arrays);
            }
        }
        if !rows.is_empty() {
            let quantity = match direction {
                Direction::Values => "values at mlp".to_owned(),
                Direction::Gradients => {
                    format!(
                        "gradients at mlp of the {} loss, nats per unit",
                        plan.engine.loss_reduction.name()
                    )
                }
            };
            tables.push(report::table(&quantity, &rows));
        }
    }
    for &layer in &plan.engine.layers {
        timing.set_layer(layer, "gradient_computation", totals.layer_s[layer]);
    }
    let record = RunRecord {
        model_name: plan.model_name.clone(),
        num_samples: plan.texts.num_samples,
        num_samples_used: counts.texts.kept as usize,
        batch_size: plan.batch_size,
        max_length: plan.max_length,
        layers: plan.engine.layers.clone(),
        aggregation_mode: plan.transform.mode,
        normalise_mode: plan.transform.normalise,
        aggregate_by: plan.direction.to_string(),
        power: plan.transform.power,
        device: plan.device().to_owned(),
        timestamp: plan.timestamp,
        extra: facts(plan, counts, totals),
        rendered,
        statistics,
        timing,
    };
    (record, tables.join("\n"))
}

fn over(sums: &[f64], moments: &Moments) -> Vec<f64> {
    sums.iter().map(|sum| sum / moments.count as f64).collect()
}

fn named(layer: usize, direction: Direction, moments: &Moments) -> [(String, Array<'_>); 5] {
    let key = |what: &str| format!("layer_{layer}.{}.{direction}.{what}", Site::Mlp.name());
    [
        (key("sum"), Array::F64(&moments.sum)),
        (key("sum_abs"), Array::F64(&moments.sum_abs)),
        (key("sum_sq"), Array::F64(&moments.sum_sq)),
        (key("max_abs"), Array::F64(&moments.max_abs)),
        (key("count"), Array::I64(moments.count as i64)),
    ]
}

/// What metadata holds beyond the contract.
fn facts(plan: &Plan, counts: &SourceCounts, totals: &Totals) -> Map<String, serde_json::Value> {
    let loss = totals.loss_nats.map(|nats| nats / totals.targets as f64);
    let facts = json!({
        "gradlens_version": env!("CARGO_PKG_VERSION"),
        "architecture": plan.config.model_type,
        "site": Site::Mlp.name(),
        "dtype": plan.dtype(),
        "loss_reduction": plan.engine.loss_reduction.name(),
        "loss_nats_per_token": loss,
        "dataset": plan.texts.dataset.display().to_string(),
        "min_chars": plan.texts.min_chars,
        "texts_read": counts.texts.read,
        "texts_kept": counts.texts.kept,
        "texts_too_short": counts.texts.too_short,
        "texts_truncated": counts.truncated,
        "texts_of_one_token": counts.one_token,
        "texts_without_tokens": counts.no_token,
        "tokens": totals.tokens,
        "targets": plan.engine.gradients.then_some(totals.targets),
        "tokens_per_pass": plan.passes.tokens_per_pass,
        "threads": plan.threads,
    });
    match facts {
        serde_json::Value::Object(map) => map,
        _ => Map::new(),
    }
}
