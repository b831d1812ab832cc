//! The driver API.
