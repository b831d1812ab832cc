//! Opcodes with their modifiers, and operands → C++ expressions.

use std::cell::Cell;

use super::super::syntax::{Instruction, Operand, Space};
use super::super::types::Type;
use super::scope::Symbol;
use super::{Body, Result};

/// An opcode and its operands. Each family takes the modifiers and operands that it knows; what is left is
/// an error.
pub(super) struct Op<'a, 'i> {
    /// The first part of the opcode.
    pub name: &'a str,
    modifiers: Vec<&'a str>,
    operands: &'i [Operand<'a>],
    used: Cell<usize>,
}

impl<'a, 'i> Op<'a, 'i> {
    pub(super) fn new(instruction: &'i Instruction<'a>) -> Self {
        Self {
            name: instruction.name,
            modifiers: instruction.modifiers.clone(),
            operands: &instruction.operands,
            used: Cell::new(0),
        }
    }

    /// Whether the modifier was there; it counts as understood.
    pub(super) fn take(&mut self, modifier: &str) -> bool {
        let found = self.modifiers.iter().position(|m| *m == modifier);
        if let Some(i) = found {
            self.modifiers.remove(i);
        }
        found.is_some()
    }

    /// The first of `known` that is there.
    pub(super) fn take_any(&mut self, known: &[&'static str]) -> Option<&'static str> {
        known.iter().copied().find(|m| self.take(m))
    }

    /// One of `known`, or an error.
    pub(super) fn take_one(&mut self, known: &[&'static str]) -> Result<&'static str> {
        self.take_any(known)
            .ok_or_else(|| format!("the emulator knows it only with one of .{}", known.join(" .")))
    }

    /// The first modifier.
    pub(super) fn take_first(&mut self) -> Result<&'a str> {
        if self.modifiers.is_empty() {
            return Err("a modifier is missing".to_owned());
        }
        Ok(self.modifiers.remove(0))
    }

    /// The first modifier that `parse` understands.
    pub(super) fn take_parsed<T>(&mut self, parse: impl Fn(&str) -> Option<T>) -> Option<T> {
        let (i, value) = self.modifiers.iter().enumerate().find_map(|(i, m)| parse(m).map(|v| (i, v)))?;
        self.modifiers.remove(i);
        Some(value)
    }

    /// The type: the last modifier.
    pub(super) fn take_type(&mut self) -> Result<Type> {
        let last = self.modifiers.pop().ok_or("the type is missing")?;
        Type::parse(last).ok_or_else(|| format!("type `.{last}` is not known to the emulator here"))
    }

    /// A modifier that only this emulator may ignore: caches and the order of ordinary accesses.
    pub(super) fn take_cache_hints(&mut self) -> bool {
        let policy = self.take("L2::cache_hint");
        let hint = |m: &str| {
            let rest = m.strip_prefix("L1::").or(m.strip_prefix("L2::"));
            rest.is_some_and(|r| r.starts_with("evict") || r.starts_with("no_allocate") || r.ends_with('B'))
                .then_some(())
        };
        while self.take_parsed(hint).is_some() {}
        self.take_any(&["ca", "cg", "cs", "lu", "cv", "wb", "wt"]);
        policy
    }

    /// The state space; `None` is generic. `shared::cta` is `shared`.
    pub(super) fn take_space(&mut self) -> Space {
        if self.take("global") {
            Space::Global
        } else if self.take("shared") || self.take("shared::cta") {
            Space::Shared
        } else if self.take("local") {
            Space::Local
        } else if self.take("param") || self.take("param::entry") || self.take("param::func") {
            Space::Param
        } else if self.take("const") {
            Space::Const
        } else {
            Space::Generic
        }
    }

    /// Operand `i`.
    pub(super) fn operand(&self, i: usize) -> Result<&'i Operand<'a>> {
        self.used.set(self.used.get().max(i + 1));
        self.operands.get(i).ok_or_else(|| format!("operand {} is missing", i + 1))
    }

    /// How many operands there are.
    pub(super) fn count(&self) -> usize {
        self.operands.len()
    }

    /// An operand that has to be a number in the text.
    pub(super) fn constant(&self, i: usize) -> Result<i64> {
        match self.operand(i)? {
            Operand::Integer(value) => Ok(*value as i64),
            _ => Err(format!("operand {} has to be a constant", i + 1)),
        }
    }

    /// An error if anything was not understood.
    pub(super) fn finish(&self) -> Result {
        if !self.modifiers.is_empty() {
            return Err(format!(
                "modifier `.{}` is not known to the emulator here",
                self.modifiers.join(".")
            ));
        }
        if self.used.get() < self.operands.len() {
            return Err(format!("operand {} is not known to the emulator here", self.used.get() + 1));
        }
        Ok(())
    }
}

/// The operands between braces.
pub(super) fn vector<'o, 'a>(operand: &'o Operand<'a>) -> Result<&'o [Operand<'a>]> {
    match operand {
        Operand::Vector(elements) => Ok(elements),
        _ => Err("expected operands in braces".to_owned()),
    }
}

/// `expression` of type `from` as type `to`, the bits kept where one of them is a float.
pub(super) fn converted(expression: String, from: Type, to: Type) -> Result<String> {
    if from.cpp() == to.cpp() {
        return Ok(expression);
    }
    if (from == Type::Pred) != (to == Type::Pred) {
        return Err("a predicate and a number are mixed".to_owned());
    }
    match (from.is_native_float(), to.is_native_float()) {
        (false, false) => Ok(format!("({}){expression}", to.cpp())),
        _ if from.bits() == to.bits() => Ok(format!("ptx::bit_cast<{}>({expression})", to.cpp())),
        (false, true) if from.bits() > to.bits() => {
            Ok(format!("ptx::bit_cast<{}>(({}){expression})", to.cpp(), to.unsigned().cpp()))
        }
        _ => Err(format!("{} bits are used as {} bits", from.bits(), to.bits())),
    }
}

impl<'a> Body<'a, '_> {
    /// The value of an operand, as C++ of type `ty`.
    pub(super) fn read(&mut self, operand: &Operand<'a>, ty: Type) -> Result<String> {
        let cpp = ty.cpp();
        match operand {
            Operand::Not(inner) if ty == Type::Pred => Ok(format!("(!{})", self.read(inner, ty)?)),
            Operand::Integer(value) if ty == Type::Pred => Ok((*value != 0).to_string()),
            Operand::Integer(value) if !ty.is_native_float() => match i64::try_from(*value) {
                Ok(i64::MIN) => Ok(format!("({cpp})0x8000000000000000ull")),
                Ok(value) if i32::try_from(value).is_ok() => Ok(format!("({cpp}){value}")),
                Ok(value) => Ok(format!("({cpp}){value}ll")),
                Err(_) => Ok(format!("({cpp}){value}ull")),
            },
            Operand::Single(bits) if ty == Type::F32 => Ok(format!("ptx::f32({bits:#010x}u)")),
            Operand::Single(bits) if ty.is_integer() => Ok(format!("({cpp}){bits:#010x}u")),
            Operand::Double(bits) if ty == Type::F64 => Ok(format!("ptx::f64({bits:#018x}ull)")),
            Operand::Double(bits) if ty == Type::F32 => {
                let single = (f64::from_bits(*bits) as f32).to_bits();
                Ok(format!("ptx::f32({single:#010x}u)"))
            }
            Operand::Double(bits) if ty.is_integer() && ty.bits() == 64 => {
                Ok(format!("({cpp}){bits:#018x}ull"))
            }
            Operand::Name(name) => {
                let (expression, from) = self.name(name)?;
                converted(expression, from, ty)
            }
            Operand::Sum(name, offset) => {
                let (expression, from) = self.name(name)?;
                converted(format!("({expression} + {offset})"), from, ty)
            }
            _ => Err(format!("operand not known to the emulator here: {operand:?}")),
        }
    }

    /// Operand `i` as C++ of type `ty`.
    pub(super) fn value(&mut self, op: &Op<'a, '_>, i: usize, ty: Type) -> Result<String> {
        self.read(op.operand(i)?, ty)
    }

    /// The value of a name and its type: a register's, a special register's or a variable's address.
    fn name(&mut self, name: &str) -> Result<(String, Type)> {
        match self.symbol(name) {
            Some(Symbol::Register { cpp, ty }) => Ok((cpp, ty)),
            Some(Symbol::Memory { cpp }) => Ok((format!("(uint64_t)&{cpp}"), Type::U64)),
            Some(Symbol::Shared { cpp, key, variable }) => {
                Ok((self.shared_address(&cpp, key, &variable), Type::U32))
            }
            None => special(name).ok_or_else(|| format!("`{name}` is not known to the emulator")),
        }
    }

    /// The register `operand` names, and its type.
    pub(super) fn register(&self, operand: &Operand<'a>) -> Result<(String, Type)> {
        if let Operand::Name(name) = operand
            && let Some(Symbol::Register { cpp, ty }) = self.symbol(name)
        {
            return Ok((cpp, ty));
        }
        Err(format!("expected a register, found {operand:?}"))
    }

    /// The type of the register `operand` names, if it is one.
    pub(super) fn is_predicate(&self, operand: &Operand<'a>) -> bool {
        match operand {
            Operand::Not(_) => true,
            _ => self.register(operand).is_ok_and(|(_, ty)| ty == Type::Pred),
        }
    }

    /// Appends `destination = expression;`, the expression being of type `ty`.
    pub(super) fn write(&mut self, destination: &Operand<'a>, ty: Type, expression: &str) -> Result {
        if *destination == Operand::Name("_") {
            self.push(format!("(void)({expression});"));
            return Ok(());
        }
        let (register, to) = self.register(destination)?;
        if to.cpp() == ty.cpp() {
            self.push(format!("{register} = {expression};"));
            return Ok(());
        }
        let typed = format!("({})({expression})", ty.cpp());
        // A narrow value in a wide register: a float's bits, or the extended integer.
        let typed = if ty.is_native_float() && !to.is_native_float() && to.bits() > ty.bits() {
            format!("ptx::bit_cast<{}>({typed})", ty.unsigned().cpp())
        } else {
            converted(typed, ty, to)?
        };
        self.push(format!("{register} = {typed};"));
        Ok(())
    }

    /// Appends `operand 0 = expression;`.
    pub(super) fn result(&mut self, op: &Op<'a, '_>, ty: Type, expression: &str) -> Result {
        self.write(op.operand(0)?, ty, expression)
    }

    /// `&a, &b`: the registers between braces, which have to be of the C++ type of `ty`.
    pub(super) fn pointers(&self, operands: &[Operand<'a>], ty: Type) -> Result<String> {
        let mut found = Vec::with_capacity(operands.len());
        for operand in operands {
            let (register, have) = self.register(operand)?;
            if have.cpp() == ty.cpp() {
                found.push(format!("&{register}"));
            } else if have.bits() == ty.bits() {
                found.push(format!("({}*)&{register}", ty.cpp()));
            } else {
                return Err(format!("a register of {} bits is used as {} bits", have.bits(), ty.bits()));
            }
        }
        Ok(found.join(", "))
    }

    /// `a, b`: the values between braces.
    pub(super) fn values(&mut self, operands: &[Operand<'a>], ty: Type) -> Result<String> {
        let found: Result<Vec<_>> = operands.iter().map(|o| self.read(o, ty)).collect();
        Ok(found?.join(", "))
    }

    /// An address in brackets as a C++ `uint64_t`, and whether it is a variable named there.
    pub(super) fn address(&mut self, operand: &Operand<'a>) -> Result<(String, bool)> {
        let Operand::Address { base, offset, coordinates } = operand else {
            return Err("expected an address in brackets".to_owned());
        };
        if !coordinates.is_empty() {
            return Err("coordinates are not known to the emulator here".to_owned());
        }
        let plus = if *offset == 0 { String::new() } else { format!(" + {offset}") };
        match &**base {
            Operand::Name(name) => {
                let named = matches!(self.symbol(name), Some(Symbol::Memory { .. }));
                let (expression, ty) = self.name(name)?;
                let unsigned = ty.unsigned();
                let base = converted(expression, ty, unsigned)?;
                Ok((
                    format!("(uint64_t)({}({base}{plus}))", if ty.bits() == 32 { "uint32_t" } else { "" }),
                    named,
                ))
            }
            Operand::Integer(value) => Ok((format!("(uint64_t){}ull", *value as i64 + offset), false)),
            other => Err(format!("address not known to the emulator: {other:?}")),
        }
    }

    /// An address in brackets that the runtime takes as one of the shared window.
    pub(super) fn shared_window(&mut self, op: &Op<'a, '_>, i: usize, space: Space) -> Result<String> {
        let (address, _) = self.address(op.operand(i)?)?;
        match space {
            Space::Shared => Ok(address),
            Space::Generic => Ok(format!("cuemu::to_shared({address}, CUEMU_HERE)")),
            _ => Err("only addresses of shared memory are known to the emulator here".to_owned()),
        }
    }
}

/// Special registers.
fn special(name: &str) -> Option<(String, Type)> {
    let u32 = |text: &str| Some((text.to_owned(), Type::U32));
    let (base, member) = name.split_once('.').unwrap_or((name, ""));
    let dimension = match base {
        "%tid" => "tid",
        "%ntid" => "ntid",
        "%ctaid" | "%clusterid" => "ctaid",
        "%nctaid" | "%nclusterid" => "nctaid",
        "%cluster_ctaid" => return matches!(member, "x" | "y" | "z").then(|| ("0u".to_owned(), Type::U32)),
        "%cluster_nctaid" => return matches!(member, "x" | "y" | "z").then(|| ("1u".to_owned(), Type::U32)),
        _ => "",
    };
    if !dimension.is_empty() {
        return matches!(member, "x" | "y" | "z").then(|| (format!("t_.{dimension}.{member}"), Type::U32));
    }
    match name {
        "%laneid" => u32("t_.lane"),
        "%warpid" => u32("(t_.linear >> 5)"),
        "%nwarpid" => u32("((t_.ntid.x * t_.ntid.y * t_.ntid.z + 31) >> 5)"),
        "WARP_SZ" => u32("32u"),
        "%lanemask_eq" => u32("(1u << t_.lane)"),
        "%lanemask_lt" => u32("((1u << t_.lane) - 1)"),
        "%lanemask_le" => u32("((2u << t_.lane) - 1)"),
        "%lanemask_gt" => u32("(0u - (2u << t_.lane))"),
        "%lanemask_ge" => u32("(0u - (1u << t_.lane))"),
        "%smid" | "%gridid" | "%cluster_ctarank" => u32("0u"),
        "%nsmid" | "%cluster_nctarank" => u32("1u"),
        "%clock" | "%globaltimer_lo" => u32("(uint32_t)nanoseconds_()"),
        "%clock_hi" | "%globaltimer_hi" => u32("(uint32_t)(nanoseconds_() >> 32)"),
        "%clock64" | "%globaltimer" => Some(("nanoseconds_()".to_owned(), Type::U64)),
        "%is_explicit_cluster" => Some(("false".to_owned(), Type::Pred)),
        _ => None,
    }
}
