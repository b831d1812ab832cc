//! `--device`, `--dtype` and the memory flags → where a plan computes, and in what.

use crate::backend::cpu::Cpu;
use crate::backend::cuda::device::MIN_COMPUTE_CAPABILITY;
use crate::backend::cuda::moe::MAX_EXPERTS;
use crate::backend::cuda::{self, CudaLower, CudaSpec, DeviceInfo, DeviceName, Format, ModuleSpec, Nvrtc};
use crate::cli::{DtypeArg, MachineArgs};
use crate::error::{Error, Result};
use crate::model::Spec;
use crate::model::op::Op;
use crate::units::size;

use super::machine::GIB;
use super::memory::{self, Demand, Memory};

/// Where passes are computed.
pub enum Devices {
    /// Here.
    Cpu,
    /// Each with the whole model; passes are dealt out.
    Cuda {
        /// What to open.
        devices: Vec<CudaSpec>,
        /// As the driver calls them.
        names: Vec<String>,
        /// How the model runs there.
        lower: CudaLower,
    },
}

impl Devices {
    /// What `machine` names; on `auto`, what is missing for a CUDA device that is there goes to `warnings`.
    ///
    /// # Errors
    /// A name that is none, a device that is not there or cannot be used, a type that it does not compute in.
    pub(super) fn resolve(machine: &MachineArgs, warnings: &mut Vec<String>) -> Result<Self> {
        let names = names(&machine.device)?;
        let ordinals = match names[..] {
            [DeviceName::Auto] => match usable(machine, warnings)? {
                Some(ordinal) => vec![ordinal],
                None => return Self::cpu(machine),
            },
            [DeviceName::Cpu] => return Self::cpu(machine),
            _ => names
                .iter()
                .filter_map(|name| if let DeviceName::Cuda(n) = name { Some(*n) } else { None })
                .collect(),
        };
        let all = cuda::devices().map_err(|error| error.at("--device"))?;
        check_alike(&all, &ordinals)?;
        let format = match machine.dtype {
            DtypeArg::Float32 => Format::F32,
            DtypeArg::Auto | DtypeArg::Bfloat16 => Format::Bf16,
        };
        let modules = ModuleSpec::from_environment()?;
        let device = |&ordinal: &usize| {
            let free = cuda::device::free_bytes(&all, ordinal)?;
            let budget_bytes = Some(device_budget(machine.device_memory, free, ordinal)?);
            Ok(CudaSpec { ordinal, budget_bytes, modules: modules.clone() })
        };
        let devices = ordinals.iter().map(device).collect::<Result<_>>()?;
        let names = ordinals.iter().map(|&ordinal| all[ordinal].name.clone()).collect();
        Nvrtc::load()?;
        Ok(Self::Cuda { devices, names, lower: CudaLower { format, fuse: true } })
    }

    fn cpu(machine: &MachineArgs) -> Result<Self> {
        if machine.dtype == DtypeArg::Bfloat16 {
            return Err(Error::usage("the CPU does not compute in bfloat16")
                .at("--dtype")
                .expected("auto or float32")
                .found("bfloat16")
                .hint("a bfloat16 checkpoint is read as it is: its weights are exact in float32"));
        }
        if machine.device_memory.is_some() {
            return Err(Error::usage("there is no CUDA device for a memory budget")
                .at("--device_memory")
                .expected("--device cuda, or --memory for the CPU")
                .found(format!("--device {}", machine.device)));
        }
        Ok(Self::Cpu)
    }

    /// As metadata names it: `cpu`, `cuda:0`, `cuda:0,cuda:1`.
    pub fn name(&self) -> String {
        match self {
            Self::Cpu => "cpu".into(),
            Self::Cuda { devices, .. } => {
                devices.iter().map(|device| format!("cuda:{}", device.ordinal)).collect::<Vec<_>>().join(",")
            }
        }
    }

    /// What the driver calls them, if there is a driver.
    pub fn names(&self) -> Option<&[String]> {
        match self {
            Self::Cpu => None,
            Self::Cuda { names, .. } => Some(names),
        }
    }

