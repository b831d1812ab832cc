//! Tokens → items: declarations, statements, labels and scopes, with every operand typed.

use super::Error;
use super::lex::{Kind, Token, tokens};
use super::syntax::{Function, Instruction, Item, Module, Operand, Space, Variable};
use super::types::Type;

/// Parses a module.
pub fn parse(source: &str) -> Result<Module<'_>, Error> {
    let mut parser = Parser { source, tokens: tokens(source), next: 0, kernel: None };
    parser.module()
}

/// Walks the tokens.
pub(super) struct Parser<'a> {
    source: &'a str,
    tokens: Vec<Token<'a>>,
    pub(super) next: usize,
    kernel: Option<&'a str>,
}

impl<'a> Parser<'a> {
    pub(super) fn peek(&self) -> Option<Kind<'a>> {
        self.tokens.get(self.next).map(|t| t.kind)
    }

    fn line(&self) -> usize {
        self.tokens.get(self.next).or(self.tokens.last()).map_or(0, |t| t.line)
    }

    pub(super) fn error(&self, message: impl Into<String>) -> Error {
        Error::new(self.line(), self.kernel, message.into())
    }

    pub(super) fn bump(&mut self) -> Result<Kind<'a>, Error> {
        let kind = self.peek().ok_or_else(|| self.error("the text ends in the middle of a statement"))?;
        self.next += 1;
        Ok(kind)
    }

    /// Takes the character `mark` if it comes next.
    pub(super) fn accept(&mut self, mark: char) -> bool {
        let found = self.peek() == Some(Kind::Mark(mark));
        self.next += usize::from(found);
        found
    }

    pub(super) fn expect(&mut self, mark: char) -> Result<(), Error> {
        if self.accept(mark) {
            return Ok(());
        }
        Err(self.error(format!("expected `{mark}`, found {:?}", self.peek())))
    }

    pub(super) fn word(&mut self) -> Result<&'a str, Error> {
        match self.peek() {
            Some(Kind::Word(word)) => {
                self.next += 1;
                Ok(word)
            }
            Some(other) => Err(self.error(format!("expected a name, found {other:?}"))),
            None => Err(self.error("the text ends in the middle of a statement")),
        }
    }

    fn directive(&mut self) -> Option<&'a str> {
        match self.peek() {
            Some(Kind::Directive(name)) => {
                self.next += 1;
                Some(name)
            }
            _ => None,
        }
    }

    fn unsigned(&mut self) -> Result<u32, Error> {
        match self.number(false)? {
            Operand::Integer(value) => {
                u32::try_from(value).map_err(|_| self.error(format!("{value} is out of range here")))
            }
            _ => Err(self.error("expected an integer")),
        }
    }

    fn skip_line(&mut self) {
        let line = self.tokens[self.next - 1].line;
        while self.tokens.get(self.next).is_some_and(|t| t.line == line) {
            self.next += 1;
        }
    }

    fn skip_statement(&mut self) -> Result<(), Error> {
        while self.bump()? != Kind::Mark(';') {}
        Ok(())
    }

    fn module(&mut self) -> Result<Module<'a>, Error> {
        let mut module = Module::default();
        while self.peek().is_some() {
            let Some(name) = self.directive() else {
                return Err(self.error(format!("expected a directive, found {:?}", self.peek())));
            };
            match name {
                "version" | "target" => self.skip_line(),
                "address_size" => {
                    if self.unsigned()? != 64 {
                        return Err(self.error("only 64-bit addresses are known to the emulator"));
                    }
                }
                "file" => {
                    let number = self.unsigned()?;
                    if let Kind::Text(path) = self.bump()? {
                        module.files.insert(number, path);
                    }
                    self.skip_line();
                }
                "section" => {
                    while self.bump()? != Kind::Mark('{') {}
                    while self.bump()? != Kind::Mark('}') {}
                }
                "pragma" => self.skip_statement()?,
                "visible" | "weak" | "extern" | "common" => {}
                "entry" | "func" => module.functions.extend(self.function(name == "entry")?),
                "global" => self.variables(Space::Global, &mut module.variables)?,
                "const" => self.variables(Space::Const, &mut module.variables)?,
                "shared" => self.variables(Space::Shared, &mut module.variables)?,
                other => return Err(self.error(format!("directive not known to the emulator: `.{other}`"))),
            }
        }
        Ok(module)
    }

    /// After `.entry` or `.func`. `None`: a declaration without a body.
    fn function(&mut self, entry: bool) -> Result<Option<Function<'a>>, Error> {
        let mut result =
            if !entry && self.peek() == Some(Kind::Mark('(')) { self.parameters()? } else { vec![] };
        let name = self.word()?;
        self.kernel = Some(name);
        let parameters = if self.peek() == Some(Kind::Mark('(')) { self.parameters()? } else { vec![] };
        let mut max_threads = 0;
        while let Some(directive) = self.directive() {
            match directive {
                "maxntid" | "reqntid" => max_threads = self.product()?,
                "reqnctapercluster" => {
                    if self.product()? != 1 {
                        return Err(self.error("clusters of several blocks are not known to the emulator"));
                    }
                }
                "maxnreg" | "minnctapersm" | "maxnctapersm" | "maxclusterrank" => {
                    self.unsigned()?;
                }
                "noreturn" | "explicitcluster" => {}
                "pragma" => self.skip_statement()?,
                other => return Err(self.error(format!("directive not known to the emulator: `.{other}`"))),
            }
        }
        if self.accept(';') {
            self.kernel = None;
            return Ok(None);
        }
        self.expect('{')?;
        let items = self.body()?;
        self.kernel = None;
        Ok(Some(Function { entry, name, parameters, result: result.pop(), max_threads, items }))
    }

    fn product(&mut self) -> Result<u32, Error> {
        let mut product = self.unsigned()?;
        while self.accept(',') {
            product *= self.unsigned()?;
        }
        Ok(product)
    }

    fn parameters(&mut self) -> Result<Vec<Variable<'a>>, Error> {
        let mut found = Vec::new();
        self.expect('(')?;
        while !self.accept(')') {
            match self.directive() {
                Some("param") => found.push(self.variable(Space::Param)?),
                Some(other) => {
                    return Err(self.error(format!("parameters in `.{other}` space are not known")));
                }
                None => return Err(self.error("expected `.param`")),
            }
            self.accept(',');
        }
        Ok(found)
    }

    /// After `.global` and the like: one or more variables, to the semicolon.
    fn variables(&mut self, space: Space, into: &mut Vec<Variable<'a>>) -> Result<(), Error> {
        let mut variable = self.variable(space)?;
        loop {
            if self.accept('=') {
                variable.initial = self.initial(variable.ty)?;
            }
            let more = self.accept(',');
            if !more {
                into.push(variable);
                return self.expect(';');
            }
            let (name, count) = self.declarator()?;
            let next = Variable { name, count, initial: vec![], ..variable.clone() };
            into.push(std::mem::replace(&mut variable, next));
        }
    }

    /// Alignment, type, name and size.
    fn variable(&mut self, space: Space) -> Result<Variable<'a>, Error> {
        let (mut align, mut ty) = (None, None);
        while let Some(name) = self.directive() {
            match name {
                "align" => align = Some(self.unsigned()?),
                // Of a pointer parameter: where it points, how aligned.
                "ptr" => {
                    while let Some(next) = self.directive() {
                        if next == "align" {
                            self.unsigned()?;
                        }
                    }
                    break;
                }
                _ => match Type::parse(name) {
                    Some(known) => ty = Some(known),
                    None => return Err(self.error(format!("unknown in a declaration: `.{name}`"))),
                },
            }
        }
        let ty = ty.ok_or_else(|| self.error("a declaration without a type"))?;
        let (name, count) = self.declarator()?;
        Ok(Variable { space, align: align.unwrap_or(ty.bytes()), ty, name, count, initial: vec![] })
    }

    fn declarator(&mut self) -> Result<(&'a str, Option<usize>), Error> {
        let name = self.word()?;
        let mut count = None;
        while self.accept('[') {
            let size = if self.peek() == Some(Kind::Mark(']')) { 0 } else { self.unsigned()? as usize };
            count = Some(count.unwrap_or(1) * size);
            self.expect(']')?;
        }
        Ok((name, count))
    }

    /// Values of an initialiser, as bit patterns of `ty`.
    fn initial(&mut self, ty: Type) -> Result<Vec<u64>, Error> {
        let mut values = Vec::new();
        if self.accept('{') {
            while !self.accept('}') {
                values.extend(self.initial(ty)?);
                self.accept(',');
            }
            return Ok(values);
        }
        let value = self.operand()?;
        Ok(vec![match value {
            Operand::Integer(value) => value as u64,
            Operand::Single(bits) if ty != Type::F64 => u64::from(bits),
            Operand::Double(bits) if ty != Type::F32 => bits,
            _ => return Err(self.error("an initialiser that is not a number is not known to the emulator")),
        }])
    }

    /// Items to the closing brace.
    fn body(&mut self) -> Result<Vec<Item<'a>>, Error> {
        let mut items = Vec::new();
        let mut depth = 0;
        loop {
            match self.peek() {
                Some(Kind::Mark('{')) => {
                    depth += 1;
                    items.push(Item::Open);
                    self.next += 1;
                }
                Some(Kind::Mark('}')) => {
                    self.next += 1;
                    if depth == 0 {
                        return Ok(items);
                    }
                    depth -= 1;
                    items.push(Item::Close);
                }
                Some(Kind::Mark(';')) => self.next += 1,
                Some(Kind::Directive(name)) => {
                    self.next += 1;
                    self.body_directive(name, &mut items)?;
                }
                _ => self.statement(&mut items)?,
            }
        }
    }

    fn body_directive(&mut self, name: &str, items: &mut Vec<Item<'a>>) -> Result<(), Error> {
        let space = match name {
            "loc" => {
                items.push(Item::Location(self.unsigned()?, self.unsigned()?));
                self.skip_line();
                return Ok(());
            }
            "reg" => return self.registers(items),
            "pragma" => return self.skip_statement(),
            "shared" => Space::Shared,
            "local" => Space::Local,
            "param" => Space::Param,
            other => return Err(self.error(format!("directive not known to the emulator: `.{other}`"))),
        };
        let mut variables = Vec::new();
        self.variables(space, &mut variables)?;
        items.extend(variables.into_iter().map(Item::Variable));
        Ok(())
    }

    fn registers(&mut self, items: &mut Vec<Item<'a>>) -> Result<(), Error> {
        let name = self.directive().unwrap_or("");
        let ty = Type::parse(name).ok_or_else(|| self.error(format!("unknown register type `.{name}`")))?;
        let mut names = Vec::new();
        loop {
            let name = self.word()?;
            if self.accept('<') {
                names.extend((0..self.unsigned()?).map(|i| format!("{name}{i}")));
                self.expect('>')?;
            } else {
                names.push(name.to_owned());
            }
            if !self.accept(',') {
                break;
            }
        }
        items.push(Item::Registers(ty, names));
        self.expect(';')
    }

    /// A label or an instruction.
    fn statement(&mut self, items: &mut Vec<Item<'a>>) -> Result<(), Error> {
        let first = self.tokens.get(self.next).copied().ok_or_else(|| self.error("a body without an end"))?;
        let mut guard = None;
        if self.accept('@') {
            let negated = self.accept('!');
            guard = Some((self.word()?, negated));
        }
        let word = self.word()?;
        if self.accept(':') {
            return self.label(word, items);
        }
        let mut operands = Vec::new();
        while !self.accept(';') {
            operands.push(self.operand()?);
            if !self.accept(',') {
                self.expect(';')?;
                break;
            }
        }
        let text = &self.source[first.start..self.tokens[self.next - 1].end];
        let mut parts = word.split('.');
        items.push(Item::Instruction(Instruction {
            line: first.line,
            text,
            guard,
            name: parts.next().unwrap_or(word),
            modifiers: parts.collect(),
            operands,
        }));
        Ok(())
    }

    fn label(&mut self, name: &'a str, items: &mut Vec<Item<'a>>) -> Result<(), Error> {
        match self.peek() {
            Some(Kind::Directive("branchtargets")) => {
                self.next += 1;
                let mut labels = vec![self.word()?];
                while self.accept(',') {
                    labels.push(self.word()?);
                }
                items.push(Item::Targets(name, labels));
                self.expect(';')
            }
            Some(Kind::Directive("callprototype")) => self.skip_statement(),
            _ => {
                items.push(Item::Label(name));
                Ok(())
            }
        }
    }
}
