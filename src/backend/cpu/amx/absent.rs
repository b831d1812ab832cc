//! The tile unit where there is none: the types of `amx.rs`, without values.

use std::convert::Infallible;
use std::marker::PhantomData;
use std::ops::Range;

use crate::model::Dtype;

/// Proof that this process may use the tile unit: there is none.
#[derive(Clone, Copy, Debug)]
pub struct Amx(Infallible);

impl Amx {
    /// Always `None`.
    pub fn get() -> Option<Self> {
        None
    }
}

/// A stored matrix: whole rows of `width` elements, little-endian, at any address.
#[derive(Clone, Copy)]
#[allow(dead_code, reason = "read on the processors that have the unit")]
pub struct Stored<'a> {
    /// The elements.
    pub bytes: &'a [u8],
    /// Their encoding.
    pub dtype: Dtype,
    /// Elements of a row.
    pub width: usize,
}

/// The left operand of a product.
pub struct Left<'a>(Amx, PhantomData<&'a [f32]>);

impl<'a> Left<'a> {
    /// Floats that [`Left::new`] needs as its space.
    pub fn space(_: usize, _: usize) -> usize {
        0
    }

    /// Cannot be called.
    pub fn new(amx: Amx, _: &[f32], _: usize, _: usize, _: &'a mut [f32]) -> Self {
        Self(amx, PhantomData)
    }

    /// Cannot be called.
    pub fn rows(&self) -> usize {
        match self.0.0 {}
    }

    /// Cannot be called.
    pub fn part(&self, _: Range<usize>) -> Left<'a> {
        match self.0.0 {}
    }
}

/// The right operand of a product.
pub struct Right<'a>(Amx, PhantomData<&'a [f32]>);

impl<'a> Right<'a> {
    /// Floats that the constructors need as their space.
    pub fn space(_: Dtype, _: usize, _: usize) -> usize {
        0
    }

    /// Cannot be called.
    pub fn from_rows(amx: Amx, _: Stored<'_>, _: Range<usize>, _: &'a mut [f32]) -> Self {
        Self(amx, PhantomData)
    }

    /// Cannot be called.
    pub fn from_columns(amx: Amx, _: Stored<'_>, _: Range<usize>, _: &'a mut [f32]) -> Self {
        Self(amx, PhantomData)
    }
}

/// Cannot be called.
///
/// # Safety
/// None is needed.
pub unsafe fn multiply(
    left: &Left<'_>,
    right: &Right<'_>,
    _: *mut f32,
    _: (usize, usize),
    _: usize,
    _: bool,
) {
    match (left.0.0, right.0.0) {}
}
