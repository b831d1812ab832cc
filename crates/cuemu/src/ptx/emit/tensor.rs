//! Tensor cores: matrix loads and stores, `mma`, `wgmma`.

use super::super::syntax::Operand;
use super::super::types::Type;
use super::operand::{Op, vector};
use super::{Body, Result};

fn expect_length(operands: &[Operand<'_>], length: usize) -> Result {
    if operands.len() == length { Ok(()) } else { Err(format!("expected {length} registers in braces")) }
}

impl<'a> Body<'a, '_> {
    /// `ldmatrix` and `stmatrix` of 8×8 matrices of 16-bit elements.
    pub(super) fn matrix(&mut self, op: &mut Op<'a, '_>) -> Result {
        op.take_one(&["sync"])?;
        op.take_one(&["aligned"])?;
        op.take_one(&["m8n8"])?;
        let count = match op.take_one(&["x1", "x2", "x4"])? {
            "x1" => 1,
            "x2" => 2,
            _ => 4,
        };
        let transposed = op.take("trans");
        let space = op.take_space();
        op.take_one(&["b16"])?;
        let load = op.name == "ldmatrix";
        let (list, address) = if load { (0, 1) } else { (1, 0) };
        let row = self.shared_window(op, address, space)?;
        let registers = match op.operand(list)? {
            Operand::Vector(registers) => registers.as_slice(),
            single => std::slice::from_ref(single),
        };
        expect_length(registers, count)?;
        if load {
            let pointers = self.pointers(registers, Type::B32)?;
            self.push(format!(
                "{{ uint32_t* q_[] = {{{pointers}}}; cuemu::ldmatrix(q_, {count}, {transposed}, {row}, CUEMU_HERE); }}"
            ));
        } else {
            let values = self.values(registers, Type::B32)?;
            self.push(format!(
                "{{ const uint32_t q_[] = {{{values}}}; cuemu::stmatrix(q_, {count}, {transposed}, {row}, CUEMU_HERE); }}"
            ));
        }
        Ok(())
    }

    /// `mma.sync.m16n8k16` of bf16 or f16, `m16n8k8` of tf32; both accumulate in f32.
    pub(super) fn mma(&mut self, op: &mut Op<'a, '_>) -> Result {
        for modifier in ["sync", "aligned", "row", "col"] {
            op.take_one(&[modifier])?;
        }
        let shape = op.take_one(&["m16n8k16", "m16n8k8"])?;
        let types = [op.take_type()?, op.take_type()?, op.take_type()?, op.take_type()?];
        let [Type::F32, b, a, Type::F32] = types else {
            return Err("only f32 accumulators are known to the emulator".to_owned());
        };
        let call = match (shape, a, b) {
            ("m16n8k16", Type::Bf16, Type::Bf16) => {
                "mma_m16n8k16(d_, a_, b_, c_, cuemu::Half::bf16, CUEMU_HERE)"
            }
            ("m16n8k16", Type::F16, Type::F16) => {
                "mma_m16n8k16(d_, a_, b_, c_, cuemu::Half::f16, CUEMU_HERE)"
            }
            ("m16n8k8", Type::Tf32, Type::Tf32) => "mma_m16n8k8_tf32(d_, a_, b_, c_, CUEMU_HERE)",
            _ => return Err("this shape with these types is not known to the emulator".to_owned()),
        };
        let lists = [
            vector(op.operand(0)?)?,
            vector(op.operand(1)?)?,
            vector(op.operand(2)?)?,
            vector(op.operand(3)?)?,
        ];
        for (list, length) in lists.iter().zip([4, 4, 2, 4]) {
            expect_length(list, length)?;
        }
        let d = self.pointers(lists[0], Type::F32)?;
        let (a, b) = (self.values(lists[1], Type::B32)?, self.values(lists[2], Type::B32)?);
        let c = self.values(lists[3], Type::F32)?;
        self.push(format!(
            "{{ float* d_[] = {{{d}}}; const uint32_t a_[] = {{{a}}}, b_[] = {{{b}}}; const float c_[] = {{{c}}}; \
             cuemu::{call}; }}"
        ));
        Ok(())
    }

    pub(super) fn wgmma(&mut self, op: &mut Op<'a, '_>) -> Result {
        let kind = op.take_one(&["fence", "commit_group", "wait_group", "mma_async"])?;
        op.take_one(&["sync"])?;
        op.take_one(&["aligned"])?;
        match kind {
            "fence" => self.push("cuemu::wgmma_fence(CUEMU_HERE);"),
            "commit_group" => self.push("cuemu::wgmma_commit(CUEMU_HERE);"),
            "wait_group" => {
                let groups = op.constant(0)?;
                self.push(format!("cuemu::wgmma_wait({groups}, CUEMU_HERE);"));
            }
            _ => return self.wgmma_multiply(op),
        }
        Ok(())
    }

    fn wgmma_multiply(&mut self, op: &mut Op<'a, '_>) -> Result {
        let shape = |m: &str| m.strip_prefix("m64n")?.strip_suffix("k16")?.parse::<usize>().ok();
        let n = op.take_parsed(shape).ok_or("only m64nNk16 is known to the emulator")?;
        let types = [op.take_type()?, op.take_type()?, op.take_type()?];
        let half = match types {
            [Type::Bf16, Type::Bf16, Type::F32] => "bf16",
            [Type::F16, Type::F16, Type::F32] => "f16",
            _ => return Err("these types are not known to the emulator here".to_owned()),
        };
        if n % 8 != 0 || !(8..=256).contains(&n) {
            return Err(format!("n = {n}"));
        }
        let accumulators = vector(op.operand(0)?)?;
        expect_length(accumulators, n / 2)?;
        let d = self.pointers(accumulators, Type::F32)?;
        // A in registers has no transposition.
        let (a_descriptor, a_registers) = match op.operand(1)? {
            Operand::Vector(registers) => {
                expect_length(registers, 4)?;
                ("0".to_owned(), Some(self.values(registers, Type::B32)?))
            }
            descriptor => (self.read(descriptor, Type::B64)?, None),
        };
        let b_descriptor = self.value(op, 2, Type::B64)?;
        let scale_d = self.value(op, 3, Type::Pred)?;
        let (negate_a, negate_b) = (sign(op.constant(4)?)?, sign(op.constant(5)?)?);
        let (transpose_a, next) =
            if a_registers.is_some() { (false, 6) } else { (flag(op.constant(6)?)?, 7) };
        let transpose_b = flag(op.constant(next)?)?;
        let (a_array, a_pointer) = match &a_registers {
            Some(values) => (format!("const uint32_t a_[] = {{{values}}}; "), "a_"),
            None => (String::new(), "nullptr"),
        };
        self.push(format!(
            "{{ float* d_[] = {{{d}}}; {a_array}const cuemu::Wgmma w_ = {{{n}, cuemu::Half::{half}, {a_descriptor}, \
             {b_descriptor}, {scale_d}, {negate_a}, {negate_b}, {transpose_a}, {transpose_b}}}; \
             cuemu::wgmma(d_, {a_pointer}, w_, CUEMU_HERE); }}"
        ));
        Ok(())
    }
}

/// `imm-scale`: 1 or −1.
fn sign(value: i64) -> Result<bool> {
    match value {
        1 => Ok(false),
        -1 => Ok(true),
        _ => Err(format!("a scale of {value}")),
    }
}

/// `imm-trans`: 0 or 1.
fn flag(value: i64) -> Result<bool> {
    match value {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(format!("a transposition of {value}")),
    }
}
