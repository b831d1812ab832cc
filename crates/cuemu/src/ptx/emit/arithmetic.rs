//! Sums, products and quotients, of integers and of floats.

use super::super::types::Type;
use super::operand::Op;
use super::{Body, Result};

/// The rounding modifier as a `ptx::Round`; `None` is to the nearest, by default or by `.rn`.
pub(super) fn take_rounding(op: &mut Op<'_, '_>) -> Option<&'static str> {
    match op.take_any(&["rn", "rz", "rm", "rp"]) {
        Some("rz") => Some("ptx::Round::zero"),
        Some("rm") => Some("ptx::Round::down"),
        Some("rp") => Some("ptx::Round::up"),
        _ => None,
    }
}

impl<'a> Body<'a, '_> {
    pub(super) fn arithmetic(&mut self, op: &mut Op<'a, '_>) -> Result {
        let ty = op.take_type()?;
        if ty.is_native_float() {
            return self.float_arithmetic(op, ty);
        }
        if ty.is_half() || ty.is_packed() {
            return self.half_arithmetic(op, ty);
        }
        if !ty.is_integer() || ty.bits() == 8 {
            return Err("this type is not known to the emulator here".to_owned());
        }
        if op.take("cc") {
            return self.carry_out(op, ty, false);
        }
        self.integer_arithmetic(op, ty)
    }

    fn integer_arithmetic(&mut self, op: &mut Op<'a, '_>, ty: Type) -> Result {
        let unsigned = ty.unsigned();
        match op.name {
            "add" | "sub" => {
                let sign = if op.name == "add" { '+' } else { '-' };
                if op.take("sat") {
                    let (a, b) = (self.value(op, 1, ty)?, self.value(op, 2, ty)?);
                    let wide = format!("(int64_t){a} {sign} (int64_t){b}");
                    return match ty {
                        Type::S32 => self.result(op, ty, &format!("ptx::saturating<int32_t>({wide})")),
                        _ => Err("`.sat` is only of .s32".to_owned()),
                    };
                }
                let (a, b) = (self.value(op, 1, unsigned)?, self.value(op, 2, unsigned)?);
                self.result(op, ty, &format!("{a} {sign} {b}"))
            }
            "mul" | "mad" => {
                let third = op.name == "mad";
                match op.take_one(&["lo", "hi", "wide"])? {
                    "lo" => {
                        // 16-bit operands would be multiplied as signed numbers.
                        let (a, b) = (self.value(op, 1, unsigned)?, self.value(op, 2, unsigned)?);
                        let product = format!("(uint64_t){a} * {b}");
                        self.plus(op, unsigned, product, third)
                    }
                    "hi" => {
                        let (a, b) = (self.value(op, 1, ty)?, self.value(op, 2, ty)?);
                        let product = format!("({})ptx::mul_hi<{}>({a}, {b})", unsigned.cpp(), ty.cpp());
                        self.plus(op, unsigned, product, third)
                    }
                    _ => {
                        if ty.bits() == 64 {
                            return Err("`.wide` of 64 bits".to_owned());
                        }
                        let wide = ty.wide();
                        let (a, b) = (self.value(op, 1, ty)?, self.value(op, 2, ty)?);
                        let product = if ty.is_signed() {
                            format!("(uint64_t)((int64_t){a} * {b})")
                        } else {
                            format!("(uint64_t){a} * {b}")
                        };
                        self.plus(op, wide, product, third)
                    }
                }
            }
            "div" | "rem" => {
                let (a, b) = (self.value(op, 1, ty)?, self.value(op, 2, ty)?);
                self.result(op, ty, &format!("ptx::{}_integer<{}>({a}, {b})", op.name, ty.cpp()))
            }
            "min" | "max" => {
                let (a, b) = (self.value(op, 1, ty)?, self.value(op, 2, ty)?);
                let compare = if op.name == "min" { '<' } else { '>' };
                self.result(op, ty, &format!("{a} {compare} {b} ? {a} : {b}"))
            }
            "abs" => {
                let a = self.value(op, 1, ty)?;
                self.result(op, ty, &format!("ptx::abs_integer<{}>({a})", ty.cpp()))
            }
            "neg" => {
                let a = self.value(op, 1, unsigned)?;
                self.result(op, ty, &format!("0 - {a}"))
            }
            _ => Err("this type is not known to the emulator here".to_owned()),
        }
    }

    /// `operand 0 = product`, plus operand 3 of a multiply-add.
    fn plus(&mut self, op: &Op<'a, '_>, ty: Type, product: String, third: bool) -> Result {
        if !third {
            return self.result(op, ty, &product);
        }
        let c = self.value(op, 3, ty.unsigned())?;
        self.result(op, ty, &format!("{product} + {c}"))
    }

    /// `addc`, `subc`, `madc`.
    pub(super) fn with_carry(&mut self, op: &mut Op<'a, '_>) -> Result {
        let ty = op.take_type()?;
        if !ty.is_integer() || ty.bits() < 32 {
            return Err("this type is not known to the emulator here".to_owned());
        }
        // Without .cc the carry is read and kept.
        let keep = !op.take("cc");
        if keep {
            self.push("{ const bool kept_ = carry_; ");
        }
        self.carry_out(op, ty, true)?;
        if keep {
            self.push(" carry_ = kept_; }");
        }
        Ok(())
    }

    /// Sums that set the carry; `carry_in`: that read it too. A difference is `a + ~b + 1`, as in the machine:
    /// its carry is 1 where nothing is borrowed. (The manual's borrow is the same for chains of differences;
    /// code from NVIDIA's compiler reads the carry of a difference with `addc`.)
    fn carry_out(&mut self, op: &mut Op<'a, '_>, ty: Type, carry_in: bool) -> Result {
        let unsigned = ty.unsigned();
        let difference = op.name.starts_with("sub");
        let (a, b) = if op.name.starts_with("mad") {
            let high = op.take_one(&["lo", "hi"])? == "hi";
            let (a, b) = (self.value(op, 1, ty)?, self.value(op, 2, ty)?);
            let cpp = unsigned.cpp();
            let product = if high {
                format!("({cpp})ptx::mul_hi<{}>({a}, {b})", ty.cpp())
            } else {
                format!("({cpp})((uint64_t){a} * (uint64_t){b})")
            };
            (product, self.value(op, 3, unsigned)?)
        } else if matches!(op.name, "add" | "addc" | "sub" | "subc") {
            (self.value(op, 1, unsigned)?, self.value(op, 2, unsigned)?)
        } else {
            return Err("modifier `.cc` is not known to the emulator here".to_owned());
        };
        let (function, carry) = match (difference, carry_in) {
            (true, true) => ("sub_borrow", "!carry_"),
            (true, false) => ("sub_borrow", "false"),
            (false, true) => ("add_carry", "carry_"),
            (false, false) => ("add_carry", "false"),
        };
        self.result(
            op,
            unsigned,
            &format!("ptx::{function}<{}>({a}, {b}, {carry}, carry_)", unsigned.cpp()),
        )?;
        if difference {
            self.push(" carry_ = !carry_;");
        }
        Ok(())
    }

    /// `mul24`, `mad24`, `sad`, `dp4a`.
    pub(super) fn small_product(&mut self, op: &mut Op<'a, '_>) -> Result {
        let ty = op.take_type()?;
        if op.name == "dp4a" {
            // `dp4a.atype.btype`: the type taken is that of b.
            let first = op.take_type()?;
            let byte = |t: Type| match t {
                Type::U32 => Ok("uint8_t"),
                Type::S32 => Ok("int8_t"),
                _ => Err("a type that is not known to the emulator here".to_owned()),
            };
            let (a, b) = (self.value(op, 1, Type::U32)?, self.value(op, 2, Type::U32)?);
            let c = self.value(op, 3, Type::U32)?;
            let call = format!("ptx::dp4a<{}, {}>({a}, {b}, {c})", byte(first)?, byte(ty)?);
            return self.result(op, Type::U32, &call);
        }
        if !ty.is_integer() {
            return Err("this type is not known to the emulator here".to_owned());
        }
        if op.name == "sad" {
            let (a, b, c) = (self.value(op, 1, ty)?, self.value(op, 2, ty)?, self.value(op, 3, ty)?);
            return self.result(op, ty, &format!("ptx::sad<{}>({a}, {b}, {c})", ty.cpp()));
        }
        if !matches!(ty, Type::U32 | Type::S32) {
            return Err("this type is not known to the emulator here".to_owned());
        }
        let high = op.take_one(&["lo", "hi"])? == "hi";
        let mut factor = |i| -> Result<String> {
            let value = self.value(op, i, Type::U32)?;
            // The low 24 bits, their sign extended.
            Ok(if ty == Type::S32 {
                format!("(int64_t)((int32_t)({value} << 8) >> 8)")
            } else {
                format!("(int64_t)({value} & 0xffffff)")
            })
        };
        let product = format!("(uint64_t)({} * {})", factor(1)?, factor(2)?);
        let product = if high { format!("({product} >> 16)") } else { product };
        self.plus(op, Type::U32, product, op.name == "mad24")
    }
}
