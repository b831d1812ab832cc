//! The program: command line → plan → run.

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
            // Not `eprintln!`: a thread that is still at work may have a bar up, and who ran us may have closed stderr.
            log.error(&error.to_string());
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
        Command::Sae(args) => Plan::sae(args, timestamp, &fetcher)?,
        Command::Demo(args) => {
            run::run(&Plan::demo(args, timestamp, &fetcher)?, &log.fresh(), &interrupt)?;
            return run::run(&Plan::demo_sae(args, timestamp, &fetcher)?, &log.fresh(), &interrupt);
        }
        Command::Fetch(args) => return preload(args, &fetcher),
        Command::Doctor(args) => return doctor(args, timestamp, &fetcher),
    };
    run::run(&plan, log, &interrupt)
}
