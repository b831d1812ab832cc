//! As much of thrift's compact protocol as it takes to check the lengths that a parquet file states.
//!
//! The parquet crate reserves memory for what these headers announce, and walks a schema by recursion; so they are
//! looked at before it gets them. A header that cannot be read here is damaged: `None`.

/// Groups of a schema inside one another at most; real ones have a handful.
const SCHEMA_DEPTH: usize = 100;
/// The same for structures of the protocol itself.
const STRUCT_DEPTH: usize = 16;

/// Types of the protocol that are treated apart.
const STOP: u8 = 0;
const I32: u8 = 5;
const LIST: u8 = 9;
const STRUCT: u8 = 12;

/// A reader of the protocol.
struct Compact<'a>(&'a [u8]);

impl Compact<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (&first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(first)
    }

    fn pass(&mut self, bytes: u64) -> Option<()> {
        self.0 = self.0.get(usize::try_from(bytes).ok()?..)?;
        Some(())
    }

    fn varint(&mut self) -> Option<u64> {
        let (value, rest) = varint(self.0)?;
        self.0 = rest;
        Some(value)
    }

    fn i32(&mut self) -> Option<i32> {
        i32::try_from(zigzag(self.varint()?)).ok()
    }

    /// The type and number of the next field after field `last`.
    fn field(&mut self, last: i64) -> Option<(u8, i64)> {
        let head = self.byte()?;
        let (kind, step) = (head & 15, i64::from(head >> 4));
        match (kind, step) {
            (STOP, _) => Some((STOP, last)),
            (_, 0) => Some((kind, zigzag(self.varint()?))),
            _ => Some((kind, last.wrapping_add(step))),
        }
    }

    /// The type and number of the elements of a list.
    fn list(&mut self) -> Option<(u8, u64)> {
        let head = self.byte()?;
        let size = match head >> 4 {
            15 => self.varint()?,
            size => u64::from(size),
        };
        Some((head & 15, size))
    }

    fn skip(&mut self, kind: u8, depth: usize) -> Option<()> {
        match kind {
            // The type of a field is its truth value.
            1 | 2 => Some(()),
            3 => self.pass(1),
            4..=6 => self.varint().map(drop),
            7 => self.pass(8),
            8 => {
                let bytes = self.varint()?;
                self.pass(bytes)
            }
            LIST | 10 if depth < STRUCT_DEPTH => {
                let (kind, size) = self.list()?;
                // Truth values in a list have a byte each, and so everything takes at least one.
                (0..size).try_for_each(|_| match kind {
                    1 | 2 => self.pass(1),
                    _ => self.skip(kind, depth + 1),
                })
            }
            STRUCT if depth < STRUCT_DEPTH => {
                let mut last = 0;
                loop {
                    let (kind, id) = self.field(last)?;
                    if kind == STOP {
                        return Some(());
                    }
                    self.skip(kind, depth + 1)?;
                    last = id;
                }
            }
            // Parquet has no maps.
            _ => None,
        }
    }

    /// The `num_children` of a schema element.
    fn children(&mut self) -> Option<i32> {
        let (mut last, mut children) = (0, 0);
        loop {
            match self.field(last)? {
                (STOP, _) => return Some(children),
                (I32, 5) => (children, last) = (self.i32()?, 5),
                (kind, id) => {
                    self.skip(kind, 1)?;
                    last = id;
                }
            }
        }
    }
}

/// An unsigned number of up to 64 bits, and what follows it.
pub(super) fn varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0_u64;
    for (i, &byte) in bytes.iter().take(10).enumerate() {
        value |= u64::from(byte & 127) << (7 * i);
        if byte < 128 {
            return Some((value, &bytes[i + 1..]));
        }
    }
    None
}

fn zigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}

/// Checks the schema at the start of a footer: every group has the children that it states, and few levels.
pub(super) fn check_schema(footer: &[u8]) -> Option<()> {
    let mut reader = Compact(footer);
    let mut last = 0;
    let elements = loop {
        match reader.field(last)? {
            (LIST, 2) => match reader.list()? {
                (STRUCT, size) => break size,
                _ => return None,
            },
            (STOP, _) => return None,
            (kind, id) => {
                reader.skip(kind, 0)?;
                last = id;
            }
        }
    };
    // How many children the groups around the next element still lack.
    let mut open: Vec<u64> = Vec::new();
    for element in 0..elements {
        match open.last_mut() {
            Some(lacks) => *lacks -= 1,
            None if element == 0 => {}
            None => return None,
        }
        let children = u64::try_from(reader.children()?).ok()?;
        if children > elements - element - 1 || open.len() == SCHEMA_DEPTH {
            return None;
        }
        open.push(children);
        while open.last() == Some(&0) {
            open.pop();
        }
    }
    (elements > 0 && open.is_empty()).then_some(())
}

