//! The device under test, its schedules, and the faults planted in its kernels.

use std::env;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use cuemu::driver::Schedule;
use gradlens::backend::cuda::{Code, Cuda, CudaBackend, CudaLower, CudaSpec, ModuleSpec, Nvrtc, Sources};
use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use super::faults;

/// NaN as float32 and as bfloat16, −1 as an integer.
const NAN_POISON: u32 = 0xffff_ffff;

/// In order, everything as late as possible.
const PLAIN: Schedule = Schedule {
    seed: 1,
    policy: Schedule::FIFO,
    async_mode: Schedule::LAZY,
    poison: NAN_POISON,
    shuffle_blocks: 0,
    wave: 1,
};

/// Every policy with every asynchronous mode; poisons, seeds and block orders vary along.
fn schedules() -> Vec<Schedule> {
    let poisons = [NAN_POISON, 0, 0x7f7f_7f7f];
    let pairs = (0..4).flat_map(|policy| (0..3).map(move |async_mode| (policy, async_mode)));
    let schedule = |(index, (policy, async_mode)): (u32, (u32, u32))| Schedule {
        seed: u64::from(index) + 1,
        policy,
        async_mode,
        poison: poisons[index as usize % poisons.len()],
        shuffle_blocks: index % 2,
        wave: 1 + index % 3,
    };
    (0..).zip(pairs).map(schedule).collect()
}

/// The driver's controls, where it is the stand-in.
struct StandIn {
    /// 0, or why not.
    set_schedule: unsafe extern "C" fn(*const Schedule) -> i32,
}

/// What the tests run on.
enum Driver {
    StandIn(StandIn),
    Real,
}

/// Why there is nothing to run on.
fn driver() -> Result<&'static Driver, String> {
    static DRIVER: OnceLock<Result<Driver, String>> = OnceLock::new();
    let load = || {
        if env::var_os("GRADLENS_TEST_GPU").is_some() {
            return Ok(Driver::Real);
        }
        Nvrtc::load().map_err(|error| error.to_string())?;
        let compiler = env::var("CUEMU_CXX").unwrap_or_else(|_| "g++".to_owned());
        let version =
            Command::new(compiler.split_whitespace().next().unwrap_or("g++")).arg("--version").output();
        version.map_err(|error| {
            format!("{compiler}, which compiles what the kernels are translated to: {error}")
        })?;
        let path = stand_in_path();
        // SAFETY: our own library; loading it runs no code of ours.
        let library = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_GLOBAL) };
        let library = library.map_err(|error| format!("{}: {error}", path.display()))?;
        // SAFETY: the functions have these signatures (crates/cuemu/src/driver).
        let stand_in = unsafe {
            StandIn {
                set_schedule: *library.get(b"cuemu_set_schedule\0").map_err(|error| error.to_string())?,
            }
        };
        std::mem::forget(library);
        Ok(Driver::StandIn(stand_in))
    };
    DRIVER.get_or_init(load).as_ref().map_err(Clone::clone)
}

/// The library that stands in for the driver: cargo builds it beside the tests that need it.
pub fn stand_in_path() -> PathBuf {
    env::current_exe().unwrap().with_file_name("libcuemu.so")
}

/// Whether kernels can be emulated here; if not, the reason was printed.
pub fn runs_here() -> bool {
    match driver() {
        Ok(driver) => matches!(driver, Driver::StandIn(_)),
        Err(reason) => {
            skip_or_panic(&reason);
            false
        }
    }
}

/// One test at a time: the schedule is the process's, and a grid keeps a core busy.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Says why a test does not run; in CI, where everything is installed, that is a failure.
pub fn skip_or_panic(reason: &str) {
    assert!(
        env::var_os("GRADLENS_REQUIRE_CUDA").is_none(),
        "the CUDA tests must run here, but need {reason}"
    );
    println!("skipped: this CUDA test needs {reason}");
}

/// An open device.
pub struct Machine {
    pub cuda: Cuda,
    /// What its driver is handed.
    pub code: Code,
    modules: ModuleSpec,
    stand_in: Option<&'static StandIn>,
    _turn: MutexGuard<'static, ()>,
}

/// The device, with the kernels as they are, or with the fault that this process was started for
/// ([`faults::PLANT`]). `None`: nothing to run on; the reason was printed.
pub fn machine() -> Option<Machine> {
    machine_with(faults::planted(Sources::embedded()))
}

