//! What PTX consists of: modules, functions, items, instructions, operands.

use std::collections::HashMap;

use super::types::Type;

/// A whole PTX module.
#[derive(Debug, Default)]
pub struct Module<'a> {
    /// `.file` numbers and paths.
    pub files: HashMap<u32, &'a str>,
    /// Variables of module scope.
    pub variables: Vec<Variable<'a>>,
    /// Kernels and device functions, in source order; declarations without a body are left out.
    pub functions: Vec<Function<'a>>,
}

/// Where a variable lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "named as in PTX")]
pub enum Space {
    Global,
    Const,
    Shared,
    Local,
    Param,
    Generic,
}

/// A variable or a parameter.
#[derive(Clone, Debug)]
pub struct Variable<'a> {
    /// Its state space.
    pub space: Space,
    /// Alignment in bytes.
    pub align: u32,
    /// Type of an element.
    pub ty: Type,
    /// Its name.
    pub name: &'a str,
    /// `None`: not an array. `Some(0)`: an array whose size the launch decides.
    pub count: Option<usize>,
    /// Bit patterns of the first elements; the others are zero.
    pub initial: Vec<u64>,
}

impl Variable<'_> {
    /// Its size in bytes.
    pub fn bytes(&self) -> usize {
        self.ty.bytes() as usize * self.count.unwrap_or(1)
    }
}

/// A kernel (`.entry`) or a device function (`.func`).
#[derive(Debug)]
pub struct Function<'a> {
    /// Whether it is a kernel.
    pub entry: bool,
    /// Its name.
    pub name: &'a str,
    /// What it takes, all by value.
    pub parameters: Vec<Variable<'a>>,
    /// What it returns.
    pub result: Option<Variable<'a>>,
    /// Product of `.maxntid` or `.reqntid`; 0: not given.
    pub max_threads: u32,
    /// Its body.
    pub items: Vec<Item<'a>>,
}

/// A piece of a body.
#[derive(Debug)]
pub enum Item<'a> {
    /// `{`
    Open,
    /// `}`
    Close,
    /// `name:`
    Label(&'a str),
    /// `.loc`: the statements that follow stand on this line of this file.
    Location(u32, u32),
    /// `.reg`
    Registers(Type, Vec<String>),
    /// `.shared`, `.local` or `.param`
    Variable(Variable<'a>),
    /// `name: .branchtargets label, label;`
    Targets(&'a str, Vec<&'a str>),
    /// Any other statement.
    Instruction(Instruction<'a>),
}

/// One instruction.
#[derive(Debug)]
pub struct Instruction<'a> {
    /// Its line in the PTX.
    pub line: usize,
    /// As it stands there.
    pub text: &'a str,
    /// `@%p`: the predicate, and whether it is negated.
    pub guard: Option<(&'a str, bool)>,
    /// The first part of the opcode.
    pub name: &'a str,
    /// The other parts.
    pub modifiers: Vec<&'a str>,
    /// What stands between the commas.
    pub operands: Vec<Operand<'a>>,
}

/// An operand.
#[derive(Clone, Debug, PartialEq)]
pub enum Operand<'a> {
    /// A register, a special register, a variable, a label or a function.
    Name(&'a str),
    /// `!%p`
    Not(Box<Operand<'a>>),
    /// An integer, sign included.
    Integer(i128),
    /// `0f…`
    Single(u32),
    /// `0d…`, or a decimal number.
    Double(u64),
    /// `variable+4`, outside brackets.
    Sum(&'a str, i64),
    /// `[base+offset]`, or `[base, {coordinates}]`.
    Address { base: Box<Operand<'a>>, offset: i64, coordinates: Vec<Operand<'a>> },
    /// `{a, b}`
    Vector(Vec<Operand<'a>>),
    /// `(a, b)`, of a call.
    List(Vec<Operand<'a>>),
    /// `a|b`: two results.
    Pair(Box<Operand<'a>>, Box<Operand<'a>>),
}
