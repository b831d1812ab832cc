//! Branches, calls, barriers and fences.

use super::super::syntax::Operand;
use super::super::types::Type;
use super::operand::Op;
use super::scope::{Symbol, mangled};
use super::{Body, Result, cpp_name, storage};

impl<'a> Body<'a, '_> {
    pub(super) fn jump(&mut self, op: &mut Op<'a, '_>) -> Result {
        op.take("uni");
        match op.name {
            "bra" => {
                let label = self.label_operand(op.operand(0)?)?;
                self.push(format!("goto {label};"));
            }
            "brx" => {
                op.take_one(&["idx"])?;
                let index = self.value(op, 0, Type::U32)?;
                let Operand::Name(list) = op.operand(1)? else {
                    return Err("expected a list of labels".to_owned());
                };
                let labels = *self.targets.get(list).ok_or_else(|| format!("no list of labels `{list}`"))?;
                self.push(format!("switch ({index}) {{"));
                for (i, label) in labels.iter().enumerate() {
                    let label = self.label(label)?;
                    self.push(format!(" case {i}: goto {label};"));
                }
                self.push(" default: cuemu::fail(CUEMU_HERE, \"brx.idx: no such label\"); }");
            }
            "ret" => match &self.function.result {
                Some(result) => self.push(format!("return v_{};", mangled(result.name))),
                None => self.push("return;"),
            },
            "exit" if self.function.entry => self.push("return;"),
            "exit" => return Err("not known to the emulator inside a device function".to_owned()),
            "trap" => self.push("cuemu::fail(CUEMU_HERE, \"trap\");"),
            _ => return self.call(op),
        }
        Ok(())
    }

    fn label_operand(&self, operand: &Operand<'a>) -> Result<String> {
        match operand {
            Operand::Name(name) => self.label(name),
            _ => Err("expected a label".to_owned()),
        }
    }

    /// `call (result), function, (arguments)`; result and arguments may be missing.
    fn call(&mut self, op: &Op<'a, '_>) -> Result {
        let mut next = 0;
        let mut results: &[Operand<'a>] = &[];
        if let Operand::List(list) = op.operand(0)? {
            results = list;
            next = 1;
        }
        let Operand::Name(name) = op.operand(next)? else { return Err("expected a function".to_owned()) };
        let module = self.module;
        let Some(callee) = module.functions.iter().find(|f| f.name == *name && !f.entry) else {
            return Err(format!(
                "`{name}` has no body in this module: calls of it are not known to the emulator"
            ));
        };
        let mut arguments: &[Operand<'a>] = &[];
        if op.count() > next + 1 {
            let Operand::List(list) = op.operand(next + 1)? else {
                return Err("expected arguments".to_owned());
            };
            arguments = list;
        }
        if arguments.len() != callee.parameters.len() || results.len() > usize::from(callee.result.is_some())
        {
            return Err(format!("`{name}` takes {} arguments", callee.parameters.len()));
        }
        let mut passed = Vec::with_capacity(arguments.len());
        for (argument, parameter) in arguments.iter().zip(&callee.parameters) {
            passed.push(format!("pass_<{}>({})", storage(parameter), self.call_variable(argument)?));
        }
        self.uses.calls.push(name);
        let call = format!("{}({})", cpp_name(callee), passed.join(", "));
        match results {
            [result] => {
                let variable = self.call_variable(result)?;
                self.push(format!("{variable} = pass_<decltype({variable})>({call});"));
            }
            _ => self.push(format!("{call};")),
        }
        Ok(())
    }

    fn call_variable(&self, operand: &Operand<'a>) -> Result<String> {
        if let Operand::Name(name) = operand {
            match self.symbol(name) {
                Some(Symbol::Memory { cpp }) => return Ok(cpp),
                Some(Symbol::Register { cpp, .. }) => return Ok(cpp),
                _ => {}
            }
        }
        Err(format!("an argument that is not known to the emulator: {operand:?}"))
    }

    pub(super) fn barrier(&mut self, op: &mut Op<'a, '_>) -> Result {
        if op.name == "bar" && op.take("warp") {
            op.take_one(&["sync"])?;
            let mask = self.value(op, 0, Type::U32)?;
            self.push(format!("cuemu::warp_sync({mask}, CUEMU_HERE);"));
            return Ok(());
        }
        op.take("cta");
        op.take("aligned");
        let threads = "cuemu::all_threads";
        match op.take_one(&["sync", "arrive", "red"])? {
            "sync" => {
                let id = self.value(op, 0, Type::U32)?;
                let count = if op.count() > 1 { self.value(op, 1, Type::U32)? } else { threads.to_owned() };
                self.push(format!("cuemu::bar_sync({id}, {count}, CUEMU_HERE);"));
            }
            "arrive" => {
                let (id, count) = (self.value(op, 0, Type::U32)?, self.value(op, 1, Type::U32)?);
                self.push(format!("cuemu::bar_arrive({id}, {count}, CUEMU_HERE);"));
            }
            _ => {
                let (vote, ty) = match op.take_one(&["popc", "and", "or"])? {
                    "popc" => ("count", Type::U32),
                    "and" => ("all", Type::Pred),
                    _ => ("any", Type::Pred),
                };
                op.take_one(&["pred", "u32"])?;
                let id = self.value(op, 1, Type::U32)?;
                let last = op.count().saturating_sub(1).max(2);
                let count = if last > 2 { self.value(op, 2, Type::U32)? } else { threads.to_owned() };
                let predicate = self.value(op, last, Type::Pred)?;
                let call =
                    format!("cuemu::bar_reduce({id}, {count}, cuemu::Vote::{vote}, {predicate}, CUEMU_HERE)");
                let call = if ty == Type::Pred { format!("{call} != 0") } else { call };
                self.result(op, ty, &call)?;
            }
        }
        Ok(())
    }

    pub(super) fn fence(&mut self, op: &mut Op<'a, '_>) -> Result {
        if op.name == "membar" {
            op.take_one(&["cta", "gl", "sys"])?;
        } else if op.take("proxy") {
            // The spaces of an asynchronous proxy: a fence of all is one of each.
            if op.take("async") {
                op.take_any(&["global", "shared::cta", "shared::cluster"]);
                self.push("cuemu::fence_async_proxy(CUEMU_HERE);");
                return Ok(());
            }
            op.take_one(&["alias"])?;
        } else if op.take("mbarrier_init") {
            op.take_one(&["release"])?;
            op.take_one(&["cluster"])?;
        } else {
            op.take_any(&["sc", "acq_rel", "acquire", "release"]);
            op.take_one(&["cta", "cluster", "gpu", "sys"])?;
        }
        self.push("cuemu::fence();");
        Ok(())
    }

    /// What does nothing here, but for letting others run.
    pub(super) fn pause(&mut self, op: &mut Op<'a, '_>) -> Result {
        match op.name {
            "nanosleep" => {
                op.take_one(&["u32"])?;
                self.value(op, 0, Type::U32)?;
                self.push("cuemu::yield();");
            }
            "setmaxnreg" => {
                op.take_one(&["inc", "dec"])?;
                op.take_one(&["sync"])?;
                op.take("aligned");
                op.take_one(&["u32"])?;
                op.constant(0)?;
                self.push(";");
            }
            "griddepcontrol" => {
                op.take_one(&["launch_dependents", "wait"])?;
                self.push(";");
            }
            _ => {
                op.take("mask");
                op.constant(0)?;
                self.push(";");
            }
        }
        Ok(())
    }
}
