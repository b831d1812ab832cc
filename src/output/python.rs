//! Numbers spelled as Python spells them, because folder names and printed lines are compared with the scripts'.

/// `repr(number)` of a Python float: the shortest digits that read back as the same number; fixed notation for
/// exponents from -4 to 15, else scientific with at least two exponent digits (`0.5`, `2.0`, `1e-05`, `1e+16`).
pub fn float_repr(number: f64) -> String {
    if number.is_nan() {
        return "nan".to_owned();
    }
    if number.is_infinite() {
        return if number > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let scientific = format!("{number:e}");
    let Some((digits, exponent)) = scientific
        .split_once('e')
        .and_then(|(digits, exponent)| Some((digits, exponent.parse::<i32>().ok()?)))
    else {
        return scientific; // not reached: `{:e}` always has an exponent
    };
    if (-4..16).contains(&exponent) {
        return format!("{number:?}");
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

/// `str(list)` of Python floats: `[0.5, 1.0, 2.0]`.
pub fn list_repr(numbers: &[f64]) -> String {
    format!("[{}]", numbers.iter().map(|&number| float_repr(number)).collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_python_prints_them() {
        // Expected texts printed by CPython 3.12.
        for (number, expected) in [
            (0.5, "0.5"),
            (2.0, "2.0"),
            (0.1, "0.1"),
            (1.0 / 3.0, "0.3333333333333333"),
            (0.0001, "0.0001"),
            (0.00012345, "0.00012345"),
            (1e-5, "1e-05"),
            (1.5e-7, "1.5e-07"),
            (1e-100, "1e-100"),
            (1e15, "1000000000000000.0"),
            (123456789012345680.0, "1.2345678901234568e+17"),
            (9999999999999998.0, "9999999999999998.0"),
            (1e16, "1e+16"),
            (1.25e22, "1.25e+22"),
            (1.7976931348623157e308, "1.7976931348623157e+308"),
            (5e-324, "5e-324"),
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (-1e-5, "-1e-05"),
            (f64::INFINITY, "inf"),
            (f64::NAN, "nan"),
        ] {
            assert_eq!(float_repr(number), expected);
        }
        assert_eq!(list_repr(&[0.5, 1.0, 2.0]), "[0.5, 1.0, 2.0]");
        assert_eq!(list_repr(&[]), "[]");
    }
}
