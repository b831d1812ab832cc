//! What can be read off the machine code without running it, for every kernel and every architecture.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use gradlens::backend::cuda::{Code, Nvrtc, Sources};
use rayon::prelude::*;

use super::machine::skip_or_panic;

const ARCHS: [&str; 3] = ["80", "89", "90a"];
/// Of one multiprocessor, on all of them.
const REGISTERS: u32 = 65_536;
/// Of one block without asking for more.
const STATIC_SHARED_BYTES: u32 = 48 * 1024;

/// Instructions that must be there: (file, architectures, mnemonics).
const INSTRUCTIONS: [(&str, &[&str], &[&str]); 5] = [
    ("attention.cu", &["80", "89", "90a"], &["HMMA", "LDSM", "LDGSTS", "MUFU"]),
    ("attention_backward.cu", &["80", "89", "90a"], &["HMMA", "LDSM", "LDGSTS", "MUFU"]),
    ("linear.cu", &["80", "89", "90a"], &["HMMA", "LDSM", "LDGSTS"]),
    ("linear_f32.cu", &["80", "89", "90a"], &["FFMA"]),
    ("linear_sm90.cu", &["90a"], &["HGMMA", "UTMALDG", "USETMAXREG"]),
];

/// What the assembler reports of one entry point.
#[derive(Debug, Default)]
struct Report {
    registers: u32,
    shared_bytes: u32,
    /// Stack frame, spill stores and spill loads.
    local_bytes: [u32; 3],
}

/// The report of `--ptxas-options=-v`, by entry point.
fn reports(log: &str) -> BTreeMap<String, Report> {
    let mut found = BTreeMap::<String, Report>::new();
    let mut name = String::new();
    let before = |line: &str, unit: &str| -> u32 {
        let number = line.split(unit).next().and_then(|head| head.split_whitespace().next_back());
        number.and_then(|number| number.parse().ok()).unwrap_or(0)
    };
    for line in log.lines() {
        if let Some(entry) = line.split("Compiling entry function '").nth(1) {
            name = entry.split('\'').next().unwrap().to_owned();
        } else if line.contains("bytes stack frame") {
            let units = [" bytes stack frame", " bytes spill stores", " bytes spill loads"];
            found.entry(name.clone()).or_default().local_bytes = units.map(|unit| before(line, unit));
        } else if line.contains(" registers") {
            let report = found.entry(name.clone()).or_default();
            report.registers = before(line, " registers");
            report.shared_bytes = before(line, " bytes smem");
        }
    }
    found
}

/// Threads of the largest block that each entry point may be launched with, from its PTX.
fn max_threads(ptx: &str) -> BTreeMap<String, u32> {
    let entries = ptx.split(".entry ").skip(1).map(|rest| {
        let name = rest.split('(').next().unwrap().trim().to_owned();
        let head = rest.split('{').next().unwrap();
        let bounds = head.split(".maxntid ").nth(1).map(|list| list.lines().next().unwrap());
        let product = bounds.map(|list| list.split(',').map(|n| n.trim().parse::<u32>().unwrap()).product());
        (name, product.unwrap_or(1024))
    });
    entries.collect()
}

/// One kernel file for one architecture.
struct Compiled {
    file: &'static str,
    arch: &'static str,
    log: String,
    ptx: String,
    cubin: Vec<u8>,
}

/// All files for all architectures, compiled once for both tests. `None`: no compiler; the reason was printed.
fn compiled() -> Option<&'static [Compiled]> {
    static COMPILED: OnceLock<Vec<Compiled>> = OnceLock::new();
    let nvrtc = match Nvrtc::load() {
        Ok(nvrtc) => nvrtc,
        Err(error) => {
            skip_or_panic(&error.to_string());
            return None;
        }
    };
    let all = COMPILED.get_or_init(|| {
        let sources = Sources::embedded();
        let pairs: Vec<_> = sources.kernel_files().flat_map(|file| ARCHS.map(|arch| (file, arch))).collect();
        let compile = |&(file, arch): &(&'static str, &'static str)| {
            let (text, headers) = (sources.text(file).unwrap(), sources.headers());
            let (real, virtual_) = (format!("sm_{arch}"), format!("compute_{arch}"));
            let options = ["--ptxas-options=-v"];
            let cubin = nvrtc.compile(file, text, &headers, &real, Code::Cubin, &options).unwrap();
            let ptx = nvrtc.compile(file, text, &headers, &virtual_, Code::Ptx, &[]).unwrap();
            let ptx = String::from_utf8(ptx.image).unwrap();
            Compiled { file, arch, log: cubin.log, ptx, cubin: cubin.image }
        };
        pairs.par_iter().map(compile).collect()
    });
    Some(all)
}

