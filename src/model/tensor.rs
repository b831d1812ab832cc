//! A weight as it lies on disk, and what the model expects to find there.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Storage type of a weight. Everything is widened to the engine's type where it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16: the upper half of a float32.
    BF16,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
        })
    }
}

/// One tensor the model needs, by its name in the checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightSpec {
    /// Name in the checkpoint, e.g. `model.layers.0.mlp.up_proj.weight`.
    pub name: String,
    /// Expected shape, row-major: `[out, in]` for a matrix, `[n]` for a vector.
    pub shape: Vec<usize>,
    /// Where it is if there is no tensor of that name.
    pub elsewhere: Option<Elsewhere>,
}

/// A tensor, or a part of one, under another name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elsewhere {
    /// Name of the tensor in the checkpoint.
    pub name: String,
    /// Its whole shape.
    pub shape: Vec<usize>,
    /// Element at which the wanted part starts.
    pub first: usize,
}

/// A tensor's bytes where they lie (a mapped file or embedded data), row-major, little-endian.
///
/// Cloning shares the bytes. They may be unaligned: read them through `from_le_bytes`-style access.
#[derive(Clone)]
pub struct Tensor {
    /// Storage type.
    pub dtype: Dtype,
    /// Row-major shape.
    pub shape: Vec<usize>,
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
}

impl Tensor {
    /// A view of `owner[range]`. Returns `None` when the range is outside the owner or its length is not
    /// that of `shape` elements of `dtype`.
    pub fn new(
        dtype: Dtype,
        shape: Vec<usize>,
        owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
        range: Range<usize>,
    ) -> Option<Self> {
        let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
        let bytes = elements.checked_mul(dtype.size_bytes())?;
        let inside = (*owner).as_ref().get(range.clone())?;
        (inside.len() == bytes).then_some(Self { dtype, shape, owner, range })
    }

    /// A part of the elements, from `first` on, as a tensor of `shape`. `None` when it is not inside.
    pub fn part(&self, first: usize, shape: &[usize]) -> Option<Self> {
        let size = self.dtype.size_bytes();
        let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
        let start = self.range.start.checked_add(first.checked_mul(size)?)?;
        let end = start.checked_add(elements.checked_mul(size)?)?;
        (end <= self.range.end).then(|| Self {
            dtype: self.dtype,
            shape: shape.to_vec(),
            owner: Arc::clone(&self.owner),
            range: start..end,
        })
    }

    /// The bytes, row-major, little-endian, possibly unaligned.
    pub fn bytes(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.range.len() / self.dtype.size_bytes()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({}, {:?})", self.dtype, self.shape)
    }
}
