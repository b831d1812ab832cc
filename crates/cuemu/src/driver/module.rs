//! Modules and their functions.

use std::ffi::{c_char, c_void};
use std::path::Path;
use std::sync::Arc;

use super::abi::{Handle, In, Out};
use super::context::working;
use super::device::{self, DEFAULT_SHARED, MAX_THREADS, api};
use super::error::{Code, Error, Result, forever};
use super::jit::{self, Kernel};
use super::{State, state};

/// The version of PTX that drivers of this CUDA version read.
const PTX_VERSION: (u32, u32) = (9, 0);

pub(super) struct Module {
    pub(super) context: Handle,
    compiled: Arc<jit::Module>,
}

pub(super) struct Function {
    pub(super) context: Handle,
    module: Handle,
    pub(super) kernel: Arc<Kernel>,
    /// Dynamic shared memory that a launch may ask for.
    pub(super) max_dynamic: u32,
    preferred_carveout: i32,
}

impl Function {
    /// Threads that a block may have.
    pub(super) fn max_threads(&self) -> u32 {
        match self.kernel.max_threads {
            0 => MAX_THREADS,
            bound => bound.min(MAX_THREADS),
        }
    }
}

/// The function with this handle.
pub(super) fn function(state: &mut State, function: Handle) -> Result<&mut Function> {
    let known = state.functions.get_mut(&function);
    known.ok_or_else(|| {
        Error::new(Code::INVALID_HANDLE, "there is no such function, or its module was unloaded")
    })
}

/// What a program hands over as a module, if it is PTX.
fn ptx(image: &In<c_char>) -> Result<String> {
    let first = image.text()?.to_bytes();
    if first.starts_with(b"\x7fELF") || first.starts_with(&[0x50, 0xED, 0x55, 0xBA]) {
        return Err(Error::new(
            Code::NO_BINARY_FOR_GPU,
            "this stand-in driver executes PTX, not machine code: set GRADLENS_CUDA_CODE=ptx",
        ));
    }
    let text = std::str::from_utf8(first).ok().filter(|text| text.contains(".version"));
    text.map(String::from).ok_or_else(|| Error::new(Code::INVALID_IMAGE, "the module is no PTX"))
}

/// Whether a device of this compute capability takes the PTX.
fn check_target(ptx: &str, capability: u32) -> Result<()> {
    let value = |directive: &str| {
        ptx.lines().find_map(|line| line.trim().strip_prefix(directive)).map(|rest| rest.trim().to_string())
    };
    let version = value(".version").unwrap_or_default();
    let mut numbers = version.split('.').map(|number| number.trim().parse::<u32>());
    if let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next())
        && (major, minor) > PTX_VERSION
    {
        let (known_major, known_minor) = PTX_VERSION;
        return Err(Error::new(
            Code::UNSUPPORTED_PTX_VERSION,
            format!("PTX {version} is newer than what the driver reads, {known_major}.{known_minor}"),
        ));
    }
    let target = value(".target").unwrap_or_default();
    let name = target.split(',').next().unwrap_or_default().trim();
    let digits: String = name.trim_start_matches("sm_").chars().take_while(char::is_ascii_digit).collect();
    let Ok(number) = digits.parse::<u32>() else {
        return Err(Error::new(Code::INVALID_PTX, format!("the PTX has no target: `.target {target}`")));
    };
    // sm_90a runs on 9.0 only, sm_100f on 10.x from 10.0, anything else on what is not older.
    let runs = match name.chars().last() {
        Some('a') => number == capability,
        Some('f') => number <= capability && number / 10 == capability / 10,
        _ => number <= capability,
    };
    if runs {
        return Ok(());
    }
    Err(Error::new(
        Code::NO_BINARY_FOR_GPU,
        format!("PTX for {name} does not run on compute capability {}.{}", capability / 10, capability % 10),
    ))
}

