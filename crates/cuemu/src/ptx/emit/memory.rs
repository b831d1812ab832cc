//! Loads, stores, atomics, moves and addresses.

use super::super::syntax::{Operand, Space};
use super::super::types::Type;
use super::operand::{Op, vector};
use super::{Body, Result};

/// How an access is ordered with others.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    Weak,
    Relaxed,
    Acquire,
    Release,
    Both,
}

impl Order {
    fn take(op: &mut Op<'_, '_>) -> Self {
        let order =
            match op.take_any(&["weak", "relaxed", "acquire", "release", "acq_rel", "volatile", "mmio"]) {
                None | Some("weak") => Self::Weak,
                Some("acquire") => Self::Acquire,
                Some("release") => Self::Release,
                Some("acq_rel") => Self::Both,
                _ => Self::Relaxed,
            };
        op.take("relaxed"); // of .mmio.relaxed
        op.take_any(&["cta", "cluster", "gpu", "sys"]);
        order
    }

    /// The call that an atomic access `what` (reads, writes, both) of `place` needs before it.
    fn access(self, place: &str, what: &str) -> String {
        let acquires = matches!(self, Self::Acquire | Self::Both);
        let releases = matches!(self, Self::Release | Self::Both);
        format!("cuemu::atomic_access({place}, cuemu::Access::{what}, {acquires}, {releases}); ")
    }
}

fn take_width(op: &mut Op<'_, '_>) -> usize {
    match op.take_any(&["v2", "v4", "v8"]) {
        Some("v2") => 2,
        Some("v4") => 4,
        Some(_) => 8,
        None => 1,
    }
}

fn elements<'o, 'a>(operand: &'o Operand<'a>, width: usize) -> Result<&'o [Operand<'a>]> {
    let found = if width == 1 { std::slice::from_ref(operand) } else { vector(operand)? };
    if found.len() != width {
        return Err(format!("expected {width} operands in braces"));
    }
    Ok(found)
}

