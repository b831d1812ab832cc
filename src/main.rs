//! The program: command line → plan → run.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use gradlens::cli::{Cli, Command};
use gradlens::error::Result;
use gradlens::interrupt::Interrupt;
use gradlens::output::{Log, folder};
use gradlens::plan::{Fetcher, Plan, doctor, preload};
use gradlens::run;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let log = if cli.command.quiet() { Log::quiet() } else { Log::new() };
    match job(&cli.command, &log) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // `eprintln!` would panic where nobody reads stderr any more.
            let _ = writeln!(io::stderr(), "error: {error}");
            ExitCode::from(error.kind().exit_code())
        }
    }
}

fn job(command: &Command, log: &Log) -> Result<()> {
    // First of all: the local time zone can be told only while there is one thread.
    let timestamp = folder::now();
    let interrupt = Interrupt::on_signals()?;
    let fetcher = Fetcher::new(log, &interrupt);
    let plan = match command {
        Command::Layer(args) => Plan::layer(args, timestamp, &fetcher)?,
        Command::Demo(args) => Plan::demo(args, timestamp, &fetcher)?,
        Command::Fetch(args) => return preload(args, &fetcher),
        Command::Doctor(args) => return doctor(args, &fetcher),
    };
    run::run(&plan, log, &interrupt)
}
