//! PTX → C++.
//!
//! PTX is a linear register language, so the translation is one C++ statement per instruction: a register
//! becomes a local variable, a label a `goto` target, a `.loc` a `#line`, so that messages and sanitizer
//! reports name the line of the `.cu` file. Labels and registers declared inside `{ }` get a suffix; all
//! registers are declared at the top of the function, so they outlive the scopes (asynchronous instructions
//! keep pointers to them).
//!
//! An instruction, a modifier or an operand that is not known is an error. What is known is meant exactly,
//! except:
//! - `.ftz` is ignored: subnormal numbers are kept.
//! - `.approx` and `.full` functions are those of the C library, as exact as these.
//! - The payload of a NaN may differ.
//! - Cache, eviction and prefetch hints, `setmaxnreg` and `griddepcontrol` do nothing.
//! - A cluster is one block.
//!
//! The generated file includes `cuemu.h` and `ptx_helpers.h`, reads memory through pointers of several types
//! (`-fno-strict-aliasing`), and expects products and sums that are not fused by the compiler
//! (`-ffp-contract=off`).

mod emit;
mod lex;
mod operands;
mod parse;
mod syntax;
mod types;

use std::fmt;

/// Why a module was not translated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    line: usize,
    kernel: Option<String>,
    message: String,
}

impl Error {
    fn new(line: usize, kernel: Option<&str>, message: String) -> Self {
        Self { line, kernel: kernel.map(str::to_owned), message }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PTX line {}", self.line)?;
        if let Some(kernel) = &self.kernel {
            write!(f, ", kernel {kernel}")?;
        }
        write!(f, ": {}", self.message)
    }
}

impl std::error::Error for Error {}

/// The C++ of a whole PTX module. It exports `cuemu_kernels` and `cuemu_kernel_count` (see `cuemu.h`) and
/// nothing else.
pub fn translate(ptx: &str) -> Result<String, Error> {
    emit::module(&parse::parse(ptx)?)
}

/// The C++ of one kernel of a module, with what it calls: as [`translate`] for a module without the others.
pub fn translate_kernel(ptx: &str, kernel: &str) -> Result<String, Error> {
    let mut module = parse::parse(ptx)?;
    module.functions.retain(|function| !function.entry || function.name == kernel);
    emit::module(&module)
}

/// What a module holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contents {
    /// Names of its kernels, in its order.
    pub kernels: Vec<String>,
    /// Whether kernels share variables, so that they cannot be translated apart from each other.
    pub shares_variables: bool,
}

/// What a module holds, once it is known that all of it can be translated.
pub fn contents(ptx: &str) -> Result<Contents, Error> {
    let module = parse::parse(ptx)?;
    emit::module(&module)?;
    let kernels = module.functions.iter().filter(|function| function.entry);
    Ok(Contents {
        kernels: kernels.map(|kernel| kernel.name.to_owned()).collect(),
        // NVRTC declares every constant of the source, of which hardly any is ever read.
        shares_variables: module
            .variables
            .iter()
            .any(|variable| variable.space == syntax::Space::Global && is_used(ptx, variable.name)),
    })
}

/// Whether a name occurs besides in its declaration.
fn is_used(ptx: &str, name: &str) -> bool {
    let is_part = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '$';
    let whole = |at: &usize| {
        let (before, after) = (&ptx[..*at], &ptx[at + name.len()..]);
        !before.ends_with(is_part) && !after.starts_with(is_part)
    };
    ptx.match_indices(name).map(|(at, _)| at).filter(whole).count() > 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_that_kernels_share() {
        let module = |body: &str| {
            format!(
                ".version 8.4\n.target sm_80\n.address_size 64\n.global .align 4 .u32 N = 8;\n\
                 .visible .entry a()\n{{\n.reg .b32 %r<2>;\n{body}\nret;\n}}\n.visible .entry b()\n{{\nret;\n}}\n"
            )
        };
        let unused = contents(&module("")).unwrap();
        assert_eq!(unused.kernels, ["a", "b"]);
        assert!(!unused.shares_variables);
        assert!(contents(&module("ld.global.u32 %r1, [N];")).unwrap().shares_variables);
        let only_b = translate_kernel(&module(""), "b").unwrap();
        assert!(only_b.contains("kernel_b") && !only_b.contains("kernel_a"));
    }
}
