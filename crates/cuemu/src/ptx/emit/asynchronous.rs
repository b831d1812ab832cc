//! Asynchronous copies and mbarriers.

use super::super::syntax::{Operand, Space};
use super::super::types::Type;
use super::operand::Op;
use super::{Body, Result};

impl<'a> Body<'a, '_> {
    /// Everything called `cp`.
    pub(super) fn copy(&mut self, op: &mut Op<'a, '_>) -> Result {
        op.take_one(&["async"])?;
        if op.take("bulk") {
            return self.bulk(op);
        }
        match op.take_any(&["commit_group", "wait_group", "wait_all", "mbarrier"]) {
            Some("commit_group") => self.push("cuemu::cp_async_commit();"),
            Some("wait_group") => {
                let groups = op.constant(0)?;
                self.push(format!("cuemu::cp_async_wait({groups});"));
            }
            Some("wait_all") => self.push("cuemu::cp_async_wait_all();"),
            Some(_) => {
                op.take_one(&["arrive"])?;
                let no_increment = op.take("noinc");
                let space = op.take_space();
                op.take_one(&["b64"])?;
                let barrier = self.shared_window(op, 0, space)?;
                self.push(format!("cuemu::cp_async_mbarrier_arrive({barrier}, {no_increment}, CUEMU_HERE);"));
            }
            None => return self.copy_elements(op),
        }
        Ok(())
    }

    /// `cp.async.{ca,cg}.shared.global [to], [from], bytes{, source bytes | ignore}{, policy}`
    fn copy_elements(&mut self, op: &mut Op<'a, '_>) -> Result {
        let level = op.take_one(&["ca", "cg"])?;
        op.take_one(&["shared", "shared::cta"])?;
        op.take_one(&["global"])?;
        let policy = op.take_cache_hints();
        let to = self.shared_window(op, 0, Space::Shared)?;
        let (from, _) = self.address(op.operand(1)?)?;
        let bytes = op.constant(2)?;
        if !(matches!(bytes, 4 | 8) && level == "ca" || bytes == 16) {
            return Err(format!("`.{level}` of {bytes} bytes"));
        }
        let more = op.count().saturating_sub(3 + usize::from(policy));
        let source = match more {
            0 => bytes.to_string(),
            _ if self.is_predicate(op.operand(3)?) => {
                format!("({} ? 0 : {bytes})", self.value(op, 3, Type::Pred)?)
            }
            _ => self.value(op, 3, Type::U32)?,
        };
        if policy {
            op.operand(3 + more.min(1))?;
        }
        self.push(format!("cuemu::cp_async({to}, {from}, {bytes}, {source}, CUEMU_HERE);"));
        Ok(())
    }

    fn bulk(&mut self, op: &mut Op<'a, '_>) -> Result {
        if op.take("commit_group") {
            self.push("cuemu::bulk_commit();");
            return Ok(());
        }
        if op.take("wait_group") {
            let read = op.take("read");
            let groups = op.constant(0)?;
            self.push(format!("cuemu::bulk_wait({groups}, {read}, CUEMU_HERE);"));
            return Ok(());
        }
        let prefetch = op.take("prefetch");
        let tensor = op.take("tensor");
        let rank = |m: &str| m.strip_suffix('d')?.parse::<usize>().ok();
        let rank = if tensor { Some(op.take_parsed(rank).ok_or("the rank is missing")?) } else { None };
        op.take("tile");
        // The destination comes first.
        let first = op.take_first()?;
        if prefetch {
            return self.bulk_prefetch(op, first, rank);
        }
        let second = op.take_first()?;
        let load = match (first, second) {
            ("shared::cluster" | "shared::cta", "global") => true,
            ("global", "shared::cta") => false,
            _ => return Err("copies between these spaces are not known to the emulator".to_owned()),
        };
        op.take_one(&[if load { "mbarrier::complete_tx::bytes" } else { "bulk_group" }])?;
        let policy = op.take("L2::cache_hint");
        let used = match (rank, load) {
            (Some(rank), true) => {
                let to = self.shared_window(op, 0, Space::Shared)?;
                let (map, coordinates) = self.tensor(op, 1, rank)?;
                let barrier = self.shared_window(op, 2, Space::Shared)?;
                self.push(format!(
                    "{{ const int32_t c_[] = {{{coordinates}}}; \
                     cuemu::tma_load({to}, {map}, {barrier}, {rank}, c_, CUEMU_HERE); }}"
                ));
                3
            }
            (Some(rank), false) => {
                let (map, coordinates) = self.tensor(op, 0, rank)?;
                let from = self.shared_window(op, 1, Space::Shared)?;
                self.push(format!(
                    "{{ const int32_t c_[] = {{{coordinates}}}; cuemu::tma_store({map}, {from}, {rank}, c_, CUEMU_HERE); }}"
                ));
                2
            }
            (None, true) => {
                let to = self.shared_window(op, 0, Space::Shared)?;
                let (from, _) = self.address(op.operand(1)?)?;
                let bytes = self.value(op, 2, Type::U32)?;
                let barrier = self.shared_window(op, 3, Space::Shared)?;
                self.push(format!("cuemu::bulk_load({to}, {from}, {bytes}, {barrier}, CUEMU_HERE);"));
                4
            }
            (None, false) => {
                let (to, _) = self.address(op.operand(0)?)?;
                let from = self.shared_window(op, 1, Space::Shared)?;
                let bytes = self.value(op, 2, Type::U32)?;
                self.push(format!("cuemu::bulk_store({to}, {from}, {bytes}, CUEMU_HERE);"));
                3
            }
        };
        if policy {
            op.operand(used)?;
        }
        Ok(())
    }

    fn bulk_prefetch(&mut self, op: &mut Op<'a, '_>, space: &str, rank: Option<usize>) -> Result {
        if space != "L2" || !op.take("global") {
            return Err(
                "prefetches other than L2 from global memory are not known to the emulator".to_owned()
            );
        }
        let policy = op.take("L2::cache_hint");
        let used = match rank {
            Some(rank) => {
                self.tensor(op, 0, rank)?;
                1
            }
            None => {
                self.address(op.operand(0)?)?;
                self.value(op, 1, Type::U32)?;
                2
            }
        };
        if policy {
            op.operand(used)?;
        }
        self.push(";");
        Ok(())
    }

    /// `[map, {coordinates}]`
    fn tensor(&mut self, op: &Op<'a, '_>, i: usize, rank: usize) -> Result<(String, String)> {
        let Operand::Address { base, offset, coordinates } = op.operand(i)? else {
            return Err("expected a tensor map and coordinates in brackets".to_owned());
        };
        if coordinates.len() != rank {
            return Err(format!("{} coordinates of rank {rank}", coordinates.len()));
        }
        let base = Operand::Address { base: base.clone(), offset: *offset, coordinates: vec![] };
        let (map, _) = self.address(&base)?;
        Ok((map, self.values(coordinates, Type::S32)?))
    }

    pub(super) fn mbarrier(&mut self, op: &mut Op<'a, '_>) -> Result {
        let kind = op.take_one(&["init", "inval", "arrive", "expect_tx", "test_wait", "try_wait"])?;
        let expect = kind == "arrive" && op.take("expect_tx");
        let parity = op.take("parity");
        // Every operation here is at least this strongly ordered.
        if matches!(kind, "arrive" | "expect_tx" | "test_wait" | "try_wait") {
            op.take_any(&["release", "acquire", "relaxed"]);
            op.take_any(&["cta", "cluster"]);
        }
        let space = op.take_space();
        op.take_one(&["b64"])?;
        match kind {
            "init" => {
                let (barrier, count) = (self.shared_window(op, 0, space)?, self.value(op, 1, Type::U32)?);
                self.push(format!("cuemu::mbarrier_init({barrier}, {count}, CUEMU_HERE);"));
            }
            "inval" => {
                let barrier = self.shared_window(op, 0, space)?;
                self.push(format!("cuemu::mbarrier_invalidate({barrier}, CUEMU_HERE);"));
            }
            "expect_tx" => {
                let (barrier, bytes) = (self.shared_window(op, 0, space)?, self.value(op, 1, Type::U32)?);
                self.push(format!("cuemu::mbarrier_expect_tx({barrier}, {bytes}, CUEMU_HERE);"));
            }
            "arrive" => {
                let barrier = self.shared_window(op, 1, space)?;
                let operand = if op.count() > 2 { self.value(op, 2, Type::U32)? } else { "1".to_owned() };
                let count = if expect {
                    self.push(format!("cuemu::mbarrier_expect_tx({barrier}, {operand}, CUEMU_HERE); "));
                    "1".to_owned()
                } else {
                    operand
                };
                self.result(
                    op,
                    Type::B64,
                    &format!("cuemu::mbarrier_arrive({barrier}, {count}, CUEMU_HERE)"),
                )?;
            }
            _ => {
                if !parity {
                    return Err("only the form with `.parity` is known to the emulator".to_owned());
                }
                let (barrier, phase) = (self.shared_window(op, 1, space)?, self.value(op, 2, Type::U32)?);
                if kind == "try_wait" && op.count() > 3 {
                    self.value(op, 3, Type::U32)?; // how long to sleep
                }
                let function = if kind == "test_wait" { "mbarrier_test" } else { "mbarrier_try" };
                let call = format!("cuemu::{function}({barrier}, {phase}, CUEMU_HERE)");
                self.result(op, Type::Pred, &call)?;
            }
        }
        Ok(())
    }
}
