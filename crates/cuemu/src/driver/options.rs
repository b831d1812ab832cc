//! The environment: what the emulated machine is like, and how kernels run on it.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::{env, fmt};

use super::abi::{In, Out};
use super::error::{Error, Result, guard};

/// How a grid is run: `CuemuSchedule` of runtime/cuemu.h. Results of a correct kernel do not depend on it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Of the random choices.
    pub seed: u64,
    /// Which ready thread, and which stream, runs next: [`FIFO`](Self::FIFO), ...
    pub policy: u32,
    /// When asynchronous copies and matrix operations happen: [`LAZY`](Self::LAZY), ...
    pub async_mode: u32,
    /// Pattern of memory that nobody has written.
    pub poison: u32,
    /// 1: blocks start in random order.
    pub shuffle_blocks: u32,
    /// Blocks that are resident at the same time, at least 1.
    pub wave: u32,
}

impl Schedule {
    /// Policy: in order.
    pub const FIFO: u32 = 0;
    /// Policy: the last one first.
    pub const REVERSE: u32 = 1;
    /// Policy: any.
    pub const RANDOM: u32 = 2;
    /// Policy: random priorities, which stay.
    pub const PRIORITY: u32 = 3;
    /// Asynchronous operations happen when they are waited for.
    pub const LAZY: u32 = 0;
    /// Asynchronous operations happen at once.
    pub const EAGER: u32 = 1;
    /// Asynchronous operations happen at some time in between.
    pub const MIXED: u32 = 2;
}

impl Default for Schedule {
    fn default() -> Self {
        Self {
            seed: 0,
            policy: Self::FIFO,
            async_mode: Self::LAZY,
            poison: 0xFFFF_FFFF,
            shuffle_blocks: 0,
            wave: 1,
        }
    }
}

/// What kernels are compiled with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sanitizer {
    /// Nothing: fast.
    None,
    /// AddressSanitizer, and UndefinedBehaviorSanitizer's check of alignment.
    Address,
    /// ThreadSanitizer.
    Thread,
}

impl Sanitizer {
    /// The value of `CUEMU_SANITIZER`.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Address => "address",
            Self::Thread => "thread",
        }
    }
}

/// Everything that the environment says. The crate's documentation has the table.
#[derive(Clone, Debug)]
pub struct Options {
    /// How grids run, until `cuemu_set_schedule` says otherwise.
    pub schedule: Schedule,
    /// Ten times the compute capability that the devices report.
    pub compute_capability: u32,
    /// Number of devices.
    pub devices: usize,
    /// Bytes of memory of each device.
    pub memory: u64,
    /// What kernels are compiled with.
    pub sanitizer: Sanitizer,
    /// How much the compiler does for speed: 0, 1 or 2.
    pub optimize: u32,
    /// Where compiled kernels are kept.
    pub cache: PathBuf,
    /// The compiler, and arguments that come first.
    pub compiler: Vec<String>,
}

impl Options {
    /// The environment, read once.
    pub fn get() -> Result<&'static Self> {
        static OPTIONS: OnceLock<Result<Options>> = OnceLock::new();
        OPTIONS.get_or_init(|| Self::read(|name| env::var(name).ok())).as_ref().map_err(Clone::clone)
    }

    fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        // An empty variable counts as absent: that is how shells pass on one that was never set.
        let text = |name: &str| variable(name).filter(|value| !value.is_empty());
        let plain = Schedule::default();
        let schedule = Schedule {
            seed: number(&text, "CUEMU_SEED", plain.seed)?,
            policy: choice(&text, "CUEMU_POLICY", &["fifo", "reverse", "random", "priority"])?,
            async_mode: choice(&text, "CUEMU_ASYNC", &["lazy", "eager", "mixed"])?,
            poison: number(&text, "CUEMU_POISON", plain.poison)?,
            shuffle_blocks: choice(&text, "CUEMU_SHUFFLE_BLOCKS", &["0", "1"])?,
            wave: number::<u32>(&text, "CUEMU_WAVE", plain.wave)?.max(1),
        };
        let sanitizers = [Sanitizer::None, Sanitizer::Address, Sanitizer::Thread];
        let sanitizer = choice(&text, "CUEMU_SANITIZER", &sanitizers.map(Sanitizer::name))?;
        let capabilities = [90, 80, 89];
        let capability = choice(&text, "CUEMU_CC", &["90", "80", "89"])?;
        let compiler = text("CUEMU_CXX").unwrap_or_else(|| "g++".into());
        Ok(Self {
            schedule,
            compute_capability: capabilities[capability as usize],
            devices: number(&text, "CUEMU_DEVICES", 2)?,
            memory: number(&text, "CUEMU_MEMORY", 4 << 30)?,
            sanitizer: sanitizers[sanitizer as usize],
            optimize: [1, 0, 2][choice(&text, "CUEMU_OPTIMIZE", &["1", "0", "2"])? as usize],
            cache: text("CUEMU_CACHE")
                .map_or_else(|| PathBuf::from(env!("OUT_DIR")).join("kernels"), PathBuf::from),
            compiler: compiler.split_whitespace().map(String::from).collect(),
        })
    }
}

