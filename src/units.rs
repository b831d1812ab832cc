//! Numbers as people read them: in errors, plans and tables.

/// A count with separators: `494,032,768`.
pub fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A size, in the largest binary unit of which there is at least one: `5.2 GiB`.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut size = bytes as f64;
    let mut unit = 0;
    while size >= 1024.0 && unit + 1 < UNITS.len() {
        size /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{size:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn separators_and_units() {
        assert_eq!([0, 999, 1000, 494_032_768].map(thousands), ["0", "999", "1,000", "494,032,768"]);
        assert_eq!([0, 1023, 1024, 5_583_457_485].map(size), ["0 B", "1023 B", "1.0 KiB", "5.2 GiB"]);
    }
}
