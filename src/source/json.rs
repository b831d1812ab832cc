//! JSON rows: one value in, the text of one column out; and the cutting of a `.json` file into such values.

use std::fmt;
use std::io::{BufRead, ErrorKind};

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::column::COLUMNS_SHOWN;

/// What a row holds in the wanted column.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Cell {
    /// A text; a null is an empty one.
    Text(String),
    /// A value that is neither: what it is instead.
    Other(&'static str),
    /// No such column: the row's columns.
    Missing(Vec<String>),
    /// The row is neither an object nor a string.
    NoRow(&'static str),
}

/// The text of `column` in the JSON object `row`; a bare string is a text itself.
pub(super) fn cell(row: &[u8], column: &str) -> serde_json::Result<Cell> {
    let mut json = serde_json::Deserializer::from_slice(row);
    let cell = Row { column }.deserialize(&mut json)?;
    json.end()?;
    Ok(cell)
}

/// A value of which only strings are kept, and null as the empty one.
enum Value {
    Text(String),
    Other(&'static str),
}

struct ValueVisitor;

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Self, D::Error> {
        json.deserialize_any(ValueVisitor)
    }
}

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }
    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(Value::Text(text.to_owned()))
    }
    fn visit_string<E>(self, text: String) -> Result<Value, E> {
        Ok(Value::Text(text))
    }
    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Text(String::new()))
    }
    fn visit_bool<E>(self, _: bool) -> Result<Value, E> {
        Ok(Value::Other("a boolean"))
    }
    fn visit_i64<E>(self, _: i64) -> Result<Value, E> {
        Ok(Value::Other("a number"))
    }
    fn visit_u64<E>(self, _: u64) -> Result<Value, E> {
        Ok(Value::Other("a number"))
    }
    fn visit_f64<E>(self, _: f64) -> Result<Value, E> {
        Ok(Value::Other("a number"))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Value::Other("an array"))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Value::Other("an object"))
    }
}

struct Row<'a> {
    column: &'a str,
}

impl<'de> DeserializeSeed<'de> for Row<'_> {
    type Value = Cell;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Cell, D::Error> {
        json.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Row<'_> {
    type Value = Cell;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }
    fn visit_str<E>(self, text: &str) -> Result<Cell, E> {
        Ok(Cell::Text(text.to_owned()))
    }
    fn visit_string<E>(self, text: String) -> Result<Cell, E> {
        Ok(Cell::Text(text))
    }
    fn visit_unit<E>(self) -> Result<Cell, E> {
        Ok(Cell::NoRow("null"))
    }
    fn visit_bool<E>(self, _: bool) -> Result<Cell, E> {
        Ok(Cell::NoRow("a boolean"))
    }
    fn visit_i64<E>(self, _: i64) -> Result<Cell, E> {
        Ok(Cell::NoRow("a number"))
    }
    fn visit_u64<E>(self, _: u64) -> Result<Cell, E> {
        Ok(Cell::NoRow("a number"))
    }
    fn visit_f64<E>(self, _: f64) -> Result<Cell, E> {
        Ok(Cell::NoRow("a number"))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Cell, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Cell::NoRow("an array"))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Cell, A::Error> {
        let mut columns = Vec::new();
        let mut text = None;
        while let Some(key) = map.next_key::<String>()? {
            if key == self.column {
                // Of a column given twice the last counts, as in Python.
                text = Some(map.next_value::<Value>()?);
            } else {
                map.next_value::<IgnoredAny>()?;
                if columns.len() < COLUMNS_SHOWN {
                    columns.push(key);
                }
            }
        }
        Ok(match text {
            Some(Value::Text(text)) => Cell::Text(text),
            Some(Value::Other(kind)) => Cell::Other(kind),
            None => Cell::Missing(columns),
        })
    }
}

/// Cuts a stream into its objects and strings: the elements of one array, or values one after the other.
#[derive(Debug, Default)]
pub(super) struct Cutter {
    /// Line (from 1, counting from 0 here) of the next byte.
    line: u64,
    state: State,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// Nothing seen: `[` opens an array.
    #[default]
    Start,
    /// Values one after the other.
    Loose,
    /// After `[`: a value or the end.
    Opened,
    /// After a value of the array: a comma or the end.
    AfterValue,
    /// After a comma: a value.
    AfterComma,
    /// After `]`.
    Closed,
}

/// What the cutter met.
pub(super) enum Cut {
    /// A value was put in the buffer; it starts on this line (from 1).
    Value(u64),
    /// The stream is over.
    End,
    /// Not JSON as we read it: the line (from 1) and what is wrong.
    Wrong(u64, String),
}

impl Cutter {
    /// The line (from 1) that is being read.
    pub fn line(&self) -> u64 {
        self.line + 1
    }

    /// Puts the next value's bytes in `value`.
    pub fn next(&mut self, bytes: &mut dyn BufRead, value: &mut Vec<u8>) -> std::io::Result<Cut> {
        value.clear();
        loop {
            let Some(byte) = peek(bytes)? else {
                return Ok(match self.state {
                    State::Start | State::Loose | State::Closed => Cut::End,
                    _ => Cut::Wrong(self.line(), "the file ends inside the array".into()),
                });
            };
            match (byte, self.state) {
                (b'\n', _) => self.line += 1,
                (b' ' | b'\t' | b'\r', _) => {}
                (b'[', State::Start) => self.state = State::Opened,
                (b']', State::Opened | State::AfterValue) => self.state = State::Closed,
                (b',', State::AfterValue) => self.state = State::AfterComma,
                (b'{' | b'"', State::Start | State::Loose | State::Opened | State::AfterComma) => {
                    self.state = match self.state {
                        State::Start | State::Loose => State::Loose,
                        _ => State::AfterValue,
                    };
                    let line = self.line();
                    return Ok(match self.take(bytes, value)? {
                        true => Cut::Value(line),
                        false => Cut::Wrong(line, "the file ends inside this value".into()),
                    });
                }
                (byte, state) => {
                    let expected = match state {
                        State::Start => "`[`, an object or a string",
                        State::Loose => "an object or a string",
                        State::Opened | State::AfterComma => "an object or a string in the array",
                        State::AfterValue => "`,` or `]`",
                        State::Closed => "nothing after `]`",
                    };
                    return Ok(Cut::Wrong(
                        self.line(),
                        format!("expected {expected}, found {:?}", char::from(byte)),
                    ));
                }
            }
            bytes.consume(1);
        }
    }

