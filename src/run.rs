//! Plan → results: the only file that sees every stage.

mod calibrate;
mod closing;
mod counting;
mod features;
mod on_cuda;
mod record;
mod results;
mod work;

use std::time::Instant;

use crate::backend::cpu::Cpu;
use crate::engine::Totals;
use crate::error::{Error, Kind, Result};
use crate::interrupt::Interrupt;
use crate::model::op::Site;
use crate::output::{self, Log, OutputSpec, Target, Timing, Unit};
use crate::plan::Plan;
use crate::source::{self, Passes, SourceCounts, TextCounts, Tokens, nothing_kept};
use crate::stats::Direction;
use crate::units::thousands;
use calibrate::Ahead;

/// Runs a plan from its texts to its files, saying on `log` what happens.
///
/// # Errors
/// Texts that cannot be read or leave nothing to do, a NaN in the model, a target that cannot be written, a request of
/// `interrupt` before the computing is done. Nothing half-written stays behind.
pub fn run(plan: &Plan, log: &Log, interrupt: &Interrupt) -> Result<()> {
    plan.notes.iter().for_each(|note| log.out(note));
    plan.warnings.iter().for_each(|warning| log.warn(warning));
    if plan.dry_run {
        return dry_run(plan, log, interrupt)
            .map_err(|error| stopped(error, || "the texts were still being read".into()));
    }
    let mut done = Done { of: plan.texts.num_samples as u64, ..Done::default() };
    analyse(plan, log, interrupt, &mut done).map_err(|error| stopped(error, || done.to_string()))
}

/// How far a run is.
#[derive(Default)]
struct Done {
    samples: u64,
    tokens: u64,
    /// Samples there are, as far as that is known.
    of: u64,
}

impl std::fmt::Display for Done {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [samples, of, tokens] = [self.samples, self.of, self.tokens].map(thousands);
        write!(f, "{samples} of {of} samples done, {tokens} tokens; nothing was saved")
    }
}

/// Adds to an interruption what was done until then.
fn stopped(error: Error, done: impl FnOnce() -> String) -> Error {
    match error.kind() {
        Kind::Interrupted { .. } => error.found(done()),
        Kind::Failed | Kind::Usage => error,
    }
}

