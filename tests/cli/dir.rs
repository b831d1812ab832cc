//! A fresh working folder, and runs of the program in it.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

/// What an analysis of `model` on its own corpus begins with.
pub const LAYER: &str = "layer --model_name model --dataset model/corpus.jsonl";

/// Variables that change what the program does, besides those of the hub.
const UNWANTED: [&str; 7] = [
    "RAYON_NUM_THREADS",
    "RUST_BACKTRACE",
    "XDG_CACHE_HOME",
    "TRANSFORMERS_OFFLINE",
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
];

/// A working folder that is removed in the end.
pub struct Dir {
    root: TempDir,
    /// Set for every program that is run here.
    variables: Vec<(String, String)>,
}

/// A run that has ended.
pub struct Run {
    command: String,
    cwd: PathBuf,
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Dir {
    pub fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let hub = root.path().join("hf").display().to_string();
        // No hub unless a test has one: nothing listens there.
        let endpoint = "http://127.0.0.1:9".to_owned();
        Self { root, variables: vec![("HF_HOME".into(), hub), ("HF_ENDPOINT".into(), endpoint)] }
    }

    /// Sets an environment variable for every run that follows.
    #[allow(dead_code, reason = "for the tests of the hub")]
    pub fn set(&mut self, variable: &str, value: &str) {
        self.variables.retain(|(name, _)| name != variable);
        self.variables.push((variable.into(), value.into()));
    }