impl<'a> Body<'a, '_> {
    /// A checked pointer, a C++ `void*`, to `bytes` bytes at an address operand.
    fn pointer(&mut self, operand: &Operand<'a>, space: Space, bytes: u32, write: bool) -> Result<String> {
        let (address, named) = self.address(operand)?;
        let function = match space {
            Space::Param | Space::Local | Space::Const => return Ok(format!("(void*)({address})")),
            Space::Global | Space::Generic if named => return Ok(format!("(void*)({address})")),
            Space::Global => "global_",
            Space::Generic => "generic_",
            Space::Shared => "cuemu::shared",
        };
        let span = self.spans;
        self.spans += 1;
        Ok(format!("{function}(s_[{span}], {address}, {bytes}, {write}, CUEMU_HERE)"))
    }

    pub(super) fn load(&mut self, op: &mut Op<'a, '_>) -> Result {
        let order = Order::take(op);
        let space = op.take_space();
        op.take("nc");
        let policy = op.take_cache_hints();
        let width = take_width(op);
        let ty = op.take_type()?;
        if policy {
            op.operand(2)?;
        }
        let cpp = ty.cpp();
        let pointer = self.pointer(op.operand(1)?, space, ty.bytes() * width as u32, false)?;
        self.push(format!("{{ const {cpp}* const q_ = (const {cpp}*){pointer}; "));
        if order != Order::Weak {
            self.push(order.access("q_", "reads"));
        }
        for (i, destination) in elements(op.operand(0)?, width)?.iter().enumerate() {
            let value =
                if order == Order::Weak { format!("q_[{i}]") } else { format!("ptx::atomic_load(q_ + {i})") };
            self.write(destination, ty, &value)?;
        }
        self.push(" }");
        Ok(())
    }

    pub(super) fn store(&mut self, op: &mut Op<'a, '_>) -> Result {
        let order = Order::take(op);
        let space = op.take_space();
        let policy = op.take_cache_hints();
        let width = take_width(op);
        let ty = op.take_type()?;
        if policy {
            op.operand(2)?;
        }
        if space == Space::Const {
            return Err("a store to constant memory".to_owned());
        }
        let cpp = ty.cpp();
        let pointer = self.pointer(op.operand(0)?, space, ty.bytes() * width as u32, true)?;
        self.push(format!("{{ {cpp}* const q_ = ({cpp}*){pointer}; "));
        if order != Order::Weak {
            self.push(order.access("q_", "writes"));
        }
        for (i, source) in elements(op.operand(1)?, width)?.iter().enumerate() {
            let value = self.read(source, ty)?;
            if order == Order::Weak {
                self.push(format!(" q_[{i}] = {value};"));
            } else {
                self.push(format!(" ptx::atomic_store<{cpp}>(q_ + {i}, {value});"));
            }
        }
        self.push(" }");
        Ok(())
    }

    /// `atom` and `red`: relaxed real atomics; ThreadSanitizer is told how they are ordered.
    pub(super) fn atomic(&mut self, op: &mut Op<'a, '_>) -> Result {
        let order = Order::take(op);
        let space = op.take_space();
        let policy = op.take_cache_hints();
        let operation =
            op.take_one(&["add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"])?;
        let ty = op.take_type()?;
        let bits = matches!(operation, "and" | "or" | "xor" | "exch" | "cas");
        let fits = match operation {
            "inc" | "dec" => ty == Type::U32,
            "add" => ty.is_native_float() || (ty.is_integer() && ty.bits() >= 32),
            "cas" => matches!(ty, Type::B16 | Type::B32 | Type::B64 | Type::U32 | Type::S32 | Type::U64),
            _ => ty.is_integer() && ty.bits() >= 32,
        };
        if !fits {
            return Err("this type of the operation is not known to the emulator".to_owned());
        }
        // Addition wraps in unsigned numbers.
        let ty = if bits || (operation == "add" && ty.is_integer()) { ty.unsigned() } else { ty };
        let first = usize::from(op.name == "atom");
        let pointer = self.pointer(op.operand(first)?, space, ty.bytes(), true)?;
        let cpp = ty.cpp();
        let mut arguments = "q_".to_owned();
        let count = if operation == "cas" { 2 } else { 1 };
        for i in 0..count {
            arguments += &format!(", {}", self.value(op, first + 1 + i, ty)?);
        }
        if policy {
            op.operand(first + 1 + count)?;
        }
        let call = format!("ptx::atomic_{operation}<{cpp}>({arguments})");
        self.push(format!("{{ {cpp}* const q_ = ({cpp}*){pointer}; "));
        // What a `red` read nobody gets to know.
        self.push(order.access("q_", if op.name == "atom" { "both" } else { "writes" }));
        if op.name == "atom" {
            self.result(op, ty, &call)?;
        } else {
            self.push(format!("{call};"));
        }
        self.push(" }");
        Ok(())
    }

    pub(super) fn mov(&mut self, op: &mut Op<'a, '_>) -> Result {
        let ty = op.take_type()?;
        let (to, from) = (op.operand(0)?, op.operand(1)?);
        match (to, from) {
            (Operand::Vector(_), Operand::Vector(_)) => Err("a move between braces".to_owned()),
            (Operand::Vector(parts), _) => {
                let bits = ty.bits() / parts.len().max(1) as u32;
                let part = Type::unsigned_of(bits);
                let value = self.read(from, ty.unsigned())?;
                self.push(format!("{{ const uint64_t m_ = {value};"));
                for (i, destination) in parts.iter().enumerate() {
                    self.write(destination, part, &format!("m_ >> {}", i as u32 * bits))?;
                }
                self.push(" }");
                Ok(())
            }
            (_, Operand::Vector(parts)) => {
                let bits = ty.bits() / parts.len().max(1) as u32;
                let part = Type::unsigned_of(bits);
                let mut terms = Vec::with_capacity(parts.len());
                for (i, source) in parts.iter().enumerate() {
                    terms.push(format!("(uint64_t){} << {}", self.read(source, part)?, i as u32 * bits));
                }
                self.write(to, ty.unsigned(), &terms.join(" | "))
            }
            _ => {
                let value = self.read(from, ty)?;
                self.write(to, ty, &value)
            }
        }
    }

    /// Generic addresses are addresses of the host; only shared memory has a window of its own.
    pub(super) fn cvta(&mut self, op: &mut Op<'a, '_>) -> Result {
        let to = op.take("to");
        let space = op.take_space();
        let ty = op.take_type()?;
        let value = self.value(op, 1, ty)?;
        match (space, to) {
            (Space::Generic, _) => Err("the state space is missing".to_owned()),
            (Space::Shared, true) => self.result(op, ty, &format!("cuemu::to_shared({value}, CUEMU_HERE)")),
            (Space::Shared, false) => {
                self.result(op, ty, &format!("cuemu::from_shared({value}, CUEMU_HERE)"))
            }
            _ => self.result(op, ty, &value),
        }
    }

    /// Prefetches and cache policies: nothing to do, but the operands have to be right.
    pub(super) fn hint(&mut self, op: &mut Op<'a, '_>) -> Result {
        if op.name == "createpolicy" {
            op.take_one(&["fractional"])?;
            let hint = |m: &str| m.starts_with("L2::evict").then_some(());
            while op.take_parsed(hint).is_some() {}
            op.take_one(&["b64"])?;
            if op.count() > 1 {
                op.operand(1)?;
            }
            return self.result(op, Type::B64, "0");
        }
        op.take_space();
        op.take("tensormap");
        let hint = |m: &str| (m == "L1" || m == "L2" || m.starts_with("L2::evict")).then_some(());
        while op.take_parsed(hint).is_some() {}
        if op.name == "applypriority" {
            op.constant(1)?;
        }
        self.address(op.operand(0)?)?;
        self.push(";");
        Ok(())
    }
}
