//! The arguments of driver functions, as C hands them over.
//!
//! One rule stands for every function of the driver, and makes it `unsafe` to call: a pointer argument is
//! null or valid for what cuda.h says the function does with it. The types below check for null and do the
//! rest, so that the functions themselves touch no raw pointer.

use std::ffi::{CStr, c_char};

use super::error::{Error, Result};

/// `CUcontext`, `CUstream`, `CUevent`, `CUmodule`, `CUfunction`, `CUmemoryPool`: numbers as wide as pointers,
/// all different, which nobody dereferences.
pub(super) type Handle = usize;

/// `CUdeviceptr`.
pub(super) type DevicePtr = u64;

/// Where a driver function writes a result.
#[repr(transparent)]
pub(super) struct Out<T>(*mut T);

impl<T> Out<T> {
    /// Writes `value`. An error if there is nowhere to write to.
    pub(super) fn put(&self, value: T) -> Result<()> {
        if self.0.is_null() {
            return Err(Error::invalid("the pointer to write the result to is null"));
        }
        self.put_if_wanted(value);
        Ok(())
    }

    /// Writes `value` if the pointer is not null.
    pub(super) fn put_if_wanted(&self, value: T) {
        if !self.0.is_null() {
            // SAFETY: not null, so valid for writes of a `T` (the rule above).
            unsafe { self.0.write_unaligned(value) }
        }
    }

    /// The same place, for a value of another type (`void*` arguments).
    pub(super) fn cast<U>(&self) -> Out<U> {
        Out(self.0.cast())
    }

    /// The address.
    pub(super) fn address(&self) -> usize {
        self.0 as usize
    }
}

impl Out<u8> {
    /// Host memory of the program, by its address.
    pub(super) fn at_address(address: u64) -> Self {
        Self(address as *mut u8)
    }

    /// Writes as much of `text` as fits `bytes`, and a zero.
    pub(super) fn put_text(&self, text: &str, bytes: usize) -> Result<()> {
        if self.0.is_null() || bytes == 0 {
            return Err(Error::invalid("there is no room for a text"));
        }
        let length = text.len().min(bytes - 1);
        // SAFETY: not null, so valid for writes of `bytes` bytes (the rule above).
        unsafe {
            self.0.copy_from_nonoverlapping(text.as_ptr(), length);
            self.0.add(length).write(0);
        }
        Ok(())
    }
}

/// What a driver function reads: one value, or several behind each other.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(super) struct In<T>(*const T);

impl<T: Copy> In<T> {
    pub(super) fn null() -> Self {
        Self(std::ptr::null())
    }

    pub(super) fn is_null(&self) -> bool {
        self.0.is_null()
    }

    pub(super) fn address(&self) -> usize {
        self.0 as usize
    }

    /// Value number `index`.
    pub(super) fn at(&self, index: usize) -> Result<T> {
        if self.0.is_null() {
            return Err(Error::invalid("a pointer to an argument is null"));
        }
        // SAFETY: not null, so valid for reads of as many values as the function reads (the rule above).
        Ok(unsafe { self.0.add(index).read_unaligned() })
    }
}

impl In<u8> {
    /// Host memory of the program, by its address.
    pub(super) fn at_address(address: u64) -> Self {
        Self(address as *const u8)
    }

    /// The same bytes, as a string that ends with a zero.
    pub(super) fn cast(self) -> In<c_char> {
        In(self.0.cast())
    }

    /// The first `count` bytes.
    pub(super) fn bytes(&self, count: usize) -> Result<Vec<u8>> {
        if count == 0 {
            return Ok(Vec::new());
        }
        if self.0.is_null() {
            return Err(Error::invalid("a pointer to host memory is null"));
        }
        // SAFETY: not null, so valid for reads of `count` bytes (the rule above).
        Ok(unsafe { std::slice::from_raw_parts(self.0, count) }.to_vec())
    }
}

impl In<c_char> {
    /// The string, which ends with a zero.
    pub(super) fn text(&self) -> Result<&CStr> {
        if self.0.is_null() {
            return Err(Error::invalid("a pointer to a string is null"));
        }
        // SAFETY: not null, so a string that ends with a zero (the rule above), which lives as long as the call.
        Ok(unsafe { CStr::from_ptr(self.0) })
    }
}
