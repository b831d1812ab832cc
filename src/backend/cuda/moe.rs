//! Mixtures of experts, all but their products: `kernels/moe.cu`.

use super::elementwise::aligned;
use super::launch::{Launch, int};
use super::rows::Rows;
use super::{Buf, Cuda, Format, Kernel, Real};
use crate::error::Result;

/// Threads of a block, and tokens that are counted together.
const THREADS: usize = 256;
/// An expert's rows start on a multiple of it: no tile of a product is of two experts.
const SEGMENT: usize = 128;
/// Rows of an entry of [`Routing::experts`], `EXPERT_ROWS` in `kernels/common.cuh`.
const EXPERT_ROWS: usize = 64;
/// Most experts that the kernels choose from.
pub const MAX_EXPERTS: usize = 256;

/// Which rows are whose: R rows sorted by expert, inside an expert by token, each expert's from a multiple of 128 on.
/// The device alone knows how many each has; R is enough for any number. A token's experts are in ascending order,
/// j = 0 … k − 1.
pub struct Routing {
    /// Row of a token for its j-th expert. `[N, k]`
    pub row_of: Buf<i32>,
    /// n·k + j of a row, −1 where it is nobody's. `[1, R]`
    pub slots: Buf<i32>,
    /// Expert of each 64 rows, −1 where none of them is anybody's; then how many rows are in use, a multiple of 128.
    /// `[1, R / 64 + 1]`
    pub experts: Buf<i32>,
    /// E.
    count: usize,
}

impl Routing {
    /// R for N tokens that choose k of E experts each.
    pub fn rows_for(tokens: usize, top_k: usize, experts: usize) -> usize {
        (tokens * top_k + experts * (SEGMENT - 1)).next_multiple_of(SEGMENT)
    }

    /// R at most, of a pass's chunks together too: what tokens and what experts take.
    pub(super) fn most_rows(tokens: usize, top_k: usize, experts: usize) -> usize {
        tokens * top_k + (experts + 1) * (SEGMENT - 1)
    }

    /// N.
    pub fn tokens(&self) -> usize {
        self.row_of.rows()
    }

    /// k.
    pub fn top_k(&self) -> usize {
        self.row_of.width()
    }

    /// E.
    pub fn expert_count(&self) -> usize {
        self.count
    }

    /// R.
    pub fn rows(&self) -> usize {
        self.slots.width()
    }
}

/// Checks an array's shape.
///
/// # Panics
///
/// It has another.
fn assert_size<T: super::Element>(buf: &Buf<T>, rows: usize, width: usize, what: &str) {
    assert_eq!((buf.rows(), buf.width()), (rows, width), "a mixture's {what}");
}

/// `rows` rows of `width`, four neighbours at a time, by a few threads each. Bits depend on the width alone.
struct Wide {
    rows: Rows,
    width: usize,
    /// Whether four neighbours are one access.
    together: bool,
}

impl Wide {
    /// `aligned`: every buffer starts where four elements may be moved together.
    fn new(rows: usize, width: usize, aligned: bool) -> Self {
        let together = aligned && width.is_multiple_of(4);
        Self { rows: Rows::new(rows, width.div_ceil(4)), width, together }
    }

    fn launch<'a>(&self, kernel: &'a Kernel) -> Launch<'a> {
        self.rows.launch(kernel)
    }

    /// The last arguments; `rows`: how the kernel declares their number.
    fn last_args<'a>(&self, launch: Launch<'a>, rows: &'static str) -> Launch<'a> {
        launch
            .arg(rows, self.rows.rows())
            .arg("int width", int(self.width))
            .arg("int lanes", self.rows.lanes())
            .arg("int together", i32::from(self.together))
    }
}