    /// Moves one object or string, whose first byte is next, into `value`; `false` where the stream ends first.
    fn take(&mut self, bytes: &mut dyn BufRead, value: &mut Vec<u8>) -> std::io::Result<bool> {
        let (mut depth, mut in_string, mut escaped) = (0_u64, false, false);
        loop {
            let buffer = match bytes.fill_buf() {
                Err(cause) if cause.kind() == ErrorKind::Interrupted => continue,
                other => other?,
            };
            if buffer.is_empty() {
                return Ok(false);
            }
            let mut end = None;
            for (i, &byte) in buffer.iter().enumerate() {
                match byte {
                    b'\n' => self.line += 1,
                    _ if escaped => {}
                    b'"' => in_string = !in_string,
                    b'{' | b'[' if !in_string => depth += 1,
                    b'}' | b']' if !in_string => depth = depth.saturating_sub(1),
                    _ => {}
                }
                escaped = in_string && !escaped && byte == b'\\';
                if depth == 0 && !in_string {
                    end = Some(i + 1);
                    break;
                }
            }
            let used = end.unwrap_or(buffer.len());
            value.extend_from_slice(&buffer[..used]);
            bytes.consume(used);
            if end.is_some() {
                return Ok(true);
            }
        }
    }
}

fn peek(bytes: &mut dyn BufRead) -> std::io::Result<Option<u8>> {
    loop {
        match bytes.fill_buf() {
            Err(cause) if cause.kind() == ErrorKind::Interrupted => {}
            Err(cause) => return Err(cause),
            Ok(buffer) => return Ok(buffer.first().copied()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_gives_its_column() {
        let text = |row: &str| cell(row.as_bytes(), "text").unwrap();
        assert_eq!(text(r#"{"id":[1,{"text":"no"}],"text":"a\n\u00e9"}"#), Cell::Text("a\né".into()));
        assert_eq!(text(r#""bare""#), Cell::Text("bare".into()));
        assert_eq!(text(r#"{"text":"a","text":"b"}"#), Cell::Text("b".into()));
        assert_eq!(text(r#"{"text":null}"#), Cell::Text(String::new()));
        assert_eq!(text("null"), Cell::NoRow("null"));
        assert_eq!(text(r#"{"text":["a"]}"#), Cell::Other("an array"));
        assert_eq!(text(r#"{"text":{"a":1.5}}"#), Cell::Other("an object"));
        assert_eq!(text(r#"{"b":1,"a":2}"#), Cell::Missing(vec!["b".into(), "a".into()]));
        assert_eq!(text("[1]"), Cell::NoRow("an array"));
        assert_eq!(text("-1"), Cell::NoRow("a number"));
        assert!(cell(br#"{"text":"a"} x"#, "text").is_err());
        assert!(cell(br#"{"text":"\ud800"}"#, "text").is_err());
    }

    fn cuts(file: &str, chunk: usize) -> Vec<String> {
        let mut bytes = std::io::BufReader::with_capacity(chunk, file.as_bytes());
        let (mut cutter, mut value, mut found) = (Cutter::default(), Vec::new(), Vec::new());
        loop {
            match cutter.next(&mut bytes, &mut value).unwrap() {
                Cut::Value(line) => found.push(format!("{line}:{}", String::from_utf8_lossy(&value))),
                Cut::End => return found,
                Cut::Wrong(line, what) => {
                    found.push(format!("{line}!{what}"));
                    return found;
                }
            }
        }
    }

    #[test]
    fn arrays_and_loose_values_are_cut_alike() {
        for chunk in [1, 2, 3, 64] {
            assert_eq!(
                cuts("[\n {\"a\": \"]}\\\"\"},\n\"x\\\\\" , {}\n]\n", chunk),
                ["2:{\"a\": \"]}\\\"\"}", "3:\"x\\\\\"", "3:{}"]
            );
            assert_eq!(cuts("{\"a\":\n[{}]}\n\n{}\"\"", chunk), ["1:{\"a\":\n[{}]}", "4:{}", "4:\"\""]);
            assert_eq!(cuts(" [ ] ", chunk), Vec::<String>::new());
            assert_eq!(cuts("", chunk), Vec::<String>::new());
        }
    }

    #[test]
    fn what_is_not_json_is_named() {
        assert_eq!(cuts("[{}\n{}]", 8), ["1:{}", "2!expected `,` or `]`, found '{'"]);
        assert_eq!(cuts("[{},]", 8)[1], "1!expected an object or a string in the array, found ']'");
        assert_eq!(cuts("[\n{}", 8)[1], "2!the file ends inside the array");
        assert_eq!(cuts("\n{\"a", 8), ["2!the file ends inside this value"]);
        assert_eq!(cuts("[]x", 8), ["1!expected nothing after `]`, found 'x'"]);
        assert_eq!(cuts("3", 8), ["1!expected `[`, an object or a string, found '3'"]);
    }
}