fn analyse(plan: &Plan, log: &Log, interrupt: &Interrupt, done: &mut Done) -> Result<()> {
    let started = Instant::now();
    let prepared = |(site, output): &(Site, OutputSpec)| Ok((*site, Target::prepare(output)?));
    let mut targets = plan.outputs.iter().map(prepared).collect::<Result<Vec<(Site, Target)>>>()?;
    let mut timing = Timing::default();

    // Texts before weights: a dataset that cannot be read says so at once, not after a large model is loaded.
    let opening = Instant::now();
    let bar = log.bar("reading texts", Unit::Texts, None);
    let tokens = plan.open_tokens()?;
    say_of(&tokens, plan, log);
    let mut policy = plan.counting.policy(tokens.specials());
    let passes = Passes::start(plan.open_texts()?, tokens, plan.passes);
    let mut passes = Ahead::new(passes.interruptible(interrupt.clone()));
    let mut next = passes.next()?;
    if next.is_none() {
        check_counts(plan, &passes.counts(), &Totals::default())?;
    }
    let mut preparation_s = opening.elapsed().as_secs_f64();
    drop(bar);

    let cpu = Cpu::<f32>::new();
    let calibrating = Instant::now();
    let is_measured = policy.norms.is_some();
    if let Some(first) = next.take_if(|_| is_measured) {
        let _bar = log.bar("measuring norms", Unit::Samples, None);
        calibrate::calibrate(plan, &cpu, &mut policy, &mut passes, first, interrupt)?;
        next = passes.next()?;
    }
    let calibration_s = calibrating.elapsed().as_secs_f64();

    let loading = Instant::now();
    let bar = log.bar("loading the model", Unit::Bytes, None);
    let mut work = work::start(plan, &cpu, &policy, interrupt)?;
    if let Some(download_s) = plan.download_s {
        timing.set("download", download_s);
    }
    timing.set("model_loading", loading.elapsed().as_secs_f64());
    if let Some(sae) = &plan.sae {
        timing.set("sae_loading", sae.loading_s);
    }
    if is_measured {
        timing.set("calibration", calibration_s);
    }
    drop(bar);

    let bar = log.bar("computing", Unit::Samples, Some(done.of));
    let mut compute_s = 0.0;
    while let Some(pass) = next {
        if passes.counts().all_read {
            done.of = passes.counts().texts.kept;
            bar.set_total(done.of);
        }
        let computing = Instant::now();
        work.take(pass)?;
        compute_s += computing.elapsed().as_secs_f64();
        done.tokens = work.totals().tokens;
        // Kept texts without tokens are in no pass, and done when their successors are.
        done.samples = work.totals().end_of_samples;
        bar.set(done.samples);
        bar.detail(format!("{} tokens/s", thousands((done.tokens as f64 / compute_s) as u64)));
        let waiting = Instant::now();
        next = passes.next()?;
        let waited_s = waiting.elapsed().as_secs_f64();
        *(if work.goes_on() { &mut compute_s } else { &mut preparation_s }) += waited_s;
    }
    let computing = Instant::now();
    let results = work.finish()?;
    compute_s += computing.elapsed().as_secs_f64();
    bar.set(work.totals().end_of_samples);
    drop(bar);
    plan.settle_texts()?;
    timing.set("dataset_preparation", preparation_s);
    timing.set("compute", compute_s);

    let counts = passes.counts();
    let totals = work.totals();
    check_counts(plan, &counts, totals)?;
    counting::check(plan, &results, totals)?;
    warn_of_few(&counts.texts, plan, log);
    let direction = if plan.engine.gradients { Direction::Gradients } else { Direction::Values };
    let bar = log.bar("writing results", Unit::Bytes, None);
    // The tokenizer that read the texts went with them.
    let shown = results.features().map(|layers| Ok((layers, plan.open_tokens()?))).transpose()?;
    let mut records = Vec::new();
    for (site, target) in &mut targets {
        let (mut record, tables) =
            record::record(plan, *site, &policy, &counts, totals, &results, &timing, log);
        let warning = closing::sink_warning(&results.dimensions(*site), direction);
        warning.iter().for_each(|warning| log.warn(&closing::at_site(plan, *site, warning)));
        output::write_arrays(target, &mut record)?;
        if let Some((layers, tokens)) = &shown {
            features::write_examples(target, layers, tokens)?;
        }
        record.timing.total_layers();
        let total_s = started.elapsed().as_secs_f64() + plan.download_s.unwrap_or_default();
        record.timing.set("total_runtime", total_s);
        output::write_records(target, &record)?;
        records.push((record.timing, tables));
    }
    drop(bar);

    log.out(&closing::summary(&counts, totals, compute_s));
    counting::summary(plan, &results).iter().for_each(|left_out| log.out(left_out));
    if let (Some(sae), Some(layers)) = (&plan.sae, results.features()) {
        features::show_fit(sae, layers, totals, log);
    }
    for (_, tables) in &records {
        closing::show(tables, plan, log);
        if let Some((layers, tokens)) = &shown {
            features::show_examples(plan, tables, layers, tokens, log)?;
        }
    }
    if let Some((timing, _)) = records.last() {
        log.out(&output::timing::summary(timing));
    }
    Target::finish_all(targets.into_iter().map(|(_, target)| target).collect(), log).map(drop)
}

/// Prints the plan and what the dataset holds.
fn dry_run(plan: &Plan, log: &Log, interrupt: &Interrupt) -> Result<()> {
    if plan.has_tokenizer() {
        say_of(&plan.open_tokens()?, plan, log);
    }
    let to_come = plan.texts_to_download();
    let Some(texts) = plan.open_texts_here()? else {
        log.out(plan.to_string().trim_end());
        log.out(&format!("dataset      {}", to_come.as_deref().unwrap_or("nothing")));
        return Ok(());
    };
    let bar = log.bar("reading texts", Unit::Texts, Some(plan.texts.num_samples as u64));
    let counts = source::count(texts, interrupt, |counts| bar.set(counts.kept))?;
    drop(bar);
    let enough = counts.kept >= plan.texts.num_samples as u64;
    let to_come = to_come.filter(|_| !enough);
    if to_come.is_none() {
        if counts.kept == 0 {
            return Err(nothing_kept(&counts, &plan.texts));
        }
        warn_of_few(&counts, plan, log);
    }
    log.out(plan.to_string().trim_end());
    log.out(&format!(
        "dataset      {} texts read, {} kept, {} too short",
        thousands(counts.read),
        thousands(counts.kept),
        thousands(counts.too_short)
    ));
    if let Some(files) = to_come {
        log.out(&format!("             and {files}"));
    }
    Ok(())
}

/// Says what is odd about the tokenizer, and about what is counted.
fn say_of(tokens: &Tokens, plan: &Plan, log: &Log) {
    tokens.note().iter().for_each(|note| log.warn(note));
    plan.counting_warnings(tokens.specials()).iter().for_each(|warning| log.warn(warning));
}

/// Says so where the dataset has fewer texts than asked for.
fn warn_of_few(counts: &TextCounts, plan: &Plan, log: &Log) {
    if (counts.kept as usize) < plan.texts.num_samples {
        let (kept, asked) = (thousands(counts.kept), thousands(plan.texts.num_samples as u64));
        log.warn(&format!("the dataset has {kept} texts to keep, fewer than the {asked} asked for"));
    }
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