impl Cuda {
    /// The experts of each token: those of its k largest logits, of equal ones the lower expert, and their scores,
    /// softmax over these k. NaN counts as the largest, so that it stays visible. Does not wait for the device.
    /// logits `[N, E]` → scores `[N, k]`
    ///
    /// # Errors
    ///
    /// The device's memory is exhausted, the kernels cannot be had, or the driver refuses a launch.
    ///
    /// # Panics
    ///
    /// Not 1 ≤ k ≤ E ≤ 256.
    pub fn route(&self, logits: &Buf<f32>, top_k: usize) -> Result<(Buf<f32>, Routing)> {
        let (tokens, count) = (logits.rows(), logits.width());
        assert!((1..=count).contains(&top_k) && count <= MAX_EXPERTS, "{top_k} of {count} experts");
        let (memory, rows) = (&self.device.memory, Routing::rows_for(tokens, top_k, count));
        let scores = Buf::new(memory, tokens, top_k)?;
        let routing = Routing {
            row_of: Buf::new(memory, tokens, top_k)?,
            slots: Buf::new(memory, 1, rows)?,
            experts: Buf::new(memory, 1, rows / EXPERT_ROWS + 1)?,
            count,
        };
        let chunks = tokens.div_ceil(THREADS).max(1);
        let counts = Buf::<i32>::new(memory, chunks + 1, count)?;
        let [choose, place, scatter] =
            ["route_choose", "route_place", "route_scatter"].map(|name| self.kernel("moe.cu", name));
        let (choose, place, scatter) = (choose?, place?, scatter?);
        let choose = Launch::new(&choose, chunks, THREADS as u32)
            .arg("const float* logits", logits)
            .arg("int tokens", int(tokens))
            .arg("int experts", int(count))
            .arg("int top_k", int(top_k))
            .arg("int lanes", int(count.next_power_of_two().min(32)))
            .arg("float* scores", &scores)
            .arg("int* row_of", &routing.row_of)
            .arg("int* counts", &counts)
            .arg("int* slots", &routing.slots)
            .arg("int capacity", int(rows));
        let place = Launch::new(&place, 1, THREADS as u32)
            .arg("int* counts", &counts)
            .arg("int chunks", int(chunks))
            .arg("int expert_count", int(count))
            .arg("int* experts", &routing.experts)
            .arg("int capacity", int(rows));
        let scatter = Launch::new(&scatter, chunks, THREADS as u32)
            .arg("const int* counts", &counts)
            .arg("int tokens", int(tokens))
            .arg("int experts", int(count))
            .arg("int top_k", int(top_k))
            .arg("int* row_of", &routing.row_of)
            .arg("int* slots", &routing.slots);
        // SAFETY: the arrays were made for these sizes; the rows of all tokens for all their experts, each expert's
        // from a multiple of 128 on, are below R.
        unsafe {
            choose.on(&self.device.compute)?;
            place.on(&self.device.compute)?;
            scatter.on(&self.device.compute)?;
        }
        Ok((scores, routing))
    }

    /// dlogits += s_j·(ds_j − Σᵢ sᵢ·dsᵢ) at each token's experts, in place; `None`: there is nothing so far, 0 at the
    /// others. scores, dscores `[N, k]` → `[N, E]`
    ///
    /// # Errors
    ///
    /// As [`Cuda::route`].
    ///
    /// # Panics
    ///
    /// The shapes do not match.
    pub fn route_backward(
        &self,
        scores: &Buf<f32>,
        routing: &Routing,
        dscores: &Buf<f32>,
        dlogits: Option<Buf<f32>>,
    ) -> Result<Buf<f32>> {
        let (tokens, top_k, count) = (routing.tokens(), routing.top_k(), routing.count);
        assert_size(scores, tokens, top_k, "scores");
        assert_size(dscores, tokens, top_k, "gradient of scores");
        dlogits.iter().for_each(|dlogits| assert_size(dlogits, tokens, count, "gradient of logits"));
        let addend = dlogits.as_ref().map(Buf::share);
        let dlogits = dlogits.map_or_else(|| Buf::new(&self.device.memory, tokens, count), Ok)?;
        let kernel = self.kernel("moe.cu", "route_backward")?;
        let launch = Launch::new(&kernel, (tokens * count).div_ceil(THREADS), THREADS as u32)
            .arg("const float* scores", scores)
            .arg("const float* dscores", dscores)
            .arg("const int* row_of", &routing.row_of)
            .arg("const int* experts", &routing.experts)
            .arg("int tokens", int(tokens))
            .arg("int expert_count", int(count))
            .arg("int top_k", int(top_k))
            .arg("const float* addend", addend.as_ref())
            .arg("float* dlogits", &dlogits);
        // SAFETY: the shapes were compared; the routing's rows are below R.
        unsafe { launch.on(&self.device.compute) }?;
        Ok(dlogits)
    }

