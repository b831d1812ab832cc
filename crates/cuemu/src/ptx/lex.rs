//! PTX text → tokens.

/// What a token is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind<'a> {
    /// A name: register, label, symbol, or an opcode with all its modifiers.
    Word(&'a str),
    /// `.name`, without its dot, where it does not continue a word.
    Directive(&'a str),
    /// A number of any form.
    Number(&'a str),
    /// What stands between quotes.
    Text(&'a str),
    /// Any other character.
    Mark(char),
}

/// A token and where it stands.
#[derive(Clone, Copy, Debug)]
pub struct Token<'a> {
    /// Its kind and text.
    pub kind: Kind<'a>,
    /// Line, from 1.
    pub line: usize,
    /// Byte offset of its first character.
    pub start: usize,
    /// Byte offset after its last one.
    pub end: usize,
}

fn starts_word(c: u8) -> bool {
    c.is_ascii_alphabetic() || matches!(c, b'_' | b'$' | b'%')
}

fn continues_word(c: u8) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, b'_' | b'$')
}

/// The tokens of `source`, comments left out.
pub fn tokens(source: &str) -> Vec<Token<'_>> {
    let bytes = source.as_bytes();
    let at = |i: usize| bytes.get(i).copied().unwrap_or(0);
    let run = |mut i: usize| {
        while continues_word(at(i)) {
            i += 1;
        }
        i
    };
    let mut found = Vec::new();
    let (mut i, mut line) = (0, 1);
    while i < bytes.len() {
        let start = i;
        let first_line = line;
        let kind = match bytes[i] {
            b'\n' => {
                line += 1;
                i += 1;
                continue;
            }
            c if c.is_ascii_whitespace() => {
                i += 1;
                continue;
            }
            b'/' if at(i + 1) == b'/' => {
                while i < bytes.len() && bytes[i] != b'\n' {
                    i += 1;
                }
                continue;
            }
            b'/' if at(i + 1) == b'*' => {
                let end = source[i + 2..].find("*/").map_or(bytes.len(), |n| i + n + 4);
                line += bytes[i..end].iter().filter(|&&c| c == b'\n').count();
                i = end;
                continue;
            }
            b'"' => {
                let end = source[i + 1..].find('"').map_or(bytes.len(), |n| i + 1 + n);
                line += bytes[i..end].iter().filter(|&&c| c == b'\n').count();
                i = (end + 1).min(bytes.len());
                Kind::Text(&source[start + 1..end])
            }
            b'.' if starts_word(at(i + 1)) => {
                i = run(i + 1);
                Kind::Directive(&source[start + 1..i])
            }
            c if c.is_ascii_digit() => {
                i = number_end(bytes, i);
                Kind::Number(&source[start..i])
            }
            c if starts_word(c) => {
                i = run(i + 1);
                loop {
                    if at(i) == b'.' && continues_word(at(i + 1)) {
                        i = run(i + 1);
                    } else if at(i) == b':' && at(i + 1) == b':' && continues_word(at(i + 2)) {
                        i = run(i + 2);
                    } else {
                        break;
                    }
                }
                Kind::Word(&source[start..i])
            }
            _ => {
                let c = source[i..].chars().next().unwrap_or(' ');
                i += c.len_utf8();
                Kind::Mark(c)
            }
        };
        found.push(Token { kind, line: first_line, start, end: i });
    }
    found
}

/// Where the number that starts at `i` ends.
fn number_end(bytes: &[u8], mut i: usize) -> usize {
    let start = i;
    let at = |i: usize| bytes.get(i).copied().unwrap_or(0);
    let prefixed = at(i) == b'0' && at(i + 1).is_ascii_alphabetic();
    while at(i).is_ascii_alphanumeric()
        || (!prefixed && at(i) == b'.')
        || (!prefixed && i > start && matches!(at(i), b'+' | b'-') && matches!(at(i - 1), b'e' | b'E'))
    {
        i += 1;
    }
    i
}

#[cfg(test)]
mod tests {
    use super::{Kind, tokens};

    #[test]
    fn words_hold_opcodes_and_special_registers() {
        let text = "W: @!%p1 cp.x.shared::cluster.2d [%rd1+-4], %tid.x, 0f3F800000; // c\n.loc 1 2 3";
        let kinds: Vec<_> = tokens(text).iter().map(|t| t.kind).collect();
        use Kind::{Directive, Mark, Number, Word};
        let expected = [
            Word("W"),
            Mark(':'),
            Mark('@'),
            Mark('!'),
            Word("%p1"),
            Word("cp.x.shared::cluster.2d"),
            Mark('['),
            Word("%rd1"),
            Mark('+'),
            Mark('-'),
            Number("4"),
            Mark(']'),
            Mark(','),
            Word("%tid.x"),
            Mark(','),
            Number("0f3F800000"),
            Mark(';'),
            Directive("loc"),
            Number("1"),
            Number("2"),
            Number("3"),
        ];
        assert_eq!(kinds, expected);
    }
}
