//! Floating point: f32 and f64 as C++ does it, f16 and bf16 through helpers that round once.

use super::super::types::Type;
use super::arithmetic::take_rounding;
use super::operand::Op;
use super::{Body, Result};

impl<'a> Body<'a, '_> {
    /// `add`, `sub`, `mul`, `div`, `fma`, `mad`, `min`, `max`, `abs`, `neg` of f32 and f64.
    pub(super) fn float_arithmetic(&mut self, op: &mut Op<'a, '_>, ty: Type) -> Result {
        op.take("ftz");
        let cpp = ty.cpp();
        let expression = match op.name {
            "add" | "sub" | "mul" | "div" => {
                if op.name == "div" {
                    op.take_any(&["approx", "full"]);
                }
                let rounding = take_rounding(op);
                let (a, b) = (self.value(op, 1, ty)?, self.value(op, 2, ty)?);
                match rounding {
                    Some(mode) => format!("ptx::{}<{cpp}>({a}, {b}, {mode})", op.name),
                    None => {
                        let sign = match op.name {
                            "add" => '+',
                            "sub" => '-',
                            "mul" => '*',
                            _ => '/',
                        };
                        format!("{a} {sign} {b}")
                    }
                }
            }
            "fma" | "mad" => {
                let rounding = take_rounding(op).unwrap_or("ptx::Round::nearest");
                let (a, b, c) = (self.value(op, 1, ty)?, self.value(op, 2, ty)?, self.value(op, 3, ty)?);
                format!("ptx::fma<{cpp}>({a}, {b}, {c}, {rounding})")
            }
            "min" | "max" => {
                let nan = if op.take("NaN") { "_nan" } else { "" };
                let (a, b) = (self.value(op, 1, ty)?, self.value(op, 2, ty)?);
                format!("ptx::f{}{nan}<{cpp}>({a}, {b})", op.name)
            }
            "abs" => format!("std::fabs({})", self.value(op, 1, ty)?),
            "neg" => format!("-{}", self.value(op, 1, ty)?),
            _ => return Err("this type is not known to the emulator here".to_owned()),
        };
        let saturates =
            matches!(op.name, "add" | "sub" | "mul" | "fma" | "mad") && ty == Type::F32 && op.take("sat");
        if saturates {
            return self.result(op, ty, &format!("ptx::saturate<{cpp}>({expression})"));
        }
        self.result(op, ty, &expression)
    }

    /// The same of f16, bf16 and of two of them in a register.
    pub(super) fn half_arithmetic(&mut self, op: &mut Op<'a, '_>, ty: Type) -> Result {
        op.take("ftz");
        let (function, count) = match op.name {
            "add" | "sub" | "mul" => (op.name, 2),
            "min" | "max" => (op.name, 2),
            "fma" => ("fma", 3),
            "abs" | "neg" => (op.name, 1),
            _ => return Err("this type is not known to the emulator here".to_owned()),
        };
        if matches!(op.name, "add" | "sub" | "mul" | "fma") {
            op.take("rn");
        }
        let mut function = format!("ptx::half_{function}");
        if count > 1 {
            function += if matches!(ty, Type::Bf16 | Type::Bf16x2) { "<ptx::Bf16>" } else { "<ptx::F16>" };
        }
        let mut arguments = Vec::with_capacity(count);
        for i in 0..count {
            arguments.push(self.value(op, i + 1, ty)?);
        }
        let arguments = arguments.join(", ");
        if ty.is_packed() {
            return self.result(op, ty, &format!("ptx::each({function}, {arguments})"));
        }
        self.result(op, ty, &format!("{function}({arguments})"))
    }

    /// `rcp`, `sqrt`, `rsqrt` and the transcendental functions.
    pub(super) fn function_of_one(&mut self, op: &mut Op<'a, '_>) -> Result {
        let ty = op.take_type()?;
        op.take("approx");
        op.take("ftz");
        let rounding = if matches!(op.name, "rcp" | "sqrt") { take_rounding(op) } else { None };
        if ty.is_half() || ty.is_packed() {
            return self.half_function(op, ty);
        }
        if !ty.is_native_float() {
            return Err("this type is not known to the emulator here".to_owned());
        }
        let (a, cpp) = (self.value(op, 1, ty)?, ty.cpp());
        let expression = match op.name {
            "rcp" | "sqrt" => {
                format!("ptx::{}<{cpp}>({a}, {})", op.name, rounding.unwrap_or("ptx::Round::nearest"))
            }
            "rsqrt" => format!("ptx::rsqrt<{cpp}>({a})"),
            "ex2" => format!("std::exp2({a})"),
            "lg2" => format!("std::log2({a})"),
            function => format!("std::{function}({a})"),
        };
        self.result(op, ty, &expression)
    }

    fn half_function(&mut self, op: &mut Op<'a, '_>, ty: Type) -> Result {
        let function = match op.name {
            "ex2" => "std::exp2",
            "tanh" => "std::tanh",
            _ => return Err("this type is not known to the emulator here".to_owned()),
        };
        let half = if matches!(ty, Type::Bf16 | Type::Bf16x2) { "ptx::Bf16" } else { "ptx::F16" };
        let a = self.value(op, 1, ty)?;
        let one =
            format!("[](uint16_t h_) {{ return {half}::narrow({function}((double){half}::widen(h_))); }}");
        if ty.is_packed() {
            return self.result(op, ty, &format!("ptx::each({one}, {a})"));
        }
        self.result(op, ty, &format!("({one})({a})"))
    }

    /// `copysign` and `testp`.
    pub(super) fn float_bits(&mut self, op: &mut Op<'a, '_>) -> Result {
        let ty = op.take_type()?;
        if !ty.is_native_float() {
            return Err("this type is not known to the emulator here".to_owned());
        }
        let a = self.value(op, 1, ty)?;
        if op.name == "copysign" {
            let b = self.value(op, 2, ty)?;
            return self.result(op, ty, &format!("ptx::copysign<{}>({a}, {b})", ty.cpp()));
        }
        let test =
            match op.take_one(&["finite", "infinite", "number", "notanumber", "normal", "subnormal"])? {
                "number" => format!("!ptx::is_nan({a})"),
                "notanumber" => format!("ptx::is_nan({a})"),
                other => format!("ptx::is_{other}({a})"),
            };
        self.result(op, Type::Pred, &test)
    }
}
