//! `cvt`.

use super::super::types::Type;
use super::operand::Op;
use super::{Body, Result};

/// A rounding modifier of `cvt`.
struct Rounding {
    /// As a `ptx::Round`.
    mode: &'static str,
    /// To an integral value (`.rni` …).
    integral: bool,
}

fn take_rounding(op: &mut Op<'_, '_>) -> Option<Rounding> {
    let (mode, integral) = match op.take_any(&["rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi"])? {
        "rn" => ("ptx::Round::nearest", false),
        "rz" => ("ptx::Round::zero", false),
        "rm" => ("ptx::Round::down", false),
        "rp" => ("ptx::Round::up", false),
        "rni" => ("ptx::Round::nearest", true),
        "rzi" => ("ptx::Round::zero", true),
        "rmi" => ("ptx::Round::down", true),
        _ => ("ptx::Round::up", true),
    };
    Some(Rounding { mode, integral })
}

/// Nearest or toward zero: what halves are rounded by.
fn half_mode(rounding: Option<&Rounding>) -> Result<&'static str> {
    match rounding {
        Some(r) if !r.integral && matches!(r.mode, "ptx::Round::nearest" | "ptx::Round::zero") => Ok(r.mode),
        _ => Err("this rounding is not known to the emulator here".to_owned()),
    }
}

fn narrowing(ty: Type) -> &'static str {
    match ty {
        Type::Bf16 => "ptx::float_to_bf16",
        Type::F16 => "ptx::float_to_half",
        Type::Bf16x2 => "ptx::float_to_bf16x2",
        _ => "ptx::float_to_half2",
    }
}

fn is_float(ty: Type) -> bool {
    ty.is_native_float() || ty.is_half()
}

impl<'a> Body<'a, '_> {
    pub(super) fn convert(&mut self, op: &mut Op<'a, '_>) -> Result {
        let from = op.take_type()?;
        let to = op.take_type()?;
        op.take("ftz");
        if to == Type::Tf32 {
            op.take_one(&["rna"])?;
            if from != Type::F32 {
                return Err("this type is not known to the emulator here".to_owned());
            }
            let a = self.value(op, 1, Type::F32)?;
            return self.result(op, Type::B32, &format!("ptx::float_to_tf32({a})"));
        }
        let rounding = take_rounding(op);
        let saturate = op.take("sat");
        if to.is_packed() {
            return self.convert_two(op, to, from, rounding.as_ref(), saturate);
        }
        if from.is_packed() || from == Type::Tf32 || from == Type::Pred || to == Type::Pred {
            return Err("this type is not known to the emulator here".to_owned());
        }
        let a = self.value(op, 1, from)?;
        let expression = match (is_float(from), is_float(to)) {
            (false, false) => {
                if rounding.is_some() {
                    return Err("a rounding between integers".to_owned());
                }
                if saturate { format!("ptx::saturating<{}>({a})", to.cpp()) } else { a }
            }
            (true, false) => {
                // Out of range is always the nearest integer there is: `.sat` says nothing new.
                let rounding = rounding.filter(|r| r.integral).ok_or("an integral rounding is missing")?;
                let a = self.widened(a, from);
                format!("ptx::to_integer<{}>({a}, {})", to.cpp(), rounding.mode)
            }
            (false, true) => {
                let rounding = rounding.filter(|r| !r.integral).ok_or("a rounding is missing")?;
                self.integer_to_float(a, from, to, &rounding, saturate)?
            }
            (true, true) => return self.float_to_float(op, a, (from, to), rounding.as_ref(), saturate),
        };
        self.result(op, to, &expression)
    }

    /// A half as a float; other floats as they are.
    fn widened(&self, a: String, from: Type) -> String {
        match from {
            Type::Bf16 => format!("ptx::bf16_to_float({a})"),
            Type::F16 => format!("ptx::half_to_float({a})"),
            _ => a,
        }
    }

    fn integer_to_float(
        &self,
        a: String,
        from: Type,
        to: Type,
        rounding: &Rounding,
        saturate: bool,
    ) -> Result<String> {
        if to.is_native_float() {
            let value = format!("ptx::to_float<{}>({a}, {})", to.cpp(), rounding.mode);
            return Ok(if saturate { format!("ptx::saturate({value})") } else { value });
        }
        // A double holds every 32-bit integer, and one rounding is left.
        if saturate || from.bits() > 32 || rounding.mode != "ptx::Round::nearest" {
            return Err("this conversion is not known to the emulator".to_owned());
        }
        let half = if to == Type::Bf16 { "ptx::Bf16" } else { "ptx::F16" };
        Ok(format!("{half}::narrow((double){a})"))
    }

    fn float_to_float(
        &mut self,
        op: &mut Op<'a, '_>,
        a: String,
        (from, to): (Type, Type),
        rounding: Option<&Rounding>,
        saturate: bool,
    ) -> Result {
        let relu = op.take("relu");
        let wide = self.widened(a.clone(), from);
        if let Some(r) = rounding.filter(|r| r.integral) {
            if from != to || relu {
                return Err("this conversion is not known to the emulator".to_owned());
            }
            let value = format!("ptx::round_to_integral({wide}, {})", r.mode);
            let value = if saturate { format!("ptx::saturate({value})") } else { value };
            let value = if to.is_half() { format!("{}({value})", narrowing(to)) } else { value };
            return self.result(op, to, &value);
        }
        if to.is_half() && from.is_half() && from == to {
            if rounding.is_some() || relu || saturate {
                return Err("this conversion is not known to the emulator".to_owned());
            }
            return self.result(op, to, &a);
        }
        if to.is_half() {
            let mode = half_mode(rounding)?;
            if from == Type::F64 {
                if relu || saturate || mode != "ptx::Round::nearest" {
                    return Err("this conversion is not known to the emulator".to_owned());
                }
                let half = if to == Type::Bf16 { "ptx::Bf16" } else { "ptx::F16" };
                return self.result(op, to, &format!("{half}::narrow({wide})"));
            }
            let value = if relu { format!("ptx::relu({wide})") } else { wide };
            let value = if saturate { format!("ptx::saturate<float>({value})") } else { value };
            return self.result(op, to, &format!("{}({value}, {mode})", narrowing(to)));
        }
        if relu {
            return Err("modifier `.relu` is not known to the emulator here".to_owned());
        }
        let value = match (from, to, rounding) {
            (Type::F64, Type::F32, Some(r)) => format!("ptx::to_float<float>({wide}, {})", r.mode),
            (Type::F64, Type::F32, None) => return Err("a rounding is missing".to_owned()),
            (_, _, Some(_)) => return Err("this rounding is not known to the emulator here".to_owned()),
            _ => format!("({}){wide}", to.cpp()),
        };
        let value = if saturate { format!("ptx::saturate<{}>({value})", to.cpp()) } else { value };
        self.result(op, to, &value)
    }

    /// `cvt.rn.bf16x2.f32 d, high, low`
    fn convert_two(
        &mut self,
        op: &mut Op<'a, '_>,
        to: Type,
        from: Type,
        rounding: Option<&Rounding>,
        saturate: bool,
    ) -> Result {
        if from != Type::F32 || saturate {
            return Err("this conversion is not known to the emulator".to_owned());
        }
        let relu = if op.take("relu") { "ptx::relu" } else { "" };
        let mode = half_mode(rounding)?;
        let (high, low) = (self.value(op, 1, from)?, self.value(op, 2, from)?);
        self.result(op, to, &format!("{}({relu}({high}), {relu}({low}), {mode})", narrowing(to)))
    }
}
