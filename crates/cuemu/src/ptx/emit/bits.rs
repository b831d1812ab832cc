//! Bits: logic, shifts, fields, permutations.

use super::super::types::Type;
use super::operand::Op;
use super::{Body, Result};

impl<'a> Body<'a, '_> {
    pub(super) fn logic(&mut self, op: &mut Op<'a, '_>) -> Result {
        let ty = op.take_type()?;
        if ty != Type::Pred && !ty.is_integer() {
            return Err("this type is not known to the emulator here".to_owned());
        }
        let a = self.value(op, 1, ty)?;
        let predicate = ty == Type::Pred;
        let expression = match op.name {
            "not" if predicate => format!("!{a}"),
            "not" => format!("~{a}"),
            "cnot" if !predicate => format!("{a} == 0 ? 1 : 0"),
            "and" | "or" | "xor" => {
                let sign = match op.name {
                    "and" => '&',
                    "or" => '|',
                    _ => '^',
                };
                format!("{a} {sign} {}", self.value(op, 2, ty)?)
            }
            "lop3" => {
                let (b, c) = (self.value(op, 2, ty)?, self.value(op, 3, ty)?);
                format!("ptx::lop3({a}, {b}, {c}, {}u)", op.constant(4)?)
            }
            _ => return Err("this type is not known to the emulator here".to_owned()),
        };
        self.result(op, ty, &expression)
    }

    pub(super) fn shift(&mut self, op: &mut Op<'a, '_>) -> Result {
        let ty = op.take_type()?;
        if !ty.is_integer() || ty.bits() == 8 {
            return Err("this type is not known to the emulator here".to_owned());
        }
        if op.name == "shf" {
            let direction = if op.take_one(&["l", "r"])? == "l" { "left" } else { "right" };
            let wrap = op.take_one(&["wrap", "clamp"])? == "wrap";
            let (low, high) = (self.value(op, 1, Type::U32)?, self.value(op, 2, Type::U32)?);
            let amount = self.value(op, 3, Type::U32)?;
            let call = format!("ptx::shf(ptx::Funnel::{direction}, {wrap}, {low}, {high}, {amount})");
            return self.result(op, Type::U32, &call);
        }
        let ty = if op.name == "shl" { ty.unsigned() } else { ty };
        let (a, amount) = (self.value(op, 1, ty)?, self.value(op, 2, Type::U32)?);
        self.result(op, ty, &format!("ptx::{}<{}>({a}, {amount})", op.name, ty.cpp()))
    }

    pub(super) fn bit_field(&mut self, op: &mut Op<'a, '_>) -> Result {
        let ty = op.take_type()?;
        if !ty.is_integer() || ty.bits() < 32 {
            return Err("this type is not known to the emulator here".to_owned());
        }
        let unsigned = ty.unsigned();
        let (cpp, unsigned_cpp) = (ty.cpp(), unsigned.cpp());
        match op.name {
            "popc" | "clz" => {
                let a = self.value(op, 1, unsigned)?;
                self.result(op, Type::U32, &format!("ptx::{}({a})", op.name))
            }
            "brev" => {
                let a = self.value(op, 1, unsigned)?;
                self.result(op, ty, &format!("ptx::brev<{unsigned_cpp}>({a})"))
            }
            "bfind" => {
                let shift = op.take("shiftamt");
                let a = self.value(op, 1, ty)?;
                self.result(op, Type::U32, &format!("ptx::bfind<{cpp}>({a}, {shift})"))
            }
            "bfe" => {
                let (a, b) = (self.value(op, 1, ty)?, self.value(op, 2, Type::U32)?);
                let c = self.value(op, 3, Type::U32)?;
                self.result(op, ty, &format!("ptx::bfe<{cpp}>({a}, {b}, {c})"))
            }
            "bfi" => {
                let (a, b) = (self.value(op, 1, unsigned)?, self.value(op, 2, unsigned)?);
                let (c, d) = (self.value(op, 3, Type::U32)?, self.value(op, 4, Type::U32)?);
                self.result(op, ty, &format!("ptx::bfi<{unsigned_cpp}>({a}, {b}, {c}, {d})"))
            }
            "bmsk" => {
                // Beyond the register, the clamped form has ones to the end, the wrapped one starts anew.
                let wrap = op.take_one(&["clamp", "wrap"])? == "wrap";
                let (a, b) = (self.value(op, 1, Type::U32)?, self.value(op, 2, Type::U32)?);
                let (a, b) = if wrap { (format!("({a} & 31)"), format!("({b} & 31)")) } else { (a, b) };
                self.result(
                    op,
                    Type::U32,
                    &format!("ptx::shl<uint32_t>(ptx::shl<uint64_t>(1, {b}) - 1, {a})"),
                )
            }
            "prmt" => {
                let (a, b) = (self.value(op, 1, Type::U32)?, self.value(op, 2, Type::U32)?);
                let c = self.value(op, 3, Type::U32)?;
                self.result(op, Type::U32, &format!("ptx::prmt({a}, {b}, {c})"))
            }
            _ => Err("instruction not known to the emulator".to_owned()),
        }
    }
}