    /// Each expert's tokens: x's row of the token that a row is of, 0 where it is nobody's. x `[N, D]` → `[R, D]`
    ///
    /// # Errors
    ///
    /// As [`Cuda::route`].
    ///
    /// # Panics
    ///
    /// As [`Cuda::route_backward`].
    pub fn dispatch<X: Real>(&self, x: &Buf<X>, routing: &Routing) -> Result<Buf<X>> {
        let width = x.width();
        assert_size(x, routing.tokens(), width, "input");
        let out = Buf::new(&self.device.memory, routing.rows(), width)?;
        let kernel = self.kernel("moe.cu", X::FORMAT.pick("dispatch_f32", "dispatch_bf16"))?;
        let wide = Wide::new(routing.rows(), width, aligned(x));
        let launch = wide
            .launch(&kernel)
            .arg(X::FORMAT.pick("const float* x", "const bf16* x"), x)
            .arg("const int* slots", &routing.slots)
            .arg("int top_k", int(routing.top_k()))
            .arg(X::FORMAT.pick("float* out", "bf16* out"), &out);
        // SAFETY: x is [N, width] and out [R, width], slots [R] and below N·k; aligned where it is `together`.
        unsafe { wide.last_args(launch, "i64 rows").on(&self.device.compute) }?;
        Ok(out)
    }

    /// dx += Σ_j drows of a token's rows, j upwards, in place; `None`: there is nothing so far. drows `[R, D]` →
    /// `[N, D]`
    ///
    /// # Errors
    ///
    /// As [`Cuda::route`].
    ///
    /// # Panics
    ///
    /// As [`Cuda::route_backward`].
    pub fn dispatch_backward<X: Real>(
        &self,
        drows: &Buf<X>,
        routing: &Routing,
        dx: Option<Buf<f32>>,
    ) -> Result<Buf<f32>> {
        self.gather(drows, None, routing, dx)
    }

    /// The experts' outputs by their scores: out\[n\] = Σ_j scores\[n, j\] · rows of the token, j upwards.
    /// rows `[R, D]` · scores `[N, k]` → `[N, D]`
    ///
    /// # Errors
    ///
    /// As [`Cuda::route`].
    ///
    /// # Panics
    ///
    /// As [`Cuda::route_backward`].
    pub fn combine<Y: Real>(&self, rows: &Buf<Y>, scores: &Buf<f32>, routing: &Routing) -> Result<Buf<f32>> {
        assert_size(scores, routing.tokens(), routing.top_k(), "scores");
        self.gather(rows, Some(scores), routing, None)
    }

    /// `scores`: `None` for ones.
    fn gather<Y: Real>(
        &self,
        rows: &Buf<Y>,
        scores: Option<&Buf<f32>>,
        routing: &Routing,
        out: Option<Buf<f32>>,
    ) -> Result<Buf<f32>> {
        let (tokens, width) = (routing.tokens(), rows.width());
        assert_size(rows, routing.rows(), width, "rows");
        out.iter().for_each(|out| assert_size(out, tokens, width, "gradient of the input"));
        let addend = out.as_ref().map(Buf::share);
        let out = out.map_or_else(|| Buf::new(&self.device.memory, tokens, width), Ok)?;
        let kernel = self.kernel("moe.cu", Y::FORMAT.pick("gather_f32", "gather_bf16"))?;
        let wide = Wide::new(tokens, width, aligned(rows) && aligned(&out));
        let launch = wide
            .launch(&kernel)
            .arg(Y::FORMAT.pick("const float* rows", "const bf16* rows"), rows)
            .arg("const float* scores", scores)
            .arg("const int* row_of", &routing.row_of)
            .arg("int top_k", int(routing.top_k()))
            .arg("const float* addend", addend.as_ref())
            .arg("float* out", &out);
        // SAFETY: rows is [R, width] and out [N, width], scores and row_of [N, k], the latter below R; aligned where it
        // is `together`.
        unsafe { wide.last_args(launch, "i64 tokens").on(&self.device.compute) }?;
        Ok(out)
    }

