//! Items → C++. This file: modules, functions, scopes; the instructions are in the files beside it, one per
//! family.

mod arithmetic;
mod asynchronous;
mod bits;
mod compare;
mod control;
mod convert;
mod float;
mod memory;
mod operand;
mod scope;
mod tensor;
mod warp;

use std::collections::{HashMap, HashSet};
use std::fmt::Write;

use self::operand::Op;
use self::scope::{Scope, Symbol, mangled};
use super::Error;
use super::syntax::{Function, Instruction, Item, Module, Operand, Space, Variable};
use super::types::Type;

/// Of one instruction: the message says what is wrong, who calls knows where.
type Result<T = ()> = std::result::Result<T, String>;

/// The C++ of a module.
pub(super) fn module(module: &Module<'_>) -> std::result::Result<String, Error> {
    let mut text = String::from("#include \"cuemu.h\"\n#include \"ptx_helpers.h\"\n#include <time.h>\n");
    text += include_str!("../prelude.h");
    module_variables(&mut text, &module.variables);
    for function in &module.functions {
        line(&mut text, format_args!("{};", signature(function)));
    }
    let mut shared = HashMap::new();
    for function in &module.functions {
        let body = Body::new(module, function);
        let used = body.emit(&mut text)?;
        shared.insert(function.name, used);
    }
    table(&mut text, module, &shared);
    Ok(text)
}

fn line(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{arguments}");
}

/// Definitions of the variables of module scope, and of the checked access that knows them.
fn module_variables(text: &mut String, variables: &[Variable<'_>]) {
    let mut ranges = Vec::new();
    for variable in variables {
        let name = mangled(variable.name);
        if variable.space == Space::Shared {
            line(text, format_args!("static const char key_{name} = 0;"));
            continue;
        }
        let ty = variable.ty.unsigned().cpp();
        let count = variable.count.unwrap_or(1).max(1);
        let values: Vec<_> = variable.initial.iter().map(|v| format!("({ty}){v}ull")).collect();
        line(
            text,
            format_args!(
                "alignas({}) static {ty} v_{name}[{count}] = {{{}}};",
                variable.align,
                values.join(", ")
            ),
        );
        ranges.push(format!("{{(uint64_t)v_{name}, {}}}", variable.bytes().max(1)));
    }
    let known = if ranges.is_empty() {
        String::new()
    } else {
        line(text, format_args!("static const Variable_ variables_[] = {{{}}};", ranges.join(", ")));
        String::from("if (__builtin_expect(inside_(variables_, address, bytes), 0)) return (void*)address; ")
    };
    for name in ["global", "generic"] {
        line(
            text,
            format_args!(
                "static inline void* {name}_(cuemu::Span& span, uint64_t address, uint32_t bytes, bool write, \
                 cuemu::Site site) {{ {known}return cuemu::{name}(span, address, bytes, write, site); }}"
            ),
        );
    }
}

/// The C++ type that holds a parameter or a local array.
fn storage(variable: &Variable<'_>) -> String {
    match variable.count {
        Some(_) => format!("ptx::Bytes<{}, {}>", variable.bytes().max(1), variable.align),
        None => variable.ty.cpp().to_owned(),
    }
}

fn cpp_name(function: &Function<'_>) -> String {
    format!("{}_{}", if function.entry { "kernel" } else { "function" }, mangled(function.name))
}

fn signature(function: &Function<'_>) -> String {
    let parameters: Vec<_> =
        function.parameters.iter().map(|p| format!("{} v_{}", storage(p), mangled(p.name))).collect();
    let result = function.result.as_ref().map_or_else(|| "void".to_owned(), storage);
    format!("static {result} {}({})", cpp_name(function), parameters.join(", "))
}

/// What a function needs of others: its shared variables and whom it calls.
#[derive(Default)]
struct Uses<'a> {
    shared: Vec<SharedUse>,
    calls: Vec<&'a str>,
}

/// A shared variable that a function uses.
struct SharedUse {
    /// Names it in the whole module.
    key: String,
    bytes: usize,
    align: usize,
}

/// Bytes of the shared variables of `name` and of all that it calls, laid out one after the other.
fn shared_bytes(uses: &HashMap<&str, Uses<'_>>, name: &str) -> usize {
    let (mut functions, mut next) = (vec![name], 0);
    let mut counted = HashSet::new();
    let mut end = 0_usize;
    while let Some(used) = functions.get(next).and_then(|name| uses.get(name)) {
        next += 1;
        for variable in &used.shared {
            if counted.insert(&variable.key) {
                end = end.next_multiple_of(variable.align) + variable.bytes;
            }
        }
        for callee in &used.calls {
            if !functions.contains(callee) {
                functions.push(callee);
            }
        }
    }
    end
}

