//! Python's pickle, as far as files of tensors need it. A pickle is a program that may call any function of Python:
//! here it can only build lists, tuples, dicts and descriptions of tensors. Nothing is ever called; whatever else a file
//! asks for is refused by name.
//!
//! Every value is made by at least one byte of the pickle and kept once, so memory is bounded by its size.

use std::fmt;

use crate::error::{Error, Result};
use torch::{Global, global};
pub(super) use torch::{Storage, Tensor};

mod torch;

/// A value; others are meant by their number among all values.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value<'a> {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Str(&'a str),
    Tuple(Vec<usize>),
    List(Vec<usize>),
    Dict(Vec<(usize, usize)>),
    Global(Global<'a>),
    Storage(Storage<'a>),
    Tensor(Tensor<'a>),
}

/// What a pickle holds.
pub(super) struct Pickle<'a> {
    values: Vec<Value<'a>>,
    /// The value the pickle stands for.
    pub root: usize,
}

impl<'a> Pickle<'a> {
    /// Runs the pickle in `bytes`.
    ///
    /// # Errors
    /// It is damaged, or wants something that is not allowed; [`refused`] is its text then.
    pub fn read(bytes: &'a [u8]) -> Result<Self> {
        let mut machine = Machine { rest: bytes, ..Machine::default() };
        let root = machine.run()?;
        Ok(Self { values: machine.values, root })
    }

    /// A value by its number.
    pub fn value(&self, number: usize) -> &Value<'a> {
        &self.values[number]
    }
}

/// Entries of the stack: a value, or the mark below a group of them.
#[derive(Clone, Copy)]
enum Slot {
    Mark,
    Value(usize),
}

#[derive(Default)]
struct Machine<'a> {
    rest: &'a [u8],
    values: Vec<Value<'a>>,
    stack: Vec<Slot>,
    /// By the number that the pickle gives: usually dense, and never trusted.
    memo: std::collections::BTreeMap<u32, usize>,
}

fn damaged(what: impl fmt::Display) -> Error {
    Error::new("a pickle is damaged").found(what).hint("the download may be incomplete: fetch the file again")
}

/// The error for what only running Python could do.
fn refused(what: impl fmt::Display) -> Error {
    Error::new("a pickle asks for more than tensors: it was not run")
        .expected("tensors, numbers, strings, lists and dicts")
        .found(what)
        .hint(
            "a pickle can run any program, so nothing of this one was. If you trust its origin, save its tensors alone, \
             in Python: torch.save(module.state_dict(), path)",
        )
}

impl<'a> Machine<'a> {
    fn take(&mut self, bytes: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(bytes).ok_or_else(|| damaged("it ends too early"))?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    fn byte(&mut self) -> Result<u8> {
        Ok(self.array::<1>()?[0])
    }

    fn text(&mut self, bytes: usize) -> Result<&'a str> {
        std::str::from_utf8(self.take(bytes)?).map_err(|_| damaged("a string that is not UTF-8"))
    }