    /// The type of what products read, as metadata names it.
    pub fn dtype(&self) -> &'static str {
        match self {
            Self::Cpu => "float32",
            Self::Cuda { lower, .. } => lower.format.pick("float32", "bfloat16"),
        }
    }

    /// What becomes of weights that are stored more finely than they are multiplied; `finer`: their type.
    pub(super) fn rounding(&self, finer: &str) -> Option<String> {
        let Self::Cuda { lower: CudaLower { format: Format::Bf16, .. }, .. } = self else { return None };
        Some(format!("weights in {finer} are rounded to bfloat16 on the device; --dtype float32 keeps them"))
    }

    /// How the model is made to fit; `demand` is for the CPU, whose budget it names.
    ///
    /// # Errors
    /// A device that is too small for the smallest way to run.
    pub(super) fn plan(&self, demand: &Demand<'_>) -> Result<Memory> {
        let Self::Cuda { devices, lower, .. } = self else {
            return Ok(memory::plan(&Cpu::<f32>::new(), demand));
        };
        check_shapes(demand.spec, demand.head_dim)?;
        // All devices do the same, so the smallest decides.
        let budget_bytes = devices.iter().filter_map(|device| device.budget_bytes).min().unwrap_or(0);
        let memory = memory::plan(lower, &Demand { budget_bytes, slow_weights: false, ..demand.clone() });
        if memory.total_bytes() <= budget_bytes {
            return Ok(memory);
        }
        Err(Error::new("the device has too little memory for this model")
            .at(format!("--device {}", self.name()))
            .expected(format!("room for {} or more", size(memory.total_bytes())))
            .found(format!("a budget of {}; even layer by layer the run takes {memory}", size(budget_bytes),))
            .hint("a larger --device_memory, a smaller --max_length or --tokens_per_pass, or --device cpu"))
    }
}

/// What the kernels cannot hold.
fn check_shapes(spec: &Spec, head_dim: usize) -> Result<()> {
    let blocks = || spec.blocks.iter();
    let widths = blocks().flat_map(|block| &block.widths).copied();
    // q, k and v side by side, as attention reads them.
    let packed = blocks().flat_map(|block| &block.ops).map(|op| match op {
        Op::Attend { attention, .. } => (attention.heads + 2 * attention.kv_heads) * attention.head_dim,
        _ => 0,
    });
    let experts = blocks().flat_map(|block| block.ops.iter().map(move |op| (block, op)));
    let experts = experts.map(|(block, op)| match op {
        Op::Route { logits, .. } => block.widths[logits.0],
        _ => 0,
    });
    let widest = widths.chain(packed).chain([spec.vocab_size]).max().unwrap_or(0);
    let limits = [
        ("head dimension", head_dim, 256),
        ("layer or vocabulary", widest, (1 << 24) - 1),
        ("number of experts", experts.max().unwrap_or(0), MAX_EXPERTS),
    ];
    match limits.into_iter().find(|(_, size, most)| size > most) {
        None => Ok(()),
        Some((what, size, most)) => Err(Error::new(format!("the CUDA kernels do not take this {what}"))
            .at("config.json")
            .expected(format!("at most {most}"))
            .found(size)
            .hint("--device cpu")),
    }
}

/// The devices that `--device` lists, each once.
fn names(list: &str) -> Result<Vec<DeviceName>> {
    let names = list.split(',').map(|name| name.trim().parse()).collect::<Result<Vec<DeviceName>>>();
    let names = names.map_err(|error| error.at("--device"))?;
    let cuda = names.iter().all(|name| matches!(name, DeviceName::Cuda(_)));
    let twice = (1..names.len()).any(|index| names[..index].contains(&names[index]));
    if (names.len() > 1 && !cuda) || twice {
        return Err(Error::usage("these devices do not go together")
            .at("--device")
            .expected("auto, cpu, or CUDA devices, each once: cuda:0,cuda:1")
            .found(list));
    }
    Ok(names)
}

/// Several devices that would not compute the same bytes.
fn check_alike(all: &[DeviceInfo], ordinals: &[usize]) -> Result<()> {
    let infos: Vec<&DeviceInfo> = ordinals.iter().filter_map(|&ordinal| all.get(ordinal)).collect();
    let Some(other) = infos.iter().find(|info| info.compute_capability != infos[0].compute_capability) else {
        return Ok(());
    };
    let about = |info: &DeviceInfo| {
        let (major, minor) = info.compute_capability;
        format!("cuda:{} {} of {major}.{minor}", info.ordinal, info.name)
    };
    Err(Error::usage("these devices do not go together")
        .at("--device")
        .expected(
            "devices of one compute capability: others round differently, and the slowest sets the pace",
        )
        .found(format!("{} and {}", about(infos[0]), about(other))))
}