    /// With a copy of `tests/goldens/{golden}` as `model`.
    pub fn with(golden: &str) -> Self {
        let dir = Self::new();
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(golden);
        fs::create_dir(dir.path("model")).unwrap();
        for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
            fs::copy(entry.path(), dir.path("model").join(entry.file_name())).unwrap();
        }
        dir
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) {
        fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        fs::write(self.path(name), bytes).unwrap();
    }

    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    /// Everything below the folder, sorted, with its size.
    pub fn listing(&self) -> Vec<String> {
        let mut found = Vec::new();
        let mut waiting = vec![self.root.path().to_owned()];
        while let Some(folder) = waiting.pop() {
            for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
                let about = entry.metadata().unwrap();
                let name = entry.path().strip_prefix(self.root.path()).unwrap().display().to_string();
                if about.is_dir() {
                    found.push(format!("{name}/"));
                    waiting.push(entry.path());
                } else {
                    found.push(format!("{name} {}", about.len()));
                }
            }
        }
        found.sort();
        found
    }

    /// The one folder that a run over dimensions made in `parent`.
    #[track_caller]
    pub fn made(&self, parent: &str) -> PathBuf {
        self.made_of("layer_activations_", parent)
    }

    /// The one folder that a run over SAE features made in `parent`.
    #[track_caller]
    pub fn made_sae(&self, parent: &str) -> PathBuf {
        self.made_of("sae_features_", parent)
    }

    #[track_caller]
    fn made_of(&self, kind: &str, parent: &str) -> PathBuf {
        let mut made: Vec<PathBuf> = fs::read_dir(self.path(parent))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.file_name().unwrap().to_string_lossy().starts_with(kind))
            .collect();
        assert_eq!(made.len(), 1, "one results folder in {made:?} {:#?}", self.listing());
        made.remove(0)
    }

    /// Runs the program; `args` are separated by blanks.
    pub fn run(&self, args: &str) -> Run {
        self.run_with(args, &[])
    }

    /// The same, with further arguments that may be empty or hold blanks.
    pub fn run_with(&self, args: &str, more: &[&str]) -> Run {
        self.finish(self.gradlens(args).args(more))
    }

    /// The same as [`Dir::run`], with an environment variable set.
    pub fn run_where(&self, variable: &str, value: &str, args: &str) -> Run {
        self.finish(self.gradlens(args).env(variable, value))
    }

    /// Starts the program; both streams are pipes.
    pub fn start(&self, args: &str) -> Child {
        let mut command = self.gradlens(args);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    fn gradlens(&self, args: &str) -> Command {
        let mut command = self.command(env!("CARGO_BIN_EXE_gradlens"));
        command.args(args.split_whitespace());
        command
    }

    /// A program to be run here. What the developer's environment says about the hub, its token, proxies, threads
    /// or this program does not reach it.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        for (name, _) in env::vars_os() {
            let upper = name.to_string_lossy().to_uppercase();
            let ours = ["HF_", "HUGGING", "GRADLENS_"].iter().any(|start| upper.starts_with(start));
            if ours || upper.ends_with("_PROXY") {
                command.env_remove(name);
            }
        }
        for name in UNWANTED {
            command.env_remove(name);
        }
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        command.current_dir(self.root.path());
        command
    }

    /// Runs a command to its end.
    pub fn finish(&self, command: &mut Command) -> Run {
        let output = command.output().unwrap();
        Run {
            command: format!("{command:?}"),
            cwd: self.root.path().to_owned(),
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Runs what must succeed.
    #[track_caller]
    pub fn ok(&self, args: &str) -> Run {
        let run = self.run(args);
        run.check(run.code == Some(0), "must succeed");
        run
    }

    /// Runs what must fail with `code` and an error of ours that holds every text of `says`.
    #[track_caller]
    pub fn refuse(&self, code: i32, args: &str, says: &[&str]) {
        self.refuse_with(code, args, &[], says);
    }

    /// The same, with further arguments.
    #[track_caller]
    pub fn refuse_with(&self, code: i32, args: &str, more: &[&str], says: &[&str]) {
        let run = self.refused(code, args, more, says);
        let helps = ["\n  expected: ", "\n  found:    ", "\n\nhint: "];
        run.check(helps.iter().any(|part| run.stderr.contains(part)), "must say more than that it failed");
        run.check(run.stderr.contains("\n  where:    "), "must say where");
    }

    /// Runs what clap itself refuses.
    #[track_caller]
    pub fn refuse_by_clap(&self, args: &str, says: &[&str]) {
        let run = self.refused(2, args, &[], says);
        run.check(run.stderr.contains("try '--help'"), "must name --help");
    }

    #[track_caller]
    fn refused(&self, code: i32, args: &str, more: &[&str], says: &[&str]) -> Run {
        let before = self.listing();
        let run = self.run_with(args, more);
        self.check_refusal(&run, code, &before, says);
        run
    }

    /// What holds for every failure; `before` is the listing before the run.
    #[track_caller]
    pub fn check_refusal(&self, run: &Run, code: i32, before: &[String], says: &[&str]) {
        run.check(run.code == Some(code), &format!("must end with {code}"));
        run.check(run.stderr.starts_with("error: "), "must begin with `error: `");
        run.check(!run.stderr.contains("panicked"), "must not panic");
        run.check(run.stdout.is_empty(), "must leave stdout alone");
        for text in says {
            run.check(run.stderr.contains(text), &format!("must say {text:?}"));
        }
        let after = self.listing();
        run.check(after == before, &format!("must leave nothing behind: {after:#?}"));
    }
}

impl Run {
    /// Fails with everything there is to know about the run.
    #[track_caller]
    pub fn check(&self, holds: bool, what: &str) {
        let Self { command, cwd, code, stdout, stderr } = self;
        assert!(
            holds,
            "{what}\n\ncommand: {command}\ncwd: {}\nstatus: {code:?}\n\
             --- stdout\n{stdout}\n--- stderr\n{stderr}\n---",
            cwd.display()
        );
    }

    #[track_caller]
    pub fn out(&self, text: &str) -> &Self {
        self.check(self.stdout.contains(text), &format!("stdout must hold {text:?}"));
        self
    }

    #[track_caller]
    pub fn err(&self, text: &str) -> &Self {
        self.check(self.stderr.contains(text), &format!("stderr must hold {text:?}"));
        self
    }
}