fn table(text: &mut String, module: &Module<'_>, uses: &HashMap<&str, Uses<'_>>) {
    line(text, format_args!("#line 1 \"cuemu_kernels\""));
    let mut rows = Vec::new();
    for kernel in module.functions.iter().filter(|f| f.entry) {
        let name = mangled(kernel.name);
        let arguments: Vec<_> = kernel
            .parameters
            .iter()
            .enumerate()
            .map(|(i, p)| format!("parameter_<{}>(p[{i}], {})", storage(p), p.bytes()))
            .collect();
        // One more than there are: no array is empty.
        let sizes: String = kernel.parameters.iter().map(|p| format!("{}, ", p.bytes())).collect();
        line(
            text,
            format_args!(
                "static void entry_{name}(void** p) {{ (void)p; kernel_{name}({}); }}",
                arguments.join(", ")
            ),
        );
        line(text, format_args!("static const uint32_t sizes_{name}[] = {{{sizes}0}};"));
        rows.push(format!(
            "  {{\"{}\", entry_{name}, {}, sizes_{name}, {}, {}}},\n",
            kernel.name,
            kernel.parameters.len(),
            kernel.max_threads,
            shared_bytes(uses, kernel.name),
        ));
    }
    let count = rows.len();
    if rows.is_empty() {
        rows.push("  {nullptr, nullptr, 0, nullptr, 0, 0},\n".to_owned());
    }
    line(text, format_args!("extern \"C\" const CuemuKernel cuemu_kernels[] = {{\n{}}};", rows.concat()));
    line(text, format_args!("extern \"C\" const uint32_t cuemu_kernel_count = {count};"));
}

/// A function while it is translated.
struct Body<'a, 'm> {
    module: &'m Module<'a>,
    function: &'m Function<'a>,
    /// Of the scopes that are open, the outermost first.
    scopes: Vec<Scope<'a>>,
    /// Labels of every scope, by its number.
    labels: Vec<HashSet<&'a str>>,
    /// `.branchtargets` of the function.
    targets: HashMap<&'a str, &'m [&'a str]>,
    /// Declarations: they come before all statements.
    declarations: String,
    /// The statements so far.
    statements: String,
    /// The C++ of the instruction that is being translated.
    code: String,
    /// Position for `#line`.
    position: Option<(u32, u32)>,
    spans: usize,
    uses: Uses<'a>,
}

impl<'a, 'm> Body<'a, 'm> {
    fn new(module: &'m Module<'a>, function: &'m Function<'a>) -> Self {
        let mut labels = vec![HashSet::new()];
        let mut targets = HashMap::new();
        let mut open = vec![0];
        for item in &function.items {
            match item {
                Item::Open => {
                    open.push(labels.len());
                    labels.push(HashSet::new());
                }
                Item::Close => {
                    open.pop();
                }
                Item::Label(name) => {
                    labels[open.last().copied().unwrap_or(0)].insert(*name);
                }
                Item::Targets(name, list) => {
                    targets.insert(*name, list.as_slice());
                }
                _ => {}
            }
        }
        Self {
            module,
            function,
            scopes: vec![Scope::new(0)],
            labels,
            targets,
            declarations: String::new(),
            statements: String::new(),
            code: String::new(),
            position: None,
            spans: 0,
            uses: Uses::default(),
        }
    }

    /// Appends the whole function to `text`.
    fn emit(mut self, text: &mut String) -> std::result::Result<Uses<'a>, Error> {
        for parameter in &self.function.parameters {
            self.declare(parameter.name, Symbol::Memory { cpp: format!("v_{}", mangled(parameter.name)) });
        }
        if let Some(result) = &self.function.result {
            self.local_variable(result);
        }
        let mut scopes = 0;
        for item in &self.function.items {
            match item {
                Item::Open => {
                    scopes += 1;
                    self.scopes.push(Scope::new(scopes));
                }
                Item::Close => {
                    self.scopes.pop();
                }
                Item::Label(name) => {
                    let label = self.label(name).unwrap_or_else(|_| mangled(name));
                    line(&mut self.statements, format_args!("{label}: ;"));
                }
                Item::Location(file, at) => {
                    if *at != 0 {
                        self.position = Some((*file, *at));
                    }
                }
                Item::Registers(ty, names) => self.registers(*ty, names),
                Item::Variable(variable) => match variable.space {
                    Space::Shared => {
                        let cpp = format!("{}{}", mangled(variable.name), self.suffix());
                        line(&mut self.declarations, format_args!("  static const char key_{cpp} = 0;"));
                        let key = format!("{}.{cpp}", self.function.name);
                        self.declare(variable.name, Symbol::Shared { cpp, key, variable: variable.clone() });
                    }
                    _ => self.local_variable(variable),
                },
                Item::Targets(..) => {}
                Item::Instruction(instruction) => self.instruction(instruction).map_err(|message| {
                    let message = format!("{message}: `{}`", shortened(instruction.text));
                    Error::new(instruction.line, Some(self.function.name), message)
                })?,
            }
        }
        line(text, format_args!("{} {{", signature(self.function)));
        line(text, format_args!("  cuemu::Thread& t_ = *cuemu::current; (void)t_;"));
        line(text, format_args!("  bool carry_ = false; (void)carry_;"));
        if self.spans > 0 {
            line(text, format_args!("  CUEMU_SPANS({});", self.spans));
        }
        text.push_str(&self.declarations);
        text.push_str(&self.statements);
        if let Some(result) = &self.function.result {
            line(text, format_args!("  return v_{};", mangled(result.name)));
        }
        line(text, format_args!("}}"));
        Ok(self.uses)
    }