/// An integer, decimal or with `0x`.
fn number<T: FromStr + TryFrom<u64>>(
    text: &impl Fn(&str) -> Option<String>,
    name: &str,
    otherwise: T,
) -> Result<T> {
    let Some(value) = text(name) else { return Ok(otherwise) };
    let digits = value.trim();
    let parsed = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(digits) => u64::from_str_radix(digits, 16).ok().and_then(|number| T::try_from(number).ok()),
        None => digits.parse().ok(),
    };
    parsed.ok_or_else(|| wrong(name, &value, "a number"))
}

/// The index of the value among `names`; the first one if there is no value.
fn choice(text: &impl Fn(&str) -> Option<String>, name: &str, names: &[&str]) -> Result<u32> {
    let Some(value) = text(name) else { return Ok(0) };
    let index = names.iter().position(|known| value.eq_ignore_ascii_case(known));
    index
        .map(|index| index as u32)
        .ok_or_else(|| wrong(name, &value, format_args!("one of {}", names.join(", "))))
}

fn wrong(name: &str, value: &str, expected: impl fmt::Display) -> Error {
    Error::invalid(format!("{name}={value}: expected {expected}"))
}

static SCHEDULE: Mutex<Option<Schedule>> = Mutex::new(None);

/// How the next grid runs.
pub fn schedule() -> Schedule {
    let set = *SCHEDULE.lock().unwrap_or_else(PoisonError::into_inner);
    set.unwrap_or_else(|| Options::get().map_or_else(|_| Schedule::default(), |options| options.schedule))
}

/// Says how grids run from now on, those included that are waiting in a stream.
pub fn set_schedule(schedule: Schedule) {
    let schedule = Schedule { wave: schedule.wave.max(1), ..schedule };
    *SCHEDULE.lock().unwrap_or_else(PoisonError::into_inner) = Some(schedule);
}

/// For tests: [`set_schedule`]. Null: what the environment says.
#[unsafe(no_mangle)]
unsafe extern "C" fn cuemu_set_schedule(wanted: In<Schedule>) -> i32 {
    guard(|| {
        if wanted.is_null() {
            *SCHEDULE.lock().unwrap_or_else(PoisonError::into_inner) = None;
        } else {
            let wanted = wanted.at(0)?;
            if wanted.policy > Schedule::PRIORITY || wanted.async_mode > Schedule::MIXED {
                return Err(Error::invalid("this schedule has an unknown policy or asynchronous mode"));
            }
            set_schedule(wanted);
        }
        Ok(())
    })
}

/// For tests: the size of [`Schedule`], which a caller of [`cuemu_set_schedule`] has to agree with.
#[unsafe(no_mangle)]
extern "C" fn cuemu_schedule_bytes() -> usize {
    size_of::<Schedule>()
}

/// For tests: [`schedule`].
#[unsafe(no_mangle)]
unsafe extern "C" fn cuemu_get_schedule(now: Out<Schedule>) -> i32 {
    guard(|| now.put(schedule()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Options> {
        let find = |name: &str| variables.iter().find(|(known, _)| *known == name);
        Options::read(|name| find(name).map(|(_, value)| (*value).to_string()))
    }

    #[test]
    fn defaults_and_values() {
        let options = read(&[]).unwrap();
        assert_eq!(options.schedule, Schedule::default());
        assert_eq!((options.devices, options.compute_capability, options.memory), (2, 90, 4 << 30));
        let options = read(&[
            ("CUEMU_POLICY", "random"),
            ("CUEMU_POISON", "0x7fc00000"),
            ("CUEMU_CC", "80"),
            ("CUEMU_WAVE", "0"),
            ("CUEMU_SEED", ""),
        ])
        .unwrap();
        assert_eq!((options.schedule.policy, options.schedule.poison), (Schedule::RANDOM, 0x7fc0_0000));
        assert_eq!((options.compute_capability, options.schedule.wave, options.schedule.seed), (80, 1, 0));
    }

    #[test]
    fn mistakes_are_named() {
        let text = |name: &str, value: &str| read(&[(name, value)]).unwrap_err().text().to_string();
        assert_eq!(text("CUEMU_SEED", "x"), "CUEMU_SEED=x: expected a number");
        assert_eq!(text("CUEMU_CC", "70"), "CUEMU_CC=70: expected one of 90, 80, 89");
    }
}
