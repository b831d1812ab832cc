//! Where NVRTC may lie: pure functions of the environment and of what folders hold.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

/// NVRTC's names for the loader, in order.
pub(super) const LOADER_NAMES: [&str; 3] = if cfg!(windows) {
    ["nvrtc64_130_0.dll", "nvrtc64_120_0.dll", "nvrtc.dll"]
} else {
    ["libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"]
};

/// Where to look besides the loader's path, in order: (what the user knows it by, folders). `variable`: the
/// environment, in which what is empty counts as not set. `home`: the user's folder.
pub(super) fn places(
    environment: impl Fn(&str) -> Option<OsString>,
    home: Option<&Path>,
) -> Vec<(String, Vec<PathBuf>)> {
    let variable = |name: &str| environment(name).filter(|value| !value.is_empty());
    let mut places = Vec::new();
    for name in ["CUDA_HOME", "CUDA_PATH"] {
        match variable(name) {
            Some(root) => places.push((format!("{name}={}", root.display()), toolkit(Path::new(&root)))),
            None => places.push((format!("{name} (not set)"), Vec::new())),
        }
    }
    for name in ["VIRTUAL_ENV", "CONDA_PREFIX"] {
        if let Some(prefix) = variable(name) {
            places.push((format!("{name}={}", prefix.display()), python_prefix(Path::new(&prefix))));
        }
    }
    // Of an environment that was not activated but whose python comes first, and of the system's.
    let path = variable("PATH").unwrap_or_default();
    let prefixes = env::split_paths(&path).filter(|bin| bin.join("python3").exists()).filter_map(|bin| {
        let python = bin.join("python3");
        let resolved = fs::canonicalize(&python).unwrap_or(python);
        Some([bin.parent()?.to_owned(), resolved.parent()?.parent()?.to_owned()])
    });
    let mut folders: Vec<PathBuf> = Vec::new();
    for folder in prefixes.flatten().flat_map(|prefix| python_prefix(&prefix)) {
        if !folders.contains(&folder) {
            folders.push(folder);
        }
    }
    places.push(("the packages of each python3 in PATH".to_owned(), folders));
    if let Some(home) = home {
        places.push(("~/.local".to_owned(), python_prefix(&home.join(".local"))));
    }
    places.push(("/usr/local/cuda".to_owned(), toolkit(Path::new("/usr/local/cuda"))));
    places
}

/// Library folders of a CUDA toolkit.
fn toolkit(root: &Path) -> Vec<PathBuf> {
    ["lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "bin"]
        .map(|lib| root.join(lib))
        .to_vec()
}

/// Library folders of pip's and conda's CUDA packages below a Python's prefix.
fn python_prefix(prefix: &Path) -> Vec<PathBuf> {
    let mut folders = vec![prefix.join("lib")];
    let pythons =
        fs::read_dir(prefix.join("lib")).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    let mut pythons: Vec<PathBuf> = pythons
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("python")))
        .collect();
    pythons.sort();
    for python in pythons {
        for site in ["site-packages", "dist-packages"] {
            for package in ["cu13", "cu12", "cuda_nvrtc"] {
                folders.push(python.join(site).join("nvidia").join(package).join("lib"));
            }
        }
    }
    folders
}

/// Which library of NVRTC's a file is, by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Compiler,
    /// What the compiler itself loads.
    Builtins,
}

impl Part {
    fn of(path: &Path) -> Option<Self> {
        let name = path.file_name()?.to_str()?;
        let begins = |words: &[&str]| words.iter().any(|word| name.starts_with(word));
        match () {
            // Libraries of another build that CUDA 12 and 13 ship beside the usual ones.
            () if name.contains(".alt.") || !(name.contains(".so") || name.ends_with(".dll")) => None,
            () if begins(&["libnvrtc.so", "nvrtc64_", "nvrtc.dll"]) => Some(Self::Compiler),
            () if begins(&["libnvrtc-builtins.so", "nvrtc-builtins64_"]) => Some(Self::Builtins),
            () => None,
        }
    }
}

/// The files of NVRTC in a folder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Files {
    /// Versions of the compiler, the newest first; links to one file count once.
    pub compilers: Vec<PathBuf>,
    /// The libraries that the compilers load in their turn.
    pub builtins: Vec<PathBuf>,
}

impl Files {
    /// Of `place`: a folder, or the compiler's file itself, beside which its helpers lie.
    pub fn of(place: &Path) -> Self {
        let folder = if place.is_file() { place.parent().unwrap_or(Path::new(".")) } else { place };
        let entries = fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
        let mut all: Vec<PathBuf> = entries.collect();
        all.sort_by_key(|path| std::cmp::Reverse(numbers(path)));
        let mut found = Self::default();
        let mut seen = Vec::new();
        for path in all {
            let Some(part) = Part::of(&path) else { continue };
            let resolved = fs::canonicalize(&path).unwrap_or_else(|_| path.clone());
            if seen.contains(&resolved) {
                continue;
            }
            seen.push(resolved);
            match part {
                Part::Compiler => found.compilers.push(path),
                Part::Builtins => found.builtins.push(path),
            }
        }
        if place.is_file() {
            found.compilers = vec![place.to_owned()];
        }
        found
    }
}