    fn registers(&mut self, ty: Type, names: &'m [String]) {
        let mut declared = Vec::with_capacity(names.len());
        for name in names {
            let cpp = format!("r_{}{}", mangled(name), self.suffix());
            declared.push(cpp.clone());
            self.declare(name, Symbol::Register { cpp, ty });
        }
        line(&mut self.declarations, format_args!("  {} {};", ty.cpp(), declared.join(", ")));
    }

    /// A `.local` variable or a `.param` of a call.
    fn local_variable(&mut self, variable: &'m Variable<'a>) {
        let cpp = format!("v_{}{}", mangled(variable.name), self.suffix());
        line(&mut self.declarations, format_args!("  {} {cpp};", storage(variable)));
        self.declare(variable.name, Symbol::Memory { cpp });
    }

    fn suffix(&self) -> String {
        match self.scopes.last() {
            Some(scope) if scope.number > 0 => format!("_s{}", scope.number),
            _ => String::new(),
        }
    }

    fn instruction(&mut self, instruction: &Instruction<'a>) -> Result {
        self.code.clear();
        let mut op = Op::new(instruction);
        self.dispatch(&mut op)?;
        op.finish()?;
        let code = std::mem::take(&mut self.code);
        if let Some((file, at)) = self.position
            && let Some(path) = self.module.files.get(&file)
        {
            line(&mut self.statements, format_args!("#line {at} {path:?}"));
        }
        match instruction.guard {
            Some((name, negated)) => {
                let predicate = self.read(&Operand::Name(name), Type::Pred)?;
                let not = if negated { "!" } else { "" };
                line(&mut self.statements, format_args!("  if ({not}{predicate}) {{ {code} }}"));
            }
            None => line(&mut self.statements, format_args!("  {code}")),
        }
        self.code = code;
        Ok(())
    }

    fn dispatch(&mut self, op: &mut Op<'a, '_>) -> Result {
        match op.name {
            "ld" | "ldu" => self.load(op),
            "st" => self.store(op),
            "atom" | "red" => self.atomic(op),
            "mov" => self.mov(op),
            "cvta" => self.cvta(op),
            "prefetch" | "prefetchu" | "applypriority" | "createpolicy" => self.hint(op),
            "add" | "sub" | "mul" | "fma" | "mad" | "div" | "rem" | "min" | "max" | "abs" | "neg" => {
                self.arithmetic(op)
            }
            "addc" | "subc" | "madc" => self.with_carry(op),
            "mul24" | "mad24" | "sad" | "dp4a" => self.small_product(op),
            "rcp" | "sqrt" | "rsqrt" | "ex2" | "lg2" | "sin" | "cos" | "tanh" => self.function_of_one(op),
            "copysign" | "testp" => self.float_bits(op),
            "and" | "or" | "xor" | "not" | "cnot" | "lop3" => self.logic(op),
            "shl" | "shr" | "shf" => self.shift(op),
            "popc" | "clz" | "brev" | "bfind" | "bfe" | "bfi" | "bmsk" | "prmt" | "fns" => self.bit_field(op),
            "setp" | "set" | "selp" | "slct" => self.compare(op),
            "cvt" => self.convert(op),
            "bra" | "brx" | "ret" | "exit" | "trap" | "call" => self.jump(op),
            "bar" | "barrier" => self.barrier(op),
            "membar" | "fence" => self.fence(op),
            "nanosleep" | "setmaxnreg" | "griddepcontrol" | "pmevent" => self.pause(op),
            "shfl" | "vote" | "match" | "redux" | "activemask" | "elect" => self.warp(op),
            "ldmatrix" | "stmatrix" => self.matrix(op),
            "mma" => self.mma(op),
            "wgmma" => self.wgmma(op),
            "cp" => self.copy(op),
            "mbarrier" => self.mbarrier(op),
            _ => Err("instruction not known to the emulator".to_owned()),
        }
    }

    /// Appends C++ to the statement of this instruction.
    fn push(&mut self, code: impl AsRef<str>) {
        self.code.push_str(code.as_ref());
    }
}

/// The text of an instruction on one line, of bounded length.
fn shortened(text: &str) -> String {
    let words: Vec<_> = text.split_whitespace().collect();
    let joined = words.join(" ");
    match joined.char_indices().nth(160) {
        Some((end, _)) => format!("{}…", &joined[..end]),
        None => joined,
    }
}
