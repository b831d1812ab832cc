//! Names: what they stand for, in which scope.

use std::collections::HashMap;

use super::super::syntax::{Space, Variable};
use super::super::types::Type;
use super::{Body, Result, SharedUse};

/// What a name stands for.
#[derive(Clone)]
pub(super) enum Symbol<'a> {
    /// A register: a C++ variable.
    Register { cpp: String, ty: Type },
    /// A parameter, a local variable or a variable of module scope: its address is that of a C++ variable.
    Memory { cpp: String },
    /// A shared variable: it has an address in the shared window.
    Shared { cpp: String, key: String, variable: Variable<'a> },
}

/// The names declared between two braces.
pub(super) struct Scope<'a> {
    /// From 0, in the order in which scopes open.
    pub number: usize,
    symbols: HashMap<String, Symbol<'a>>,
}

impl Scope<'_> {
    pub(super) fn new(number: usize) -> Self {
        Self { number, symbols: HashMap::new() }
    }
}

/// A name of PTX as part of a name of C++.
pub(super) fn mangled(name: &str) -> String {
    name.trim_start_matches('%').replace(['$', '%'], "_")
}

impl<'a> Body<'a, '_> {
    pub(super) fn declare(&mut self, name: &str, symbol: Symbol<'a>) {
        if let Some(scope) = self.scopes.last_mut() {
            scope.symbols.insert(name.to_owned(), symbol);
        }
    }

    /// What `name` stands for here.
    pub(super) fn symbol(&self, name: &str) -> Option<Symbol<'a>> {
        if let Some(symbol) = self.scopes.iter().rev().find_map(|scope| scope.symbols.get(name)) {
            return Some(symbol.clone());
        }
        let variable = self.module.variables.iter().find(|v| v.name == name)?;
        Some(match variable.space {
            Space::Shared => {
                Symbol::Shared { cpp: mangled(name), key: name.to_owned(), variable: variable.clone() }
            }
            _ => Symbol::Memory { cpp: format!("v_{}", mangled(name)) },
        })
    }

    /// The C++ that holds the shared-window address of a shared variable; declares it where it is new.
    pub(super) fn shared_address(&mut self, cpp: &str, key: String, variable: &Variable<'a>) -> String {
        if !self.uses.shared.iter().any(|used| used.key == key) {
            let (bytes, align) = (variable.bytes(), variable.align as usize);
            let call = if variable.count == Some(0) {
                format!("cuemu::dynamic_shared({align})")
            } else {
                format!("cuemu::shared_variable(&key_{cpp}, \"{}\", {bytes}, {align})", variable.name)
            };
            super::line(&mut self.declarations, format_args!("  const uint32_t shared_{cpp} = {call};"));
            self.uses.shared.push(SharedUse { key, bytes, align });
        }
        format!("shared_{cpp}")
    }

    /// The C++ label of a PTX label.
    pub(super) fn label(&self, name: &str) -> Result<String> {
        for scope in self.scopes.iter().rev() {
            if self.labels[scope.number].contains(name) {
                let suffix = if scope.number > 0 { format!("_s{}", scope.number) } else { String::new() };
                return Ok(format!("L_{}{suffix}", mangled(name)));
            }
        }
        Err(format!("no label `{name}` in this scope"))
    }
}