/// The first CUDA device with all that it needs. That there is one which lacks something goes to `warnings`.
fn usable(machine: &MachineArgs, warnings: &mut Vec<String>) -> Result<Option<usize>> {
    // Whoever asks for what only a CUDA device has means one.
    let meant = machine.device_memory.is_some() || machine.dtype == DtypeArg::Bfloat16;
    let all = match cuda::devices() {
        Ok(all) => all,
        // No driver, no device: nothing to say.
        Err(_) if !cuda::device::driver_is_there() => return Ok(None),
        Err(error) if meant => return Err(error.at("--device")),
        Err(error) => {
            warnings.push(format!("computing on the CPU, though there is a CUDA driver: {error}"));
            return Ok(None);
        }
    };
    let Some(first) = all.first() else { return Ok(None) };
    let new_enough = |info: &&DeviceInfo| info.compute_capability >= MIN_COMPUTE_CAPABILITY;
    let found = all.iter().find(new_enough).map(|info| info.ordinal);
    match (found, Nvrtc::load()) {
        (Some(ordinal), Ok(_)) => Ok(Some(ordinal)),
        (Some(_), Err(error)) if meant => Err(error),
        (found, nvrtc) => {
            let reason = match (found, nvrtc) {
                (Some(_), Err(error)) => error.to_string(),
                _ => {
                    let (major, minor) = first.compute_capability;
                    format!("its compute capability is {major}.{minor}, and 8.0 is needed")
                }
            };
            warnings.push(format!(
                "computing on the CPU, though cuda:{} ({}) is there: {reason}",
                first.ordinal, first.name
            ));
            Ok(None)
        }
    }
}

/// Bytes of a device that models may use: the driver, its contexts and the compiled kernels take some besides.
pub(super) fn usable_bytes(free: u64) -> u64 {
    free - free / 16
}

/// Bytes of a device that may be used: as given, or what is free, less a reserve.
fn device_budget(gib: Option<f64>, free: u64, ordinal: usize) -> Result<u64> {
    let most = usable_bytes(free);
    let Some(gib) = gib else { return Ok(most) };
    let wrong = |what: &str| {
        Error::usage(what)
            .at("--device_memory")
            .expected(format!(
                "GiB, more than 0 and at most {:.2}: what is free on cuda:{ordinal}",
                most as f64 / GIB
            ))
            .found(gib)
    };
    if !(gib.is_finite() && gib > 0.0) {
        return Err(wrong("the device memory budget cannot be used"));
    }
    let bytes = (gib * GIB) as u64;
    if bytes > most {
        return Err(wrong("the device has less memory free"));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Config, arch, describe};

    #[test]
    fn shapes_that_kernels_cannot_hold() {
        let with_experts = arch::ARCHITECTURES.iter().find(|row| row.experts.is_some()).unwrap();
        let check = |keys: &str| {
            let text = format!(
                r#"{{"model_type": "{}", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
                "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 9{keys}}}"#,
                with_experts.model_type
            );
            let config = Config::from_json(&text, "config.json".as_ref()).unwrap();
            check_shapes(&describe(&config), config.head_dim)
        };
        assert!(check(r#", "num_local_experts": 256"#).is_ok());
        for (keys, says) in [
            (r#", "num_local_experts": 257"#, "number of experts"),
            (r#", "head_dim": 258"#, "head dimension"),
        ] {
            let error = check(keys).unwrap_err().to_string();
            assert!(error.contains(says) && error.contains("--device cpu"), "{error}");
        }
    }

    #[test]
    fn lists_of_devices() {
        assert_eq!(names("cuda:1,cuda:0").unwrap(), [DeviceName::Cuda(1), DeviceName::Cuda(0)]);
        assert_eq!(names("auto").unwrap(), [DeviceName::Auto]);
        for wrong in ["cuda:0,cuda", "cuda:0,cpu", "auto,cuda:0", "cuda:0,", "cpu,cpu", ""] {
            let error = names(wrong).unwrap_err().to_string();
            assert!(error.contains("--device"), "{wrong}: {error}");
        }
    }

    #[test]
    fn budgets_of_devices() {
        assert_eq!(device_budget(None, 16 << 30, 0).unwrap(), 15 << 30);
        assert_eq!(device_budget(Some(0.5), 16 << 30, 0).unwrap(), 1 << 29);
        for wrong in [0.0, -1.0, f64::NAN, f64::INFINITY, 15.1] {
            let error = device_budget(Some(wrong), 16 << 30, 3).unwrap_err().to_string();
            assert!(error.contains("--device_memory") && error.contains("at most 15.00"), "{wrong}: {error}");
        }
    }
}