fn load(ptx: &str) -> Result<Handle> {
    let context = working(&state())?;
    check_target(ptx, device::limits()?.capability)?;
    let compiled = Arc::new(jit::compile(ptx)?);
    let mut state = state();
    let handle = state.new_handle();
    state.modules.insert(handle, Module { context, compiled });
    Ok(handle)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleLoadData(module: Out<Handle>, image: In<c_char>) -> i32 {
    api(|| module.put(load(&ptx(&image)?)?))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleLoadDataEx(
    module: Out<Handle>,
    image: In<c_char>,
    count: u32,
    options: In<i32>,
    values: In<*mut c_void>,
) -> i32 {
    const ERROR_LOG: i32 = 5;
    const ERROR_LOG_BYTES: i32 = 6;
    let option = |wanted: i32| {
        let index = (0..count as usize).find(|index| options.at(*index) == Ok(wanted))?;
        values.at(index).ok()
    };
    api(|| {
        let outcome = ptx(&image).and_then(|ptx| load(&ptx));
        if let (Err(error), Some(log), Some(bytes)) = (&outcome, option(ERROR_LOG), option(ERROR_LOG_BYTES)) {
            // No room for the log is no reason to hide the error itself.
            let _ = Out::at_address(log as u64).put_text(error.text(), bytes as usize);
        }
        module.put(outcome?)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleLoad(module: Out<Handle>, file: In<c_char>) -> i32 {
    api(|| {
        let name = file.text()?.to_string_lossy().into_owned();
        let mut text = std::fs::read(Path::new(&name))
            .map_err(|error| Error::new(Code::FILE_NOT_FOUND, format!("{name}: {error}")))?;
        text.push(0);
        module.put(load(&ptx(&In::at_address(text.as_ptr() as u64).cast())?)?)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleUnload(module: Handle) -> i32 {
    api(|| {
        let mut state = state();
        if state.modules.remove(&module).is_none() {
            return Err(no_module());
        }
        state.functions.retain(|_, function| function.module != module);
        Ok(())
    })
}

fn no_module() -> Error {
    Error::new(Code::INVALID_HANDLE, "there is no such module, or it was unloaded")
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleGetFunction(function: Out<Handle>, module: Handle, name: In<c_char>) -> i32 {
    api(|| {
        let name = name.text()?.to_string_lossy();
        let (context, compiled) = {
            let state = state();
            let loaded = state.modules.get(&module).ok_or_else(no_module)?;
            (loaded.context, Arc::clone(&loaded.compiled))
        };
        // Without the lock: the compiler may take a while.
        let kernel = compiled.kernel(&name)?.ok_or_else(|| {
            let names = compiled.names().join(", ");
            Error::new(Code::NOT_FOUND, format!("the module has no kernel {name}; it has: {names}"))
        })?;
        let mut state = state();
        // The module may have been unloaded meanwhile.
        state.modules.get(&module).ok_or_else(no_module)?;
        let same = |known: &&Function| known.module == module && known.kernel.name == kernel.name;
        if let Some((handle, _)) = state.functions.iter().find(|(_, known)| same(known)) {
            return function.put(*handle);
        }
        let max_dynamic = DEFAULT_SHARED.saturating_sub(kernel.static_shared_bytes);
        let handle = state.new_handle();
        let entry = Function { context, module, kernel, max_dynamic, preferred_carveout: -1 };
        state.functions.insert(handle, entry);
        function.put(handle)
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleGetGlobal_v2(
    _address: Out<u64>,
    _bytes: Out<usize>,
    _module: Handle,
    name: In<c_char>,
) -> i32 {
    api(|| {
        let name = name.text()?.to_string_lossy();
        Err(Error::new(Code::NOT_FOUND, format!("{name}: variables of modules are not emulated")))
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuFuncGetName(name: Out<*const c_char>, function: Handle) -> i32 {
    api(|| name.put(forever(&self::function(&mut state(), function)?.kernel.name).as_ptr()))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuFuncGetModule(module: Out<Handle>, function: Handle) -> i32 {
    api(|| module.put(self::function(&mut state(), function)?.module))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuFuncGetAttribute(value: Out<i32>, attribute: i32, function: Handle) -> i32 {
    api(|| {
        let capability = device::limits()?.capability as i32;
        let mut state = state();
        let function = self::function(&mut state, function)?;
        value.put(match attribute {
            0 => function.max_threads() as i32,
            1 => function.kernel.static_shared_bytes as i32,
            5 | 6 => capability, // of the PTX, of the machine code
            8 => function.max_dynamic as i32,
            9 => function.preferred_carveout,
            // Constant and local memory, registers: what only a compiler to machine code knows.
            2..=4 | 7 | 10..=15 => 0,
            _ => return Err(Error::invalid(format!("function attribute {attribute} does not exist"))),
        })
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuFuncSetAttribute(function: Handle, attribute: i32, value: i32) -> i32 {
    api(|| {
        let limit = device::limits()?.shared_optin;
        let mut state = state();
        let function = self::function(&mut state, function)?;
        let name = &function.kernel.name;
        match attribute {
            8 => {
                let fixed = function.kernel.static_shared_bytes;
                let wanted = u32::try_from(value).ok();
                let fits = |wanted: &u32| wanted.checked_add(fixed).is_some_and(|sum| sum <= limit);
                function.max_dynamic = wanted.filter(fits).ok_or_else(|| {
                    Error::invalid(format!(
                        "{name}: {value} bytes of dynamic shared memory and {fixed} of variables, a block has {limit}"
                    ))
                })?;
            }
            9 if (-1..=100).contains(&value) => function.preferred_carveout = value,
            14 | 15 => {} // clusters, which no launch has
            _ => {
                return Err(Error::invalid(format!(
                    "function attribute {attribute} cannot be set to {value}"
                )));
            }
        }
        Ok(())
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuFuncSetCacheConfig(function: Handle, _config: i32) -> i32 {
    api(|| self::function(&mut state(), function).map(drop))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_run_where_they_can() {
        let check =
            |target: &str, capability| check_target(&format!(".version 9.0\n.target {target}\n"), capability);
        for (target, capability, runs) in [
            ("sm_80", 80, true),
            ("sm_80", 90, true),
            ("sm_90", 80, false),
            ("sm_90a", 90, true),
            ("sm_90a", 89, false),
            ("sm_80, debug", 80, true),
        ] {
            assert_eq!(check(target, capability).is_ok(), runs, "{target} on {capability}");
        }
        assert_eq!(check("nothing", 90).unwrap_err().code(), Code::INVALID_PTX);
        let newer = check_target(".version 9.1\n.target sm_80", 90).unwrap_err();
        assert_eq!(newer.code(), Code::UNSUPPORTED_PTX_VERSION);
    }
}
