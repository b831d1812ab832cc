//! Operations of a whole warp.

use super::super::syntax::Operand;
use super::super::types::Type;
use super::operand::Op;
use super::{Body, Result};

/// `a|b`, or `a` alone.
fn pair<'o, 'a>(operand: &'o Operand<'a>) -> (&'o Operand<'a>, Option<&'o Operand<'a>>) {
    match operand {
        Operand::Pair(first, second) => (first, Some(second)),
        single => (single, None),
    }
}

impl<'a> Body<'a, '_> {
    pub(super) fn warp(&mut self, op: &mut Op<'a, '_>) -> Result {
        if op.name == "activemask" {
            op.take_one(&["b32"])?;
            return self.result(op, Type::B32, "cuemu::active_mask()");
        }
        op.take_one(&["sync"])?;
        match op.name {
            "shfl" => self.shuffle(op),
            "vote" => self.vote(op),
            "match" => self.matching(op),
            "redux" => self.reduce(op),
            _ => {
                let (lane, leader) = pair(op.operand(0)?);
                let mask = self.value(op, 1, Type::U32)?;
                self.push(format!(
                    "{{ bool leader_ = false; const uint32_t lane_ = cuemu::elect({mask}, &leader_, CUEMU_HERE); (void)lane_; "
                ));
                self.write(lane, Type::U32, "lane_")?;
                if let Some(leader) = leader {
                    self.write(leader, Type::Pred, "leader_")?;
                }
                self.push(" }");
                Ok(())
            }
        }
    }

    fn shuffle(&mut self, op: &mut Op<'a, '_>) -> Result {
        let mode = op.take_one(&["up", "down", "bfly", "idx"])?;
        op.take_one(&["b32"])?;
        let (destination, in_range) = pair(op.operand(0)?);
        let (a, b) = (self.value(op, 1, Type::U32)?, self.value(op, 2, Type::U32)?);
        let (c, mask) = (self.value(op, 3, Type::U32)?, self.value(op, 4, Type::U32)?);
        self.push(format!(
            "{{ const cuemu::Shuffled got_ = cuemu::shuffle({mask}, {a}, cuemu::Shuffle::{mode}, {b}, {c}, CUEMU_HERE); "
        ));
        self.write(destination, Type::U32, "got_.value")?;
        if let Some(predicate) = in_range {
            self.write(predicate, Type::Pred, "got_.in_range")?;
        }
        self.push(" }");
        Ok(())
    }

    fn vote(&mut self, op: &mut Op<'a, '_>) -> Result {
        let kind = op.take_one(&["all", "any", "uni", "ballot"])?;
        op.take_one(if kind == "ballot" { &["b32"] } else { &["pred"] })?;
        let (a, mask) = (self.value(op, 1, Type::Pred)?, self.value(op, 2, Type::U32)?);
        let ballot = |a: &str| format!("cuemu::ballot({mask}, {a}, CUEMU_HERE)");
        match kind {
            "ballot" => self.result(op, Type::B32, &ballot(&a)),
            "any" => self.result(op, Type::Pred, &format!("{} != 0", ballot(&a))),
            "all" => self.result(op, Type::Pred, &format!("{} == 0", ballot(&format!("!{a}")))),
            _ => {
                self.push(format!("{{ const uint32_t m_ = {mask}, b_ = {}; ", ballot(&a)));
                self.result(op, Type::Pred, "b_ == 0 || b_ == m_")?;
                self.push(" }");
                Ok(())
            }
        }
    }

    fn matching(&mut self, op: &mut Op<'a, '_>) -> Result {
        let all = op.take_one(&["any", "all"])? == "all";
        let ty = op.take_type()?;
        if !matches!(ty, Type::B32 | Type::B64) {
            return Err("this type is not known to the emulator here".to_owned());
        }
        let (a, mask) = (self.value(op, 1, ty)?, self.value(op, 2, Type::U32)?);
        let bits = ty.bits();
        self.push(format!(
            "{{ const uint32_t m_ = {mask}, same_ = cuemu::match_any(m_, {a}, {bits}, CUEMU_HERE); (void)m_; "
        ));
        let (destination, predicate) = pair(op.operand(0)?);
        if all {
            self.write(destination, Type::U32, "same_ == m_ ? m_ : 0")?;
            if let Some(predicate) = predicate {
                self.write(predicate, Type::Pred, "same_ == m_")?;
            }
        } else {
            self.write(destination, Type::U32, "same_")?;
        }
        self.push(" }");
        Ok(())
    }

    fn reduce(&mut self, op: &mut Op<'a, '_>) -> Result {
        let operation = op.take_one(&["add", "min", "max", "and", "or", "xor"])?;
        let ty = op.take_type()?;
        let name = match (operation, ty) {
            ("add", Type::U32 | Type::S32) => "add",
            ("min", Type::U32) => "umin",
            ("min", Type::S32) => "smin",
            ("max", Type::U32) => "umax",
            ("max", Type::S32) => "smax",
            ("and", Type::B32) => "and_",
            ("or", Type::B32) => "or_",
            ("xor", Type::B32) => "xor_",
            _ => return Err("this type is not known to the emulator here".to_owned()),
        };
        let (a, mask) = (self.value(op, 1, Type::U32)?, self.value(op, 2, Type::U32)?);
        self.result(
            op,
            Type::U32,
            &format!("cuemu::warp_reduce({mask}, {a}, cuemu::Reduce::{name}, CUEMU_HERE)"),
        )
    }
}
