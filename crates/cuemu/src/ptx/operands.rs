//! Operands and numbers.

use super::Error;
use super::lex::Kind;
use super::parse::Parser;
use super::syntax::Operand;

impl<'a> Parser<'a> {
    pub(super) fn operand(&mut self) -> Result<Operand<'a>, Error> {
        let first = match self.peek() {
            Some(Kind::Mark('!')) => {
                self.next += 1;
                return Ok(Operand::Not(Box::new(self.operand()?)));
            }
            Some(Kind::Mark('{')) => {
                self.next += 1;
                return Ok(Operand::Vector(self.operands('}')?));
            }
            Some(Kind::Mark('(')) => {
                self.next += 1;
                return Ok(Operand::List(self.operands(')')?));
            }
            Some(Kind::Mark('[')) => {
                self.next += 1;
                return self.address();
            }
            Some(Kind::Mark('-')) => {
                self.next += 1;
                return self.number(true);
            }
            Some(Kind::Number(_)) => return self.number(false),
            _ => self.word()?,
        };
        if self.accept('|') {
            return Ok(Operand::Pair(Box::new(Operand::Name(first)), Box::new(self.operand()?)));
        }
        match self.offset()? {
            0 => Ok(Operand::Name(first)),
            offset => Ok(Operand::Sum(first, offset)),
        }
    }

    fn operands(&mut self, end: char) -> Result<Vec<Operand<'a>>, Error> {
        let mut found = Vec::new();
        while !self.accept(end) {
            found.push(self.operand()?);
            if !self.accept(',') {
                self.expect(end)?;
                break;
            }
        }
        Ok(found)
    }

    /// After `[`.
    fn address(&mut self) -> Result<Operand<'a>, Error> {
        let base = Box::new(match self.peek() {
            Some(Kind::Number(_)) => self.number(false)?,
            _ => Operand::Name(self.word()?),
        });
        let offset = self.offset()?;
        let mut coordinates = Vec::new();
        if self.accept(',') {
            self.expect('{')?;
            coordinates = self.operands('}')?;
        }
        self.expect(']')?;
        Ok(Operand::Address { base, offset, coordinates })
    }

    /// `+4`, `+-4`, `-4` or nothing.
    fn offset(&mut self) -> Result<i64, Error> {
        let plus = self.accept('+');
        let negative = self.accept('-');
        if !plus && !negative {
            return Ok(0);
        }
        match self.number(negative)? {
            Operand::Integer(value) => Ok(value as i64),
            _ => Err(self.error("an offset that is not an integer")),
        }
    }

    pub(super) fn number(&mut self, negative: bool) -> Result<Operand<'a>, Error> {
        let Kind::Number(text) = self.bump()? else {
            self.next -= 1;
            return Err(self.error(format!("expected a number, found {:?}", self.peek())));
        };
        number(text, negative).ok_or_else(|| self.error(format!("not a number: `{text}`")))
    }
}

/// A number of any form of PTX.
fn number(text: &str, negative: bool) -> Option<Operand<'static>> {
    let hexadecimal = |digits: &str| u64::from_str_radix(digits, 16).ok();
    let lower = text.to_ascii_lowercase();
    if let Some(digits) = lower.strip_prefix("0f").filter(|d| d.len() == 8) {
        let sign = u32::from(negative) << 31;
        return hexadecimal(digits).map(|bits| Operand::Single(bits as u32 ^ sign));
    }
    if let Some(digits) = lower.strip_prefix("0d").filter(|d| d.len() == 16) {
        let sign = u64::from(negative) << 63;
        return hexadecimal(digits).map(|bits| Operand::Double(bits ^ sign));
    }
    let plain = lower.strip_suffix('u').unwrap_or(&lower);
    let value = if let Some(digits) = plain.strip_prefix("0x") {
        i128::from(hexadecimal(digits)?)
    } else if let Some(digits) = plain.strip_prefix("0b") {
        i128::from(u64::from_str_radix(digits, 2).ok()?)
    } else if plain.contains(['.', 'e']) {
        let value: f64 = plain.parse().ok()?;
        return Some(Operand::Double(if negative { -value } else { value }.to_bits()));
    } else if plain.len() > 1 && plain.starts_with('0') {
        i128::from(u64::from_str_radix(plain, 8).ok()?)
    } else {
        i128::from(plain.parse::<u64>().ok()?)
    };
    Some(Operand::Integer(if negative { -value } else { value }))
}
