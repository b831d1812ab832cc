//! Comparisons and selections.

use super::super::syntax::Operand;
use super::super::types::Type;
use super::operand::Op;
use super::{Body, Result};

/// `a <comparison> b`; a comparison of floats that ends in `u` also holds where one of them is a NaN.
fn comparison(name: &str, ty: Type, a: &str, b: &str) -> Result<String> {
    let float = ty.is_native_float() || ty.is_half();
    let (base, unordered) = match name.strip_suffix('u') {
        Some(base) if float => (base, true),
        _ => (name, false),
    };
    // The opposite comparison, negated, holds for a NaN.
    let (sign, opposite) = match base {
        "eq" => ("==", "!="),
        "ne" => ("!=", "=="),
        "lt" | "lo" => ("<", ">="),
        "le" | "ls" => ("<=", ">"),
        "gt" | "hi" => (">", "<="),
        "ge" | "hs" => (">=", "<"),
        "num" => return Ok(format!("({a} == {a} && {b} == {b})")),
        "nan" => return Ok(format!("({a} != {a} || {b} != {b})")),
        _ => return Err(format!("comparison `.{name}` is not known to the emulator")),
    };
    Ok(match (float, unordered, base) {
        (true, false, "ne") => format!("({a} < {b} || {a} > {b})"),
        (true, true, "eq") => format!("!({a} < {b} || {a} > {b})"),
        (true, true, "ne") => format!("({a} != {b})"),
        (true, true, _) => format!("!({a} {opposite} {b})"),
        _ => format!("({a} {sign} {b})"),
    })
}

const COMPARISONS: [&str; 18] = [
    "eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu", "ltu", "leu", "gtu", "geu",
    "num", "nan",
];

impl<'a> Body<'a, '_> {
    pub(super) fn compare(&mut self, op: &mut Op<'a, '_>) -> Result {
        let ty = op.take_type()?;
        match op.name {
            "selp" => {
                let (a, b) = (self.value(op, 1, ty)?, self.value(op, 2, ty)?);
                let choice = self.value(op, 3, Type::Pred)?;
                self.result(op, ty, &format!("{choice} ? {a} : {b}"))
            }
            "slct" => {
                op.take("ftz");
                let result = op.take_type()?;
                if !matches!(ty, Type::S32 | Type::F32) {
                    return Err("this type is not known to the emulator here".to_owned());
                }
                let (a, b) = (self.value(op, 1, result)?, self.value(op, 2, result)?);
                let choice = self.value(op, 3, ty)?;
                self.result(op, result, &format!("{choice} >= 0 ? {a} : {b}"))
            }
            "setp" => {
                let (test, combine) = self.test(op, ty)?;
                if matches!(op.operand(0)?, Operand::Name(_)) {
                    return self.result(op, Type::Pred, &combine(&test));
                }
                self.push(format!("{{ const bool c_ = {test};"));
                let (first, second) = match op.operand(0)? {
                    Operand::Pair(first, second) => (&**first, Some(&**second)),
                    single => (single, None),
                };
                // Both are computed before the first is written: operand 3 may be the same register.
                self.push(format!(" const bool p_ = {}, q_ = {}; (void)q_; ", combine("c_"), combine("!c_")));
                self.write(first, Type::Pred, "p_")?;
                if let Some(second) = second {
                    self.write(second, Type::Pred, "q_")?;
                }
                self.push(" }");
                Ok(())
            }
            _ => {
                let result = op.take_type()?;
                let (test, combine) = self.test(op, ty)?;
                let yes = match result {
                    Type::F32 => "1.0f",
                    Type::U32 | Type::S32 | Type::B32 => "0xffffffffu",
                    _ => return Err("this type is not known to the emulator here".to_owned()),
                };
                let test = combine(&test);
                self.result(op, result, &format!("{test} ? ({0}){yes} : ({0})0", result.cpp()))
            }
        }
    }

    /// The comparison of operands 1 and 2, and how its result is combined with operand 3.
    #[allow(clippy::type_complexity, reason = "a test and what to do with it")]
    fn test(&mut self, op: &mut Op<'a, '_>, ty: Type) -> Result<(String, Box<dyn Fn(&str) -> String>)> {
        op.take("ftz");
        let name = op.take_one(&COMPARISONS)?;
        let combine = op.take_any(&["and", "or", "xor"]);
        if ty.is_packed() {
            return Err("this type is not known to the emulator here".to_owned());
        }
        // lo, ls, hi, hs compare unsigned numbers, eq and ne compare bits.
        let (mut a, mut b) = (self.value(op, 1, ty)?, self.value(op, 2, ty)?);
        if ty.is_half() {
            let widen = if ty == Type::Bf16 { "ptx::bf16_to_float" } else { "ptx::half_to_float" };
            (a, b) = (format!("{widen}({a})"), format!("{widen}({b})"));
        }
        let test = comparison(name, ty, &a, &b)?;
        let Some(combine) = combine else { return Ok((test, Box::new(str::to_owned))) };
        let sign = match combine {
            "and" => "&",
            "or" => "|",
            _ => "^",
        };
        let other = self.value(op, 3, Type::Pred)?;
        Ok((test, Box::new(move |test| format!("({test} {sign} {other})"))))
    }
}
