//! Files as others read them: pinned bytes, round trips, complete folders or none, and NumPy itself.

#[path = "formats/bytes.rs"]
mod bytes;
#[path = "formats/delivery.rs"]
mod delivery;
#[path = "formats/numpy.rs"]
mod numpy;
#[path = "formats/record.rs"]
mod record;
#[path = "formats/texts.rs"]
mod texts;
