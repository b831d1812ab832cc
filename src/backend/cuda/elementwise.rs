//! Sums, the gate of the MLP, copies of columns: `kernels/elementwise.cu`.

use std::ops::Range;

use super::launch::{Launch, Value, int};
use super::rows::Rows;
use super::{Activation, Buf, Cuda, Element, Format, Kernel, Real};
use crate::error::Result;

/// Threads of a block.
const THREADS: usize = 256;

/// Elements in a row, four at a time as far as that goes.
struct Flat {
    vectors: usize,
    count: usize,
}

impl Flat {
    /// `aligned`: every buffer starts where four elements may be moved together.
    fn new(count: usize, aligned: bool) -> Self {
        Self { vectors: if aligned { count / 4 } else { 0 }, count }
    }

    /// A launch without arguments.
    fn launch<'a>(&self, kernel: &'a Kernel) -> Launch<'a> {
        let pieces = self.count - 3 * self.vectors;
        Launch::new(kernel, pieces.div_ceil(THREADS), THREADS as u32)
    }

    /// The last two arguments.
    fn last_args<'a>(&self, launch: Launch<'a>) -> Launch<'a> {
        launch.arg("i64 vectors", self.vectors as i64).arg("i64 count", self.count as i64)
    }
}

/// Whether four elements from `element` on may be moved together.
fn aligned_at<T: Element>(buf: &Buf<T>, element: usize) -> bool {
    let size = size_of::<T>() as u64;
    (buf.address() + element as u64 * size).is_multiple_of(4 * size)
}

pub(super) fn aligned<T: Element>(buf: &Buf<T>) -> bool {
    aligned_at(buf, 0)
}

/// Where it lies on the device.
fn bytes_of<T: Element>(buf: &Buf<T>) -> Range<u64> {
    buf.address()..buf.address() + (buf.rows() * buf.width() * size_of::<T>()) as u64
}

fn shape<T: Element>(buf: &Buf<T>) -> (usize, usize) {
    (buf.rows(), buf.width())
}

impl Cuda {
    /// The same numbers as `T`, rounded to nearest. `[rows, width]`
    ///
    /// # Errors
    ///
    /// The device's memory is exhausted, or the driver fails.
    pub fn cast<F: Real, T: Real>(&self, x: &Buf<F>) -> Result<Buf<T>> {
        let mut out = Buf::new(&self.device.memory, x.rows(), x.width())?;
        self.copy_columns(x, 0..x.width(), &mut out, 0)?;
        Ok(out)
    }

    /// a + b, of one shape.
    ///
    /// # Errors
    ///
    /// As [`Cuda::cast`].
    ///
    /// # Panics
    ///
    /// The shapes differ.
    pub fn add(&self, a: &Buf<f32>, b: &Buf<f32>) -> Result<Buf<f32>> {
        let out = Buf::new(&self.device.memory, a.rows(), a.width())?;
        self.add_to(a, b, &out)?;
        Ok(out)
    }

    /// a += b, of one shape.
    ///
    /// # Errors
    ///
    /// The driver fails.
    ///
    /// # Panics
    ///
    /// As [`Cuda::add`].
    pub fn add_in_place(&self, a: &mut Buf<f32>, b: &Buf<f32>) -> Result<()> {
        self.add_to(a, b, a)
    }

    fn add_to(&self, a: &Buf<f32>, b: &Buf<f32>, out: &Buf<f32>) -> Result<()> {
        assert_eq!(shape(a), shape(b), "a sum of two shapes");
        let kernel = self.kernel("elementwise.cu", "add")?;
        let flat = Flat::new(a.rows() * a.width(), [a, b, out].into_iter().all(aligned));
        let launch =
            flat.launch(&kernel).arg("const float* a", a).arg("const float* b", b).arg("float* out", out);
        // SAFETY: all three have `count` elements; those of `vectors` start aligned in each.
        unsafe { flat.last_args(launch).on(&self.device.compute) }
    }

    /// act(gate)·up; gate and up `[N, I]` → `[N, I]`.
    ///
    /// # Errors
    ///
    /// As [`Cuda::cast`].
    ///
    /// # Panics
    ///
    /// The shapes differ.
    pub fn gate<A: Real>(&self, gate: &Buf<f32>, up: &Buf<f32>, activation: Activation) -> Result<Buf<A>> {
        assert_eq!(shape(up), shape(gate), "up has the shape of gate");
        let name = A::FORMAT.pick("gate_forward_f32", "gate_forward_bf16");
        let kernel = self.kernel("elementwise.cu", name)?;
        let out = Buf::new(&self.device.memory, gate.rows(), gate.width())?;
        let flat = Flat::new(gate.rows() * gate.width(), aligned(gate) && aligned(up));
        let launch = flat
            .launch(&kernel)
            .arg("const float* gate", gate)
            .arg("const float* up", up)
            .arg("int activation", activation as i32)
            .arg(A::FORMAT.pick("float* out", "bf16* out"), &out);
        // SAFETY: all three have `count` elements; those of `vectors` start aligned in each.
        unsafe { flat.last_args(launch).on(&self.device.compute) }?;
        Ok(out)
    }

