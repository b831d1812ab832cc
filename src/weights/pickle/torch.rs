//! What PyTorch's pickles ask for: a few functions, whose results are computed here.

use super::{Machine, Value, damaged, refused};
use crate::error::Result;
use crate::weights::safetensors::cut;

/// The functions and classes that are known, and what calling them gives is computed here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::weights) enum Global<'a> {
    /// `collections.OrderedDict`
    OrderedDict,
    /// `torch._utils._rebuild_tensor_v2`
    RebuildTensor,
    /// `torch._utils._rebuild_parameter`
    RebuildParameter,
    /// `torch.FloatStorage` and the like: `Float`.
    Storage(&'a str),
}

/// Element types of storages.
const STORAGES: [&str; 7] = ["Float", "Half", "BFloat16", "Double", "Long", "Int", "Bool"];

/// Items of a tuple whose length matters: arguments, shapes. A tuple may be there many times at the cost of two bytes
/// each, so that none is copied unless it is short.
const MAX_ITEMS: usize = 16;

/// A member of the archive with elements of one type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::weights) struct Storage<'a> {
    /// `Float`, as in `torch.FloatStorage`.
    pub element: &'a str,
    /// Name of the member, after `data/`.
    pub key: &'a str,
    /// Elements.
    pub len: usize,
}

/// A view of a storage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::weights) struct Tensor<'a> {
    pub storage: Storage<'a>,
    /// Of the first element.
    pub offset: usize,
    pub shape: Vec<usize>,
    /// In elements.
    pub strides: Vec<usize>,
}

impl<'a> Machine<'a> {
    /// `('storage', torch.FloatStorage, '0', 'cpu', 1024)`
    pub(super) fn storage(&self, id: usize) -> Result<Storage<'a>> {
        let items = self.items(id).ok_or_else(|| damaged("an outside object of no known kind"))?;
        match items.as_slice() {
            [
                Value::Str("storage"),
                Value::Global(Global::Storage(element)),
                Value::Str(key),
                Value::Str(_),
                len,
            ] => {
                let len = whole(len).ok_or_else(|| damaged("a storage of no length"))?;
                Ok(Storage { element, key, len })
            }
            _ => Err(damaged("an outside object that is no storage")),
        }
    }

    /// The items of a tuple that is short enough to be one of PyTorch's.
    fn items(&self, number: usize) -> Option<Vec<&Value<'a>>> {
        match &self.values[number] {
            Value::Tuple(items) if items.len() <= MAX_ITEMS => {
                Some(items.iter().map(|item| &self.values[*item]).collect())
            }
            _ => None,
        }
    }

    /// What a known function gives.
    pub(super) fn call(&self, function: usize, arguments: usize) -> Result<Value<'a>> {
        let Value::Global(function) = &self.values[function] else {
            return Err(refused("a call of what is no known function (REDUCE)"));
        };
        let items = self.items(arguments).ok_or_else(|| damaged("a call without arguments"))?;
        match (function, items.as_slice()) {
            (Global::OrderedDict, []) => Ok(Value::Dict(Vec::new())),
            (
                Global::RebuildTensor,
                [Value::Storage(storage), offset, Value::Tuple(shape), Value::Tuple(strides), ..],
            ) => {
                let all = |numbers: &[usize]| -> Option<Vec<usize>> {
                    let numbers = Some(numbers).filter(|numbers| numbers.len() <= MAX_ITEMS)?;
                    numbers.iter().map(|number| whole(&self.values[*number])).collect()
                };
                let parts = (whole(offset), all(shape), all(strides));
                let (Some(offset), Some(shape), Some(strides)) = parts else {
                    return Err(damaged("a tensor of impossible shape"));
                };
                Ok(Value::Tensor(Tensor { storage: *storage, offset, shape, strides }))
            }
            (Global::RebuildParameter, [Value::Tensor(tensor), ..]) => Ok(Value::Tensor(tensor.clone())),
            _ => Err(damaged("a call with other arguments than PyTorch's")),
        }
    }
}

/// A count.
fn whole(value: &Value) -> Option<usize> {
    match value {
        Value::Int(number) => usize::try_from(*number).ok(),
        _ => None,
    }
}

/// The function or class of this name, if it is a known one.
pub(super) fn global<'a>(module: &'a str, name: &'a str) -> Result<Global<'a>> {
    let storage = name.strip_suffix("Storage").filter(|element| STORAGES.contains(element));
    match (module, name, storage) {
        ("collections", "OrderedDict", _) => Ok(Global::OrderedDict),
        ("torch._utils", "_rebuild_tensor_v2", _) => Ok(Global::RebuildTensor),
        ("torch._utils", "_rebuild_parameter", _) => Ok(Global::RebuildParameter),
        ("torch", _, Some(element)) => Ok(Global::Storage(element)),
        _ => Err(refused(cut(&format!("{module}.{name}").replace(char::is_control, "�")))),
    }
}
