//! The factor of attention scores, and soft-caps.

use super::keys::Keys;
use crate::error::Result;
use crate::model::arch::Architecture;

/// Factor of attention scores: 1/√Hd, or 1/√q where the architecture has a number q of its own.
pub(super) fn read_scale(keys: Keys<'_>, row: &Architecture, head_dim: usize) -> Result<f64> {
    let square = match row.attention_scalar {
        Some((key, default)) => keys.positive(key)?.unwrap_or(default),
        None => head_dim as f64,
    };
    Ok(square.sqrt().recip())
}

/// Soft-caps of attention scores and of logits; null means none.
pub(super) fn read_softcaps(keys: Keys<'_>, row: &Architecture) -> Result<(Option<f64>, Option<f64>)> {
    let Some(caps) = &row.softcaps else { return Ok((None, None)) };
    let read = |(key, default): (&str, Option<f64>)| match keys.get(key) {
        None => Ok(default),
        Some(value) if value.is_null() => Ok(None),
        Some(_) => keys.positive(key),
    };
    Ok((caps.attention.map(read).transpose()?.flatten(), read(caps.logits)?))
}
