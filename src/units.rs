//! Numbers as people read them: in errors, plans, tables and names.

use std::cmp::Ordering;

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

/// Compares names as people do: runs of digits by value, the rest by character.
pub fn natural(a: &str, b: &str) -> Ordering {
    let (mut rest_a, mut rest_b) = (a, b);
    loop {
        let (Some(x), Some(y)) = (rest_a.chars().next(), rest_b.chars().next()) else {
            // Equal as numbers, yet `01` and `1` are two files: fall back on the bytes.
            return rest_a.len().cmp(&rest_b.len()).then_with(|| a.cmp(b));
        };
        let order = if x.is_ascii_digit() && y.is_ascii_digit() {
            let (run_a, after_a) = digits(rest_a);
            let (run_b, after_b) = digits(rest_b);
            (rest_a, rest_b) = (after_a, after_b);
            run_a.len().cmp(&run_b.len()).then_with(|| run_a.cmp(run_b))
        } else {
            (rest_a, rest_b) = (&rest_a[x.len_utf8()..], &rest_b[y.len_utf8()..]);
            x.cmp(&y)
        };
        if order != Ordering::Equal {
            return order;
        }
    }
}

/// The leading run of digits without its zeros, and what follows it.
fn digits(text: &str) -> (&str, &str) {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    (text[..end].trim_start_matches('0'), &text[end..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn separators_and_units() {
        assert_eq!([0, 999, 1000, 494_032_768].map(thousands), ["0", "999", "1,000", "494,032,768"]);
        assert_eq!([0, 1023, 1024, 5_583_457_485].map(size), ["0 B", "1023 B", "1.0 KiB", "5.2 GiB"]);
    }

    #[test]
    fn numbers_sort_by_value() {
        let mut names = ["p10", "p2", "p1", "p01", "p", "q0", "p2b", "p02a", "p99999999999999999999999"];
        names.sort_by(|a, b| natural(a, b));
        assert_eq!(names, ["p", "p01", "p1", "p2", "p02a", "p2b", "p10", "p99999999999999999999999", "q0"]);
    }
}
