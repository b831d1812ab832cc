//! Pickle, just enough to hand Python a dict: `metadata` in the `.npz` files.
//!
//! Protocol 2, which every Python 3 reads. The array is not pickled the way NumPy does it (through a private module
//! that was renamed in NumPy 2.0) but as the call `numpy.array([dict], 'O')`, which every NumPy can make.

/// A Python value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// `None`
    None,
    /// `True`, `False`
    Bool(bool),
    /// `int`
    Int(i128),
    /// `float`; NaN and infinities are fine here
    Float(f64),
    /// `str`
    Str(String),
    /// `list`
    List(Vec<Value>),
    /// `dict`, in insertion order; keys are `Int` or `Str`
    Dict(Vec<(Value, Value)>),
}

impl From<&serde_json::Value> for Value {
    fn from(json: &serde_json::Value) -> Self {
        use serde_json::Value as Json;
        match json {
            Json::Null => Self::None,
            Json::Bool(value) => Self::Bool(*value),
            Json::Number(number) => match number.as_i128() {
                Some(value) => Self::Int(value),
                None => Self::Float(number.as_f64().unwrap_or(f64::NAN)),
            },
            Json::String(text) => Self::Str(text.clone()),
            Json::Array(items) => Self::List(items.iter().map(Self::from).collect()),
            Json::Object(map) => {
                Self::Dict(map.iter().map(|(key, value)| (Self::from(key.as_str()), value.into())).collect())
            }
        }
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Str(text.to_owned())
    }
}

impl From<usize> for Value {
    fn from(number: usize) -> Self {
        Self::Int(number as i128)
    }
}

impl From<Option<f64>> for Value {
    fn from(number: Option<f64>) -> Self {
        number.map_or(Self::None, Self::Float)
    }
}

/// The pickle of a NumPy object array of shape (1,) that holds `value`.
pub fn object_array(value: &Value) -> Vec<u8> {
    let mut out = b"\x80\x02cnumpy\narray\n(]".to_vec(); // protocol 2, the callable, a mark for its arguments, a list
    push(&mut out, value);
    out.push(b'a'); // append to the list
    push(&mut out, &Value::from("O"));
    out.extend(b"tR."); // arguments to a tuple, call, stop
    out
}

/// Appends the opcodes that leave `value` on the unpickler's stack.
fn push(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::None => out.push(b'N'),
        Value::Bool(true) => out.push(0x88),
        Value::Bool(false) => out.push(0x89),
        Value::Int(number) => push_int(out, *number),
        Value::Float(number) => {
            out.push(b'G'); // BINFLOAT is big-endian, unlike all other opcodes
            out.extend(number.to_be_bytes());
        }
        Value::Str(text) => {
            out.push(b'X'); // BINUNICODE: a length of 4 bytes, then UTF-8
            out.extend((text.len() as u32).to_le_bytes());
            out.extend(text.bytes());
        }
        Value::List(items) => {
            out.push(b']');
            if !items.is_empty() {
                out.push(b'(');
                items.iter().for_each(|item| push(out, item));
                out.push(b'e');
            }
        }
        Value::Dict(entries) => {
            out.push(b'}');
            if !entries.is_empty() {
                out.push(b'(');
                for (key, value) in entries {
                    push(out, key);
                    push(out, value);
                }
                out.push(b'u');
            }
        }
    }
}

/// The shortest of BININT1, BININT2, BININT and LONG1 that holds `number`.
fn push_int(out: &mut Vec<u8>, number: i128) {
    if let Ok(byte) = u8::try_from(number) {
        out.extend([b'K', byte]);
    } else if let Ok(short) = u16::try_from(number) {
        out.push(b'M');
        out.extend(short.to_le_bytes());
    } else if let Ok(int) = i32::try_from(number) {
        out.push(b'J');
        out.extend(int.to_le_bytes());
    } else {
        out.extend([0x8a, 16]); // LONG1: a count of bytes, then two's complement
        out.extend(number.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opcodes(value: impl Into<Value>) -> Vec<u8> {
        let mut out = Vec::new();
        push(&mut out, &value.into());
        out
    }

    #[test]
    fn ints_take_the_shortest_form() {
        assert_eq!(opcodes(0_usize), b"K\x00");
        assert_eq!(opcodes(255_usize), b"K\xff");
        assert_eq!(opcodes(256_usize), b"M\x00\x01");
        assert_eq!(opcodes(65_536_usize), b"J\x00\x00\x01\x00");
        assert_eq!(opcodes(Value::Int(-1)), b"J\xff\xff\xff\xff");
        assert_eq!(opcodes(1_usize << 31)[..2], [0x8a, 16]);
    }

    #[test]
    fn the_rest_of_the_opcodes() {
        assert_eq!(opcodes(Value::None), b"N");
        assert_eq!(opcodes(Some(2.0)), b"G\x40\x00\x00\x00\x00\x00\x00\x00");
        assert_eq!(opcodes("é"), b"X\x02\x00\x00\x00\xc3\xa9");
        assert_eq!(opcodes(Value::List(vec![])), b"]");
        assert_eq!(opcodes(Value::Dict(vec![])), b"}");
        assert_eq!(opcodes(&serde_json::json!([true, {"a": null}])), b"](\x88}(X\x01\x00\x00\x00aNue");
    }

    #[test]
    fn numbers_of_json_keep_their_kind() {
        assert_eq!(Value::from(&serde_json::json!(u64::MAX)), Value::Int(i128::from(u64::MAX)));
        assert_eq!(Value::from(&serde_json::json!(1.0)), Value::Float(1.0));
    }

    #[test]
    fn the_array_is_one_call() {
        assert_eq!(object_array(&Value::Dict(vec![])), b"\x80\x02cnumpy\narray\n(]}aX\x01\x00\x00\x00OtR.");
    }
}