/// The size that a page's header states for the page unpacked, and the size as it is stored.
pub(super) fn page_sizes(header: &[u8]) -> Option<(u64, u64)> {
    let mut reader = Compact(header);
    let mut number = |id| match reader.field(id - 1)? {
        (I32, found) if found == id => reader.i32(),
        _ => None,
    };
    number(1)?;
    let unpacked = number(2)?;
    Some((u64::try_from(unpacked).ok()?, u64::try_from(number(3)?).ok()?))
}

/// Checks numbers stored by their differences (DELTA_BINARY_PACKED): there are `most` at most, and the bytes for all of
/// them are there. What follows them.
pub(super) fn after_deltas(bytes: &[u8], most: u64) -> Option<&[u8]> {
    let (block, rest) = varint(bytes)?;
    let (minis, rest) = varint(rest)?;
    let (count, rest) = varint(rest)?;
    let (_first, mut rest) = varint(rest)?;
    // All writers have 128 in a block or more, of 32 in a part or more, as the format demands.
    let part = block.checked_div(minis)?;
    if !(1..=1 << 16).contains(&block) || part == 0 || part % 32 != 0 || part * minis != block || count > most
    {
        return None;
    }
    let mut left = count.saturating_sub(1);
    while left > 0 {
        let (_least, after) = varint(rest)?;
        let widths = after.get(..minis as usize)?;
        rest = &after[minis as usize..];
        for &width in widths {
            if left > 0 {
                rest = rest.get(usize::from(width) * part as usize / 8..)?;
                left = left.saturating_sub(part);
            }
        }
    }
    Some(rest)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(prop_oneof![any::<u8>(), Just(0xFF), Just(0x19), Just(0x15)], 0..60)) {
            let _ = (check_schema(&bytes), page_sizes(&bytes), after_deltas(&bytes, 1 << 20));
        }
    }

    #[test]
    fn numbers() {
        assert_eq!(varint(&[0x96, 0x01, 7]), Some((150, &[7][..])));
        assert_eq!(varint(&[0x80]), None);
        assert_eq!(varint(&[0xFF; 11]), None);
        assert_eq!([0, 1, 2, u64::MAX].map(zigzag), [0, -1, 1, i64::MIN]);
    }

    #[test]
    fn sizes_of_a_page() {
        // type 0, unpacked 150, stored 3, and more fields.
        assert_eq!(page_sizes(&[0x15, 0, 0x15, 0xAC, 0x02, 0x15, 6, 0x2C]), Some((150, 3)));
        assert_eq!(page_sizes(&[0x15, 0, 0x15, 1, 0x15, 6]), None, "a negative size");
        assert_eq!(page_sizes(&[0x15, 0, 0x25, 2, 0x15, 6]), None, "no second field");
        assert_eq!(page_sizes(&[0x15, 0, 0x15]), None);
    }

    /// A footer: version 1, then a schema of groups with these numbers of children.
    fn footer(children: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0x15, 2, 0x19, 0xFC, children.len() as u8];
        for children in children {
            // A name, and num_children.
            bytes.extend([0x48, 1, b'x', 0x15, children * 2, 0]);
        }
        bytes
    }

    #[test]
    fn schemas() {
        for good in [&[0][..], &[2, 0, 0], &[2, 1, 0, 0], &[1, 2, 0, 0]] {
            assert_eq!(check_schema(&footer(good)), Some(()), "{good:?}");
        }
        for bad in [&[][..], &[1], &[0, 0], &[2, 0], &[50, 0], &[1, 1, 1]] {
            assert_eq!(check_schema(&footer(bad)), None, "{bad:?}");
        }
        let mut deep = vec![1; 120];
        deep.push(0);
        assert_eq!(check_schema(&footer(&deep)), None);
        // A field whose number is the greatest, and one after it.
        let mut last = vec![0x05, 0xFE];
        last.extend([0xFF; 8]);
        last.extend([0x01, 2, 0x15, 2, 0]);
        assert_eq!(check_schema(&last), None);
        assert_eq!(check_schema(&[0x19, 0xFC, 0xFF, 0xFF, 0xFF, 0xFF, 0x0F]), None);
    }

    #[test]
    fn deltas() {
        // Blocks of 128 in 4 parts; 1 number; then 40 numbers of widths 2 and 0 (8 bytes).
        assert_eq!(after_deltas(&[0x80, 1, 4, 1, 9, b'x'], 1), Some(&b"x"[..]));
        let mut forty = vec![0x80, 1, 4, 40, 0, 0, 2, 0, 200, 200];
        forty.extend([0; 8]);
        assert_eq!(after_deltas(&forty, 40), Some(&[][..]));
        assert_eq!(after_deltas(&forty, 39), None);
        assert_eq!(after_deltas(&forty[..17], 40), None);
        assert_eq!(after_deltas(&[0x80, 1, 0, 1, 9], 1), None);
        assert_eq!(after_deltas(&[0, 4, 1, 9], 1), None);
    }
}