/// The device with these kernels.
pub fn machine_with(sources: Sources) -> Option<Machine> {
    let turn = turn();
    let stand_in = match driver() {
        Ok(Driver::StandIn(stand_in)) => Some(stand_in),
        Ok(Driver::Real) => None,
        Err(reason) => {
            skip_or_panic(&reason);
            return None;
        }
    };
    let modules = match stand_in {
        // Processes of these tests find there what others have compiled.
        Some(_) => {
            let cache = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("kernels");
            ModuleSpec { sources, code: Code::Ptx, cache: Some(cache) }
        }
        // Compiled kernels are kept (GRADLENS_CACHE), so that not every test on a GPU compiles its own.
        None => ModuleSpec { sources, ..ModuleSpec::from_environment().unwrap() },
    };
    let code = modules.code;
    let cuda = Cuda::open(CudaSpec { ordinal: 0, budget_bytes: None, modules: modules.clone() }).unwrap();
    let machine = Machine { cuda, code, modules, stand_in, _turn: turn };
    machine.schedule(PLAIN);
    Some(machine)
}

impl Machine {
    /// The same device, opened once more to run models.
    pub fn backend(&self, lower: CudaLower) -> CudaBackend {
        self.backend_within(None, lower)
    }

    /// The same within a budget.
    pub fn backend_within(&self, budget_bytes: Option<u64>, lower: CudaLower) -> CudaBackend {
        let spec = CudaSpec { ordinal: 0, budget_bytes, modules: self.modules.clone() };
        CudaBackend::open(spec, lower).unwrap()
    }

    /// Whether kernels are emulated.
    pub fn emulated(&self) -> bool {
        self.stand_in.is_some()
    }

    /// How grids run from now on; a GPU takes no orders.
    pub fn schedule(&self, schedule: Schedule) {
        if let Some(stand_in) = self.stand_in {
            // SAFETY: reads one schedule of this layout.
            assert_eq!(unsafe { (stand_in.set_schedule)(&schedule) }, 0, "{schedule:?} is refused");
        }
    }

    /// Whether a case of this many elements can be waited for: everything but under ThreadSanitizer, which needs
    /// half a second for a thousand threads.
    pub fn affordable(&self, elements: usize) -> bool {
        !sanitized() || elements <= 2_000
    }

    /// Runs `work` under the plain schedule, and under every other one; all must give the same bytes, which are
    /// returned. A process with a planted fault tries four, one with a sanitizer two. A GPU schedules as it
    /// likes: three times.
    pub fn same_under_all_schedules<T: PartialEq>(&self, work: impl Fn() -> T) -> T {
        let counted = || {
            RUNS.fetch_add(1, Ordering::Relaxed);
            work()
        };
        let first = counted();
        if !self.emulated() {
            assert!(counted() == first && counted() == first, "other bytes each time");
            return first;
        }
        let step = match (sanitized(), faults::is_planted()) {
            (true, _) => 8,
            (false, true) => 4,
            (false, false) => 1,
        };
        for schedule in schedules().into_iter().skip(step).step_by(step) {
            self.schedule(schedule);
            assert!(counted() == first, "other bytes under {schedule:?}");
        }
        self.schedule(PLAIN);
        first
    }
}

/// How often [`Machine::same_under_all_schedules`] has run its work in this process.
static RUNS: AtomicUsize = AtomicUsize::new(0);

impl Drop for Machine {
    fn drop(&mut self) {
        if faults::is_child() {
            println!("{RUNS_LINE}{}", RUNS.load(Ordering::Relaxed));
        }
    }
}

/// How a process started by [`faults`] says how many runs it made.
pub const RUNS_LINE: &str = "runs so far: ";

/// Whether kernels are compiled with a sanitizer in this process.
fn sanitized() -> bool {
    env::var("CUEMU_SANITIZER").is_ok_and(|name| name != "none")
}

/// A reproducible stream of numbers, about normal with variance 1/3, never tiny: rounding to bfloat16 keeps them apart.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1_u64 << 24) as f32
    }

    pub fn normal(&mut self) -> f32 {
        (0..4).map(|_| self.uniform() - 0.5).sum()
    }

    pub fn f32(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.normal()).collect()
    }

    pub fn bf16(&mut self, len: usize) -> Vec<half::bf16> {
        (0..len).map(|_| half::bf16::from_f32(self.normal())).collect()
    }
}

/// ‖found − wanted‖ / ‖wanted‖; NaN where anything found is.
pub fn relative_error(found: impl IntoIterator<Item = f64>, wanted: &[f64]) -> f64 {
    let mut count = 0;
    let difference: f64 =
        found.into_iter().zip(wanted).inspect(|_| count += 1).map(|(f, w)| (f - w).powi(2)).sum();
    assert_eq!(count, wanted.len());
    let norm: f64 = wanted.iter().map(|w| w * w).sum();
    (difference / norm.max(f64::MIN_POSITIVE)).sqrt()
}