    /// The gradients of [`Cuda::combine`]: drows = score · dout of a row's token, rounded once, 0 where it is nobody's;
    /// dscores\[n, j\] = ⟨row, dout\[n\]⟩, added in an order that the width alone decides.
    /// rows `[R, D]` · scores `[N, k]` · dout `[N, D]` → drows `[R, D]`, dscores `[N, k]`. Rows of bfloat16 have a
    /// gradient of bfloat16.
    ///
    /// # Errors
    ///
    /// As [`Cuda::route`].
    ///
    /// # Panics
    ///
    /// As [`Cuda::route_backward`], or rows are bfloat16 and the gradient is to be float32.
    pub fn combine_backward<Y: Real, A: Real>(
        &self,
        rows: &Buf<Y>,
        scores: &Buf<f32>,
        routing: &Routing,
        dout: &Buf<f32>,
    ) -> Result<(Buf<A>, Buf<f32>)> {
        let (tokens, top_k, width) = (routing.tokens(), routing.top_k(), rows.width());
        assert_size(rows, routing.rows(), width, "rows");
        assert_size(scores, tokens, top_k, "scores");
        assert_size(dout, tokens, width, "gradient of the output");
        let name = match (Y::FORMAT, A::FORMAT) {
            (Format::F32, Format::F32) => "combine_backward_f32_f32",
            (Format::F32, Format::Bf16) => "combine_backward_f32_bf16",
            (Format::Bf16, Format::Bf16) => "combine_backward_bf16_bf16",
            (Format::Bf16, Format::F32) => panic!("rows of bfloat16 with a gradient of float32"),
        };
        let kernel = self.kernel("moe.cu", name)?;
        let drows = Buf::<A>::new(&self.device.memory, routing.rows(), width)?;
        let dscores = Buf::new(&self.device.memory, tokens, top_k)?;
        let wide = Wide::new(routing.rows(), width, aligned(rows) && aligned(dout));
        let launch = wide
            .launch(&kernel)
            .arg(Y::FORMAT.pick("const float* rows", "const bf16* rows"), rows)
            .arg("const float* scores", scores)
            .arg("const float* dout", dout)
            .arg("const int* slots", &routing.slots)
            .arg("int top_k", int(top_k))
            .arg(A::FORMAT.pick("float* drows", "bf16* drows"), &drows)
            .arg("float* dscores", &dscores);
        // SAFETY: rows and drows are [R, width], dout [N, width], scores and dscores [N, k], slots [R] and below N·k;
        // aligned where it is `together`.
        unsafe { wide.last_args(launch, "i64 capacity").on(&self.device.compute) }?;
        Ok((drows, dscores))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_enough_for_any_choice() {
        let used =
            |counts: &[usize]| counts.iter().map(|count| count.next_multiple_of(SEGMENT)).sum::<usize>();
        for counts in
            [vec![0, 0], vec![1, 0], vec![1, 1, 1], vec![129, 127, 0], vec![128; 4], vec![257, 1, 1]]
        {
            let rows = Routing::rows_for(counts.iter().sum(), 1, counts.len());
            assert!(used(&counts) <= rows && rows.is_multiple_of(SEGMENT), "{counts:?}: {rows}");
            assert!(rows <= Routing::most_rows(counts.iter().sum(), 1, counts.len()));
        }
        assert_eq!(Routing::rows_for(0, 2, 8), 1024);
        assert_eq!(Routing::rows_for(8192, 2, 8), 17_408);
    }
}