/// The numbers in a file's name: libnvrtc.so.12.8 sorts above libnvrtc.so.9.
fn numbers(path: &Path) -> (Vec<u64>, PathBuf) {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let parts = name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok());
    (parts.collect(), path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(folder: &Path, file: &str) -> PathBuf {
        fs::create_dir_all(folder).unwrap();
        let path = folder.join(file);
        fs::write(&path, "not a library").unwrap();
        path
    }

    /// Every compiler in all places of an environment, in the order in which they are tried.
    fn compilers(variables: &[(&str, &Path)], home: Option<&Path>) -> Vec<PathBuf> {
        let variable = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| value.as_os_str().to_owned())
        };
        let folders = places(variable, home).into_iter().flat_map(|(_, folders)| folders);
        let all = folders.flat_map(|folder| Files::of(&folder).compilers);
        all.filter(|path| !path.starts_with("/usr/local/cuda")).collect()
    }

    #[test]
    fn toolkits_come_before_environments_before_python_before_home() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        let pip = "lib/python3.12/site-packages/nvidia";
        let home = touch(&at("home/.local").join(pip).join("cu12/lib"), "libnvrtc.so.12");
        fs::create_dir_all(at("system/bin")).unwrap();
        fs::write(at("system/bin/python3"), "").unwrap();
        let system = touch(&at("system/lib/python3/dist-packages/nvidia/cuda_nvrtc/lib"), "libnvrtc.so.12");
        let conda = touch(&at("conda/lib"), "libnvrtc.so.12.4.127");
        let older = touch(&at("venv").join(pip).join("cuda_nvrtc/lib"), "libnvrtc.so.12");
        let newer = touch(&at("venv").join(pip).join("cu13/lib"), "libnvrtc.so.13");
        let path = touch(&at("cuda_path/targets/x86_64-linux/lib"), "libnvrtc.so.12");
        let cuda = touch(&at("cuda/lib64"), "libnvrtc.so.12");
        let variables = [
            ("PATH", at("system/bin")),
            ("CONDA_PREFIX", at("conda")),
            ("VIRTUAL_ENV", at("venv")),
            ("CUDA_PATH", at("cuda_path")),
            ("CUDA_HOME", at("cuda")),
        ];
        let variables: Vec<(&str, &Path)> =
            variables.iter().map(|(name, path)| (*name, path.as_path())).collect();
        let wanted = [cuda, path, newer, older, conda, system, home];
        assert_eq!(compilers(&variables, Some(&at("home"))), wanted);
        assert_eq!(compilers(&variables[..2], None), [wanted[4].clone(), wanted[5].clone()]);
        assert!(compilers(&[], None).is_empty());
    }

    #[test]
    fn places_say_what_the_user_can_change() {
        let names: Vec<String> = places(
            |name| (name == "CUDA_HOME").then(|| OsString::from("/opt/cuda")),
            Some(Path::new("/home/a")),
        )
        .into_iter()
        .map(|(name, _)| name)
        .collect();
        let wanted = ["CUDA_HOME=/opt/cuda", "CUDA_PATH (not set)", "the packages of each python3 in PATH"];
        assert_eq!(names[..3], wanted);
        assert_eq!(names[3..], ["~/.local", "/usr/local/cuda"]);
    }

    #[test]
    fn of_a_folder_the_newest_compiler_and_all_builtins() {
        let root = tempfile::tempdir().unwrap();
        for file in ["libnvrtc.alt.so.12", "libnvrtc-builtins.alt.so.12.8", "libnvrtc_static.a", "readme"] {
            touch(root.path(), file);
        }
        let nine = touch(root.path(), "libnvrtc.so.9.2");
        let twelve = touch(root.path(), "libnvrtc.so.12.8.93");
        let builtins = ["libnvrtc-builtins.so.12.8", "libnvrtc-builtins.so.9.2"];
        let builtins = builtins.map(|file| touch(root.path(), file));
        let found = Files::of(root.path());
        assert_eq!(found.compilers, [twelve, nine.clone()]);
        assert_eq!(found.builtins, builtins);
        // A file is that file, with the same helpers.
        assert_eq!(Files::of(&nine), Files { compilers: vec![nine], builtins: builtins.to_vec() });
        assert_eq!(Files::of(&root.path().join("absent")), Files::default());
    }

    #[cfg(unix)]
    #[test]
    fn links_to_one_file_count_once() {
        let root = tempfile::tempdir().unwrap();
        touch(root.path(), "libnvrtc.so.12.8.93");
        for link in ["libnvrtc.so", "libnvrtc.so.12"] {
            std::os::unix::fs::symlink("libnvrtc.so.12.8.93", root.path().join(link)).unwrap();
        }
        assert_eq!(Files::of(root.path()).compilers.len(), 1);
    }
}