#[test]
fn kernels_compile_without_spills_and_fit_their_blocks() {
    let Some(all) = compiled() else { return };
    let sources = Sources::embedded();
    for file in sources.kernel_files() {
        let text = sources.text(file).unwrap();
        let declared = Sources::entry_points(text);
        assert!(!declared.is_empty(), "{file} has no entry points");
        assert_eq!(
            declared.len(),
            text.matches("__global__").count(),
            "{file} declares kernels that are not read"
        );
    }
    let mut wrong = Vec::new();
    for Compiled { file, arch, log, ptx, .. } in all {
        let threads = max_threads(ptx);
        if log.contains("warning") || log.contains("Potential Performance Loss") {
            wrong.push(format!("{file} sm_{arch}: {log}"));
        }
        let reports = reports(log);
        assert_eq!(
            reports.keys().collect::<Vec<_>>(),
            threads.keys().collect::<Vec<_>>(),
            "{file} sm_{arch}"
        );
        for (name, report) in &reports {
            let threads = threads[name];
            println!("{file:<16} sm_{arch:<3} {name:<40} {threads:>4} threads, {report:?}");
            // Registers are given out in units of 8 a thread.
            let registers = report.registers.next_multiple_of(8) * threads;
            let fits = registers <= REGISTERS && report.shared_bytes <= STATIC_SHARED_BYTES;
            if report.local_bytes != [0; 3] || report.registers == 0 || !fits {
                wrong.push(format!("{file} sm_{arch} {name}: {threads} threads, {report:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// NVIDIA's disassembler, from PATH (`pip install nvidia-cuda-nvdisasm`; tests/run sees to both).
fn disassembler() -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|folder| folder.join("nvdisasm")).find(|file| file.is_file())
}

#[test]
fn tensor_cores_and_asynchronous_copies_are_used() {
    let Some(all) = compiled() else { return };
    let Some(nvdisasm) = disassembler() else {
        return skip_or_panic("nvdisasm (pip install nvidia-cuda-nvdisasm)");
    };
    let folder = tempfile::tempdir().unwrap();
    for Compiled { file, arch, cubin, .. } in all {
        let path = folder.path().join("kernel.cubin");
        fs::write(&path, cubin).unwrap();
        let listing = Command::new(&nvdisasm).arg("-c").arg(&path).output().unwrap();
        assert!(listing.status.success(), "{}", String::from_utf8_lossy(&listing.stderr));
        let listing = String::from_utf8(listing.stdout).unwrap();
        let mut counts = BTreeMap::<&str, usize>::new();
        for line in listing.lines() {
            let mut words: Vec<&str> = line.split(|c: char| !c.is_alphanumeric()).collect();
            words.sort_unstable();
            words.dedup();
            words.into_iter().for_each(|word| *counts.entry(word).or_default() += 1);
        }
        let count = |mnemonic: &str| counts.get(mnemonic).copied().unwrap_or(0);
        for local in ["LDL", "STL"] {
            assert_eq!(count(local), 0, "{file} sm_{arch} uses local memory");
        }
        let wanted = INSTRUCTIONS.iter().filter(|(name, archs, _)| name == file && archs.contains(arch));
        for (_, _, mnemonics) in wanted {
            let counts = mnemonics.iter().map(|mnemonic| (*mnemonic, count(mnemonic))).collect::<Vec<_>>();
            println!("{file} sm_{arch}: {counts:?}");
            assert!(counts.iter().all(|(_, count)| *count > 0), "{file} sm_{arch}: {counts:?}");
        }
    }
}
