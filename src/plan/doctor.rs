//! `gradlens doctor`: what there is to compute with, where files come from and go to, and whether a job could run.

use std::path::Path;

use time::PrimitiveDateTime;

use super::Plan;
use super::fetch::Fetcher;
use super::machine::{free_memory, num_cores};
use crate::backend::cpu;
use crate::backend::cuda::{self, ModuleSpec, Nvrtc, device::MIN_COMPUTE_CAPABILITY};
use crate::cli::LayerArgs;
use crate::error::{Error, Result};
use crate::hub::{Settings, free_bytes};
use crate::units::size;

/// Says on the log what was found.
///
/// # Errors
/// The first thing that `gradlens layer` with these flags would fail at.
pub fn doctor(args: &LayerArgs, timestamp: PrimitiveDateTime, fetcher: &Fetcher) -> Result<()> {
    let findings = Findings { fetcher };
    findings.say("gradlens", env!("CARGO_PKG_VERSION"));
    findings.machine()?;
    findings.cuda();
    findings.places(&args.output_dir);
    let verdict = findings.job(args, timestamp);
    let can = if verdict.is_ok() { "can" } else { "cannot" };
    fetcher.log().out(&format!("\n`gradlens layer` with these flags {can} run here"));
    verdict
}

/// What was found, line by line.
struct Findings<'a> {
    fetcher: &'a Fetcher,
}

impl Findings<'_> {
    fn say(&self, name: &str, text: impl std::fmt::Display) {
        self.fetcher.log().out(&format!("{name:<13}{text}"));
    }

    fn machine(&self) -> Result<()> {
        self.say("processor", cpu::features().join(", "));
        self.say("threads", num_cores());
        self.say("memory", format!("{} free", size(free_memory()?)));
        Ok(())
    }

    /// Devices, and what they need. None of it is needed for a job on the CPU.
    fn cuda(&self) {
        let devices = match cuda::devices() {
            Ok(devices) if devices.is_empty() => return self.say("CUDA", "a driver, and no device"),
            Ok(devices) => devices,
            Err(error) => return self.say("CUDA", error.what()),
        };
        for device in devices {
            let (major, minor) = device.compute_capability;
            let old = device.compute_capability < MIN_COMPUTE_CAPABILITY;
            let note = if old { ", too old: 8.0 is needed" } else { "" };
            let about =
                format!("{}, {}, compute capability {major}.{minor}", device.name, size(device.total_bytes));
            self.say(&format!("cuda:{}", device.ordinal), format!("{about}{note}"));
        }
        match Nvrtc::load() {
            Ok(nvrtc) => {
                let place =
                    nvrtc.path.as_ref().map_or("the loader's path".into(), |path| path.display().to_string());
                self.say("NVRTC", format!("{}.{} from {place}", nvrtc.version.0, nvrtc.version.1));
            }
            Err(error) => self.say("NVRTC", indented(&error)),
        }
        match ModuleSpec::from_environment().map(|spec| spec.cache) {
            Ok(Some(folder)) => {
                self.say("kernels", format!("compiled ones are kept in {}", folder.display()))
            }
            Ok(None) => self.say("kernels", "compiled ones are not kept"),
            Err(error) => self.say("kernels", error.what()),
        }
    }

    /// Where files come from and go to.
    fn places(&self, output: &Path) {
        match self.fetcher.hub().map(|hub| hub.settings().clone()) {
            Ok(settings) => {
                self.say("hub", self.hub(&settings));
                self.say(
                    "token",
                    match &settings.token {
                        Some(token) => format!("from {}", token.origin),
                        None => "none: gated and private models are out of reach".into(),
                    },
                );
                self.say("cache", place(&settings.cache));
            }
            Err(error) => self.say("hub", indented(&error)),
        }
        self.say("output", place(output));
    }

    fn hub(&self, settings: &Settings) -> String {
        if let Some(variable) = settings.offline {
            return format!("{} is not asked: {variable} is set", settings.endpoint);
        }
        match self.fetcher.hub().map(|hub| hub.ping()) {
            Ok(Ok(())) => format!("{} answers", settings.endpoint),
            Ok(Err(cause)) => format!("{} cannot be reached: {cause}", settings.endpoint),
            Err(error) => error.what().to_owned(),
        }
    }

    /// The job itself, as far as it goes without a download of weights or of texts.
    fn job(&self, args: &LayerArgs, timestamp: PrimitiveDateTime) -> Result<()> {
        let args = LayerArgs { dry_run: true, ..args.clone() };
        let plan = Plan::layer(&args, timestamp, self.fetcher)?;
        self.say("device", plan.device());
        plan.warnings.iter().for_each(|warning| self.fetcher.log().warn(warning));
        if plan.is_bare() {
            plan.files.checkpoint()?;
        }
        self.say("model", plan.model());
        self.say("weights", plan.weights());
        self.say("texts", plan.texts_to_download().unwrap_or_else(|| "on this machine".into()));
        plan.open_tokens().map(drop)
    }
}

/// An error below the name of what it is about.
fn indented(error: &Error) -> String {
    error.to_string().replace('\n', "\n             ")
}

/// A folder and the room there.
fn place(folder: &Path) -> String {
    let room = free_bytes(folder).map_or(String::new(), |free| format!(", {} free", size(free)));
    format!("{}{room}", folder.display())
}
