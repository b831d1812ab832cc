//! Panics of libraries that assert properties of a file instead of checking them, turned into errors.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

thread_local! {
    /// Whether a panic of this thread is caught, and told as an error.
    static CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// What `f` gives, or what its panic said; the panic leaves no message of its own on stderr. What `f` changed must not
/// be used again after a panic.
pub(super) fn caught<T>(f: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let others = take_hook();
        set_hook(Box::new(move |panic| {
            if !CAUGHT.get() {
                others(panic);
            }
        }));
    });
    let outer = CAUGHT.replace(true);
    let result = catch_unwind(AssertUnwindSafe(f));
    CAUGHT.set(outer);
    result.map_err(|panic| message(panic.as_ref()))
}

/// What a panic said.
pub(super) fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
    text.unwrap_or("an unknown failure").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_are_told() {
        assert_eq!(caught(|| 1), Ok(1));
        assert_eq!(caught(|| -> u8 { panic!("words") }), Err("words".into()));
        assert_eq!(caught(|| -> u8 { panic!("a {}", 1) }), Err("a 1".into()));
        // The inner call leaves the outer one's state as it was.
        assert_eq!(caught(|| caught(|| -> u8 { panic!("in") })), Ok(Err("in".into())));
        assert!(!CAUGHT.get());
    }
}
