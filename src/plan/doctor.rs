//! `gradlens doctor`: what there is to compute with, where files come from and go to, and whether a job could run.

use std::path::Path;

use super::checkpoint::ModelFiles;
use super::corpus::Corpus;
use super::fetch::Fetcher;
use super::machine::{free_memory, num_cores};
use crate::backend::cpu;
use crate::backend::cuda::{self, ModuleSpec, Nvrtc, device::MIN_COMPUTE_CAPABILITY};
use crate::cli::DoctorArgs;
use crate::error::{Error, Result};
use crate::hub::{Settings, free_bytes};
use crate::units::size;

/// What was found, line by line, and what stands in the way of the job.
struct Findings<'a> {
    fetcher: &'a Fetcher,
    problems: Vec<Error>,
}

/// Says on the log what was found.
///
/// # Errors
/// The first thing that `gradlens layer --save_outputs` with these flags would fail at.
pub fn doctor(args: &DoctorArgs, fetcher: &Fetcher) -> Result<()> {
    let mut findings = Findings { fetcher, problems: Vec::new() };
    findings.say("gradlens", env!("CARGO_PKG_VERSION"));
    findings.machine()?;
    findings.cuda();
    findings.places();
    findings.job(args);
    match findings.problems.into_iter().next() {
        None => {
            fetcher.log().out("\n`gradlens layer` with this model and these texts can run here");
            Ok(())
        }
        Some(problem) => {
            fetcher.log().out("\n`gradlens layer` with this model and these texts cannot run here");
            Err(problem)
        }
    }
}

impl Findings<'_> {
    fn say(&self, name: &str, text: impl std::fmt::Display) {
        self.fetcher.log().out(&format!("{name:<13}{text}"));
    }

    /// A line with what was found or what is wrong, which then stands in the way.
    fn need(&mut self, name: &str, found: Result<String>) {
        match found {
            Ok(text) => self.say(name, text),
            Err(error) => {
                self.say(name, error.what());
                self.problems.push(error);
            }
        }
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
            Err(error) => {
                self.say("CUDA", error.what());
                return self.say("device", "cpu");
            }
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
            Err(error) => self.say("NVRTC", error.to_string().replace('\n', "\n             ")),
        }
        match ModuleSpec::from_environment().map(|spec| spec.cache) {
            Ok(Some(folder)) => {
                self.say("kernels", format!("compiled ones are kept in {}", folder.display()))
            }
            Ok(None) => self.say("kernels", "compiled ones are not kept"),
            Err(error) => self.say("kernels", error.what()),
        }
        self.say("device", "cpu: layers do not run on CUDA yet");
    }

    /// Where files come from and go to.
    fn places(&mut self) {
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
            Err(error) => self.need("hub", Err(error)),
        }
        let here = tempfile::tempfile_in(".").map(|_| place(Path::new(".")));
        self.need(
            "output",
            here.map_err(|cause| {
                Error::new("results cannot be written to this folder")
                    .at("the working directory")
                    .expected("a folder in which files can be made")
                    .found(cause)
                    .hint("name another place with --output_dir")
            }),
        );
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

    /// Whether the model and the texts could be had.
    fn job(&mut self, args: &DoctorArgs) {
        let name = &args.model.model_name;
        let model = ModelFiles::find(&args.model, self.fetcher).and_then(|files| {
            let config = files.config()?;
            let about = format!("{name}, {}, {} layers", config.model_type, config.num_layers);
            self.within_reach(about, files.missing_weights())
        });
        self.need("model", model);
        let corpus = Corpus::find(&args.texts, self.fetcher).and_then(|corpus| {
            let about = corpus.name().display().to_string();
            match corpus.place() {
                None if !corpus.name().exists() => Err(Error::new("the dataset is not on this machine")
                    .at("--dataset")
                    .expected("a path, or the id of a dataset on the hub")
                    .found(about)
                    .hint("check the path")),
                // A part of the files may do: what all of them take is not asked of the disk.
                _ => Ok(match corpus.missing() {
                    (0, _) => format!("{about}, on this machine"),
                    (files, bytes) => {
                        format!("{about}, {files} files to download as far as needed, {}", size(bytes))
                    }
                }),
            }
        });
        self.need("texts", corpus);
    }

    /// What is still to come, if the disk has room for it.
    fn within_reach(&self, about: String, (files, bytes): (usize, u64)) -> Result<String> {
        if files == 0 {
            return Ok(format!("{about}, on this machine"));
        }
        let cache = &self.fetcher.hub()?.settings().cache;
        match free_bytes(cache) {
            Some(free) if free < bytes => {
                Err(Error::new(format!("not enough room to download the model, {about}"))
                    .at_path(cache)
                    .expected(size(bytes))
                    .found(format!("{} free", size(free)))
                    .hint("make room, or set HF_HOME to a folder on a larger disk"))
            }
            _ => Ok(format!("{about}, {} to download", size(bytes))),
        }
    }
}

/// A folder and the room there.
fn place(folder: &Path) -> String {
    let room = free_bytes(folder).map_or(String::new(), |free| format!(", {} free", size(free)));
    format!("{}{room}", folder.display())
}