    /// Up to the next newline, which goes too.
    fn line(&mut self) -> Result<&'a str> {
        let end =
            self.rest.iter().position(|&byte| byte == b'\n').ok_or_else(|| damaged("it ends too early"))?;
        let line = self.text(end)?;
        self.take(1)?;
        Ok(line)
    }

    fn push(&mut self, value: Value<'a>) {
        self.stack.push(Slot::Value(self.values.len()));
        self.values.push(value);
    }

    fn pop(&mut self) -> Result<usize> {
        match self.stack.pop() {
            Some(Slot::Value(value)) => Ok(value),
            _ => Err(damaged("an operation without its values")),
        }
    }

    fn top(&self) -> Result<usize> {
        match self.stack.last() {
            Some(Slot::Value(value)) => Ok(*value),
            _ => Err(damaged("an operation without its value")),
        }
    }

    /// What lies above the last mark, which goes too.
    fn group(&mut self) -> Result<Vec<usize>> {
        let mark = self.stack.iter().rposition(|slot| matches!(slot, Slot::Mark));
        let mark = mark.ok_or_else(|| damaged("a group without its mark"))?;
        let group = self.stack.drain(mark..).filter_map(|slot| match slot {
            Slot::Value(value) => Some(value),
            Slot::Mark => None,
        });
        Ok(group.collect())
    }

    /// Takes `count` values and puts their tuple in their place.
    fn tuple(&mut self, count: usize) -> Result<()> {
        let mut items = (0..count).map(|_| self.pop()).collect::<Result<Vec<_>>>()?;
        items.reverse();
        self.push(Value::Tuple(items));
        Ok(())
    }

    fn fetch(&mut self, key: u32) -> Result<()> {
        let value = *self.memo.get(&key).ok_or_else(|| damaged("a reference to nothing"))?;
        self.stack.push(Slot::Value(value));
        Ok(())
    }

    /// Up to STOP.
    fn run(&mut self) -> Result<usize> {
        loop {
            match self.byte()? {
                b'.' => return self.pop(),
                // The protocol and the length of a frame say nothing about values.
                0x80 => drop(self.byte()?),
                0x95 => drop(self.array::<8>()?),
                b'(' => self.stack.push(Slot::Mark),
                b'N' => self.push(Value::None),
                0x88 => self.push(Value::Bool(true)),
                0x89 => self.push(Value::Bool(false)),
                b'K' => {
                    let number = self.byte()?;
                    self.push(Value::Int(i64::from(number)));
                }
                b'M' => {
                    let number = u16::from_le_bytes(self.array()?);
                    self.push(Value::Int(i64::from(number)));
                }
                b'J' => {
                    let number = i32::from_le_bytes(self.array()?);
                    self.push(Value::Int(i64::from(number)));
                }
                0x8a => {
                    let count = self.byte()?;
                    let bytes = self.take(usize::from(count))?;
                    self.push(Value::Int(
                        long(bytes).ok_or_else(|| damaged("an integer of more than 64 bits"))?,
                    ));
                }
                b'G' => {
                    let number = f64::from_be_bytes(self.array()?);
                    self.push(Value::Float(number));
                }
                b'X' => {
                    let length = u32::from_le_bytes(self.array()?);
                    let text = self.text(length as usize)?;
                    self.push(Value::Str(text));
                }
                0x8c => {
                    let length = self.byte()?;
                    let text = self.text(usize::from(length))?;
                    self.push(Value::Str(text));
                }
                b')' => self.push(Value::Tuple(Vec::new())),
                b't' => {
                    let items = self.group()?;
                    self.push(Value::Tuple(items));
                }
                0x85 => self.tuple(1)?,
                0x86 => self.tuple(2)?,
                0x87 => self.tuple(3)?,
                b']' => self.push(Value::List(Vec::new())),
                b'a' => {
                    let item = self.pop()?;
                    self.append(vec![item])?;
                }
                b'e' => {
                    let items = self.group()?;
                    self.append(items)?;
                }
                b'}' => self.push(Value::Dict(Vec::new())),
                b's' => {
                    let (value, key) = (self.pop()?, self.pop()?);
                    self.insert(&[key, value])?;
                }
                b'u' => {
                    let items = self.group()?;
                    self.insert(&items)?;
                }
                b'q' => {
                    let key = self.byte()?;
                    self.memo.insert(u32::from(key), self.top()?);
                }
                b'r' => {
                    let key = u32::from_le_bytes(self.array()?);
                    self.memo.insert(key, self.top()?);
                }
                0x94 => {
                    let key = self.memo.len() as u32;
                    self.memo.insert(key, self.top()?);
                }
                b'h' => {
                    let key = self.byte()?;
                    self.fetch(u32::from(key))?;
                }
                b'j' => {
                    let key = u32::from_le_bytes(self.array()?);
                    self.fetch(key)?;
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.push(Value::Global(global(module, name)?));
                }
                0x93 => {
                    let (name, module) = (self.pop()?, self.pop()?);
                    let (&Value::Str(module), &Value::Str(name)) = (&self.values[module], &self.values[name])
                    else {
                        return Err(damaged("a name that is no string"));
                    };
                    self.push(Value::Global(global(module, name)?));
                }
                b'Q' => {
                    let id = self.pop()?;
                    let storage = self.storage(id)?;
                    self.push(Value::Storage(storage));
                }
                b'R' => {
                    let (arguments, function) = (self.pop()?, self.pop()?);
                    let value = self.call(function, arguments)?;
                    self.push(value);
                }
                b'b' => self.build()?,
                other => return Err(refused(opcode(other))),
            }
        }
    }

    fn append(&mut self, items: Vec<usize>) -> Result<()> {
        let list = self.top()?;
        match &mut self.values[list] {
            Value::List(list) => list.extend(items),
            _ => return Err(damaged("an item for what is no list")),
        }
        Ok(())
    }

    /// Keys and values by turns.
    fn insert(&mut self, items: &[usize]) -> Result<()> {
        let dict = self.top()?;
        let Value::Dict(dict) = &mut self.values[dict] else {
            return Err(damaged("a key for what is no dict"));
        };
        let (pairs, []) = items.as_chunks::<2>() else { return Err(damaged("a key without a value")) };
        dict.extend(pairs.iter().map(|&[key, value]| (key, value)));
        Ok(())
    }

    /// The state of an object. That of a dict (PyTorch keeps versions of modules there) is of no use here.
    fn build(&mut self) -> Result<()> {
        let (state, object) = (self.pop()?, self.top()?);
        match (&self.values[object], &self.values[state]) {
            (Value::Dict(_), Value::Dict(_)) => Ok(()),
            _ => Err(refused("the state of an object (BUILD)")),
        }
    }
}

/// Two's complement of up to 8 bytes; Python writes a ninth for the sign of some.
fn long(bytes: &[u8]) -> Option<i64> {
    let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
    let mut wide = [if negative { 0xff } else { 0 }; 16];
    wide.get_mut(..bytes.len())?.copy_from_slice(bytes);
    i64::try_from(i128::from_le_bytes(wide)).ok()
}

/// What an operation that is not allowed does, by its code.
fn opcode(code: u8) -> String {
    let name = match code {
        b'i' => "INST, which calls a class",
        b'o' => "OBJ, which calls a class",
        0x81 => "NEWOBJ, which makes an object of a class",
        0x92 => "NEWOBJ_EX, which makes an object of a class",
        0x82..=0x84 => "EXT, which stands for a registered function",
        b'P' => "PERSID, which names an object outside",
        b'B' | b'C' | 0x8e | 0x96 => "bytes",
        b'T' | b'U' | b'S' => "a string of Python 2",
        0x8f..=0x91 => "a set",
        _ => return format!("operation 0x{code:02x}"),
    };
    name.to_owned()
}