    /// dgate += dout·up·act'(gate) and dup += dout·act(gate); all `[N, I]`. Gradients that are not given start at
    /// zero.
    ///
    /// # Errors
    ///
    /// As [`Cuda::cast`].
    ///
    /// # Panics
    ///
    /// The shapes differ.
    pub fn gate_backward(
        &self,
        gate: &Buf<f32>,
        up: &Buf<f32>,
        activation: Activation,
        dout: &Buf<f32>,
        [dgate, dup]: [Option<Buf<f32>>; 2],
    ) -> Result<[Buf<f32>; 2]> {
        let kernel = self.kernel("elementwise.cu", "gate_backward")?;
        // What a gradient holds so far is read where it is written.
        let so_far = [dgate.is_some(), dup.is_some()];
        let or_new = |buf: Option<Buf<f32>>| match buf {
            Some(buf) => Ok(buf),
            None => Buf::new(&self.device.memory, gate.rows(), gate.width()),
        };
        let [dgate, dup] = [or_new(dgate)?, or_new(dup)?];
        for (name, buf) in [("up", up), ("dout", dout), ("dgate", &dgate), ("dup", &dup)] {
            assert_eq!(shape(buf), shape(gate), "{name} has the shape of gate");
        }
        let whole = [gate, up, dout, &dgate, &dup].into_iter().all(aligned);
        let flat = Flat::new(gate.rows() * gate.width(), whole);
        let launch = flat
            .launch(&kernel)
            .arg("const float* gate", gate)
            .arg("const float* up", up)
            .arg("const float* dout", dout)
            .arg("int activation", activation as i32)
            .arg("const float* gate_addend", so_far[0].then_some(&dgate))
            .arg("float* dgate", &dgate)
            .arg("const float* up_addend", so_far[1].then_some(&dup))
            .arg("float* dup", &dup);
        // SAFETY: all have `count` elements; those of `vectors` start aligned in each.
        unsafe { flat.last_args(launch).on(&self.device.compute) }?;
        Ok([dgate, dup])
    }

    /// Copies columns of `source` `[N, W]` over those of `target` `[N, W']` that start at `first`, rounded to nearest.
    ///
    /// # Errors
    ///
    /// The driver fails.
    ///
    /// # Panics
    ///
    /// The numbers of rows differ, there are no such columns, or the buffers overlap.
    pub fn copy_columns<F: Real, T: Real>(
        &self,
        source: &Buf<F>,
        columns: Range<usize>,
        target: &mut Buf<T>,
        first: usize,
    ) -> Result<()> {
        let name = match (F::FORMAT, T::FORMAT) {
            (Format::F32, Format::F32) => "columns_f32_f32",
            (Format::F32, Format::Bf16) => "columns_f32_bf16",
            (Format::Bf16, Format::F32) => "columns_bf16_f32",
            (Format::Bf16, Format::Bf16) => "columns_bf16_bf16",
        };
        self.move_columns(name, source, columns, target, first)
    }

    /// Adds columns of `source` `[N, W]` to those of `target` `[N, W']` that start at `first`.
    ///
    /// # Errors
    ///
    /// As [`Cuda::copy_columns`].
    ///
    /// # Panics
    ///
    /// As there.
    pub fn add_columns<F: Real>(
        &self,
        source: &Buf<F>,
        columns: Range<usize>,
        target: &mut Buf<f32>,
        first: usize,
    ) -> Result<()> {
        self.move_columns(
            F::FORMAT.pick("columns_add_f32", "columns_add_bf16"),
            source,
            columns,
            target,
            first,
        )
    }

    fn move_columns<F: Real, T: Real>(
        &self,
        name: &'static str,
        source: &Buf<F>,
        columns: Range<usize>,
        target: &Buf<T>,
        first: usize,
    ) -> Result<()> {
        let (from, to) = (source.width(), target.width());
        assert_eq!(source.rows(), target.rows(), "columns of other numbers of rows");
        assert!(columns.start <= columns.end && columns.end <= from, "columns {columns:?} of {from}");
        assert!(first + columns.len() <= to, "{} columns from {first} on of {to}", columns.len());
        if columns.is_empty() || source.rows() == 0 {
            return Ok(());
        }
        let [read, written] = [bytes_of(source), bytes_of(target)];
        assert!(read.end <= written.start || written.end <= read.start, "columns within one buffer");
        let kernel = self.kernel("elementwise.cu", name)?;
        let together = [from, to, columns.len()].into_iter().all(|width| width.is_multiple_of(4))
            && aligned_at(source, columns.start)
            && aligned_at(target, first);
        let rows = Rows::new(source.rows(), columns.len() / if together { 4 } else { 1 });
        let launch = rows
            .launch(&kernel)
            .arg(
                F::FORMAT.pick("const float* source", "const bf16* source"),
                Value::at(source, columns.start),
            )
            .arg("int source_width", int(from))
            .arg(T::FORMAT.pick("float* target", "bf16* target"), Value::at(target, first))
            .arg("int target_width", int(to))
            .arg("i64 rows", rows.rows())
            .arg("int columns", int(columns.len()))
            .arg("int lanes", rows.lanes())
            .arg("int together", i32::from(together));
        // SAFETY: source is [rows, source_width] and target [rows, target_width], each with `columns` columns from
        // where its pointer starts; they are not the same memory; all groups of four are aligned if `together`.
        unsafe { launch.on(&self.device.compute) }
    }
}
