//! What a state dict's pickle says, without running anything of it.
//!
//! A pickle is a program for a small machine with a stack. This one knows the instructions that
//! `torch.save` writes for a dict of tensors, and of the names that it may ask for those below; every
//! other instruction and every other name is refused. Nothing is called: a tensor is where its bytes
//! are.
//!
//! Tuples, lists and dicts lie in tables and hold numbers of each other, so that no nesting is too deep,
//! and nothing is copied: what the machine holds is bounded by the length of the pickle.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;

/// A tensor of a state dict.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct PickledTensor {
    /// The type as torch calls its storage: `FloatStorage`.
    pub(super) storage: &'static str,
    /// The name of the storage in the archive.
    pub(super) key: Rc<str>,
    /// The first element, counted from the storage's beginning.
    pub(super) first: u64,
    pub(super) shape: Vec<u64>,
    /// How far apart neighbours of each dimension are, in elements.
    pub(super) strides: Vec<u64>,
}

/// The longest name of a tensor, as in a GGUF file.
const NAME_MAX: usize = 1 << 10;

/// Storages whose elements have a size that is known.
const STORAGES: [&str; 9] = [
    "FloatStorage",
    "HalfStorage",
    "BFloat16Storage",
    "DoubleStorage",
    "LongStorage",
    "IntStorage",
    "ShortStorage",
    "CharStorage",
    "ByteStorage",
];

/// A name that a pickle may ask for.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Known {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Size,
    Storage(&'static str),
    BoolStorage,
}

impl Known {
    fn of(module: &str, name: &str) -> Result<Self, String> {
        Ok(match (module, name) {
            ("collections", "OrderedDict") => Known::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Known::RebuildTensor,
            ("torch._utils", "_rebuild_parameter") => Known::RebuildParameter,
            ("torch", "Size") => Known::Size,
            ("torch", "BoolStorage") => Known::BoolStorage,
            ("torch", name) if STORAGES.contains(&name) => {
                Known::Storage(STORAGES.into_iter().find(|s| *s == name).unwrap_or_default())
            }
            _ => {
                let shown: String = format!("{module}.{name}").chars().take(100).collect();
                return Err(format!(
                    "it asks for `{shown}`; only tensors are read, and nothing is executed"
                ));
            }
        })
    }
}

#[derive(Clone, Debug)]
enum Item {
    None,
    Bool,
    Int(i64),
    Float,
    Text(Rc<str>),
    Tuple(usize),
    List,
    Dict(usize),
    Known(Known),
    Storage(&'static str, Rc<str>),
    Tensor(usize),
}

impl Item {
    /// What it is, for words: what it holds may be as long as the pickle.
    fn kind(&self) -> &'static str {
        match self {
            Item::None => "`None`",
            Item::Bool => "truth value",
            Item::Int(_) => "number",
            Item::Float => "fraction",
            Item::Text(_) => "text",
            Item::Tuple(_) => "tuple",
            Item::List => "list",
            Item::Dict(_) => "dict",
            Item::Known(Known::OrderedDict) => "`OrderedDict`",
            Item::Known(Known::RebuildTensor) => "`_rebuild_tensor_v2`",
            Item::Known(Known::RebuildParameter) => "`_rebuild_parameter`",
            Item::Known(Known::Size) => "`Size`",
            Item::Known(Known::Storage(_) | Known::BoolStorage) => "type of a storage",
            Item::Storage(..) => "storage",
            Item::Tensor(_) => "tensor",
        }
    }
}

#[derive(Default)]
struct Machine {
    stack: Vec<Item>,
    /// Where on the stack the marks are.
    marks: Vec<usize>,
    memo: HashMap<u32, Item>,
    tuples: Vec<Vec<Item>>,
    dicts: Vec<Vec<(Item, Item)>>,
    tensors: Vec<PickledTensor>,
}

/// The tensors of a pickled dict by their names; values that are no tensors are left out.
pub(super) fn state_dict(pickle: &[u8]) -> Result<Vec<(String, PickledTensor)>, String> {
    let mut machine = Machine::default();
    let mut code = Code { bytes: pickle, at: 0 };
    let top = loop {
        let at = code.at;
        let instruction = code.byte()?;
        if instruction == b'.' {
            break machine.pop()?;
        }
        machine
            .step(instruction, &mut code)
            .map_err(|why| format!("byte {at} of its pickle: {why}"))?;
    };
    let Item::Dict(dict) = top else {
        return Err("it holds no dict of tensors; expected a state dict".into());
    };
    let (mut found, mut names) = (Vec::new(), HashSet::new());
    for (key, value) in &machine.dicts[dict] {
        let (Item::Text(name), Item::Tensor(tensor)) = (key, value) else { continue };
        if name.len() > NAME_MAX {
            let (shown, len) = (name.chars().take(40).collect::<String>(), name.len());
            return Err(format!(
                "a tensor `{shown}…` with a name of {len} bytes; at most {NAME_MAX} are read"
            ));
        }
        // A dict has each key once. In a pickle a few bytes repeat a name, and each would be copied here.
        if !names.insert(&**name) {
            return Err(format!("it has tensor `{name}` twice"));
        }
        found.push((name.to_string(), machine.tensors[*tensor].clone()));
    }
    Ok(found)
}

/// The instructions.
struct Code<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Code<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], String> {
        let taken = self.bytes.get(self.at..).and_then(|rest| rest.get(..len));
        let taken = taken.ok_or("its pickle ends in the middle of an instruction")?;
        self.at += len;
        Ok(taken)
    }

    fn byte(&mut self) -> Result<u8, String> {
        Ok(self.take(1)?[0])
    }

    fn u16(&mut self) -> Result<u16, String> {
        let bytes = self.take(2)?;
        Ok(u16::from_le_bytes([bytes[0], bytes[1]]))
    }

    fn u32(&mut self) -> Result<u32, String> {
        let bytes = self.take(4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    fn text(&mut self, len: usize) -> Result<&'a str, String> {
        std::str::from_utf8(self.take(len)?).map_err(|_| "a text that is no UTF-8".into())
    }

    fn line(&mut self) -> Result<&'a str, String> {
        let rest = &self.bytes[self.at..];
        let end = rest.iter().position(|b| *b == b'\n').ok_or("a line without an end")?;
        let line = self.text(end)?;
        self.at += 1;
        Ok(line)
    }
}

impl Machine {
    fn pop(&mut self) -> Result<Item, String> {
        let bottom = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= bottom {
            return Err("its stack is empty".into());
        }
        self.stack.pop().ok_or_else(|| "its stack is empty".into())
    }

    /// What lies above the last mark.
    fn pop_mark(&mut self) -> Result<Vec<Item>, String> {
        let mark = self.marks.pop().ok_or("there is no mark")?;
        Ok(self.stack.split_off(mark))
    }

    fn push_tuple(&mut self, items: Vec<Item>) {
        self.tuples.push(items);
        self.stack.push(Item::Tuple(self.tuples.len() - 1));
    }

    fn push_dict(&mut self) {
        self.dicts.push(Vec::new());
        self.stack.push(Item::Dict(self.dicts.len() - 1));
    }

    fn memoize(&mut self, index: u32) -> Result<(), String> {
        let top = self.stack.last().cloned().ok_or("its stack is empty")?;
        self.memo.insert(index, top);
        Ok(())
    }

    fn recall(&mut self, index: u32) -> Result<(), String> {
        let item = self.memo.get(&index).cloned();
        self.stack.push(item.ok_or_else(|| format!("nothing was kept as {index}"))?);
        Ok(())
    }

    fn text(&mut self, text: &str) {
        self.stack.push(Item::Text(text.into()));
    }

    /// One instruction; its code has been read, its operand not.
    fn step(&mut self, instruction: u8, code: &mut Code<'_>) -> Result<(), String> {
        match instruction {
            // PROTO, FRAME
            0x80 => drop(code.take(1)?),
            0x95 => drop(code.take(8)?),
            b'(' => self.marks.push(self.stack.len()),
            b'}' => self.push_dict(),
            b']' => self.stack.push(Item::List),
            b')' => self.push_tuple(Vec::new()),
            // BINPUT, LONG_BINPUT, MEMOIZE; BINGET, LONG_BINGET
            b'q' => self.memoize(code.byte()?.into())?,
            b'r' => self.memoize(code.u32()?)?,
            0x94 => self.memoize(self.memo.len() as u32)?,
            b'h' => self.recall(code.byte()?.into())?,
            b'j' => self.recall(code.u32()?)?,
            b'N' => self.stack.push(Item::None),
            0x88 | 0x89 => self.stack.push(Item::Bool),
            b'J' => self.stack.push(Item::Int(i64::from(code.u32()? as i32))),
            b'K' => self.stack.push(Item::Int(code.byte()?.into())),
            b'M' => self.stack.push(Item::Int(code.u16()?.into())),
            0x8a => {
                let len = code.byte()?;
                let number = long(code.take(len.into())?)?;
                self.stack.push(Item::Int(number));
            }
            b'G' => {
                code.take(8)?;
                self.stack.push(Item::Float);
            }
            b'X' => {
                let len = code.u32()?;
                let text = code.text(len as usize)?;
                self.text(text);
            }
            0x8c => {
                let len = code.byte()?;
                let text = code.text(len.into())?;
                self.text(text);
            }
            b'c' => {
                let known = Known::of(code.line()?, code.line()?)?;
                self.stack.push(Item::Known(known));
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Item::Text(name), Item::Text(module)) = (name, module) else {
                    return Err("a name that is no text".into());
                };
                self.stack.push(Item::Known(Known::of(&module, &name)?));
            }
            b't' => {
                let items = self.pop_mark()?;
                self.push_tuple(items);
            }
            0x85..=0x87 => {
                let mut items = Vec::new();
                for _ in 0x84..instruction {
                    items.push(self.pop()?);
                }
                items.reverse();
                self.push_tuple(items);
            }
            // Lists hold hooks and the like: nothing that is wanted.
            b'a' => drop(self.pop()?),
            b'e' => drop(self.pop_mark()?),
            b's' => {
                let (value, key) = (self.pop()?, self.pop()?);
                self.set(vec![key, value])?;
            }
            b'u' => {
                let items = self.pop_mark()?;
                self.set(items)?;
            }
            b'Q' => self.storage()?,
            b'R' => self.call()?,
            b'b' => {
                // The attributes of an ordered dict: `_metadata`.
                self.pop()?;
                if !matches!(self.stack.last(), Some(Item::Dict(_))) {
                    return Err("it sets the state of something that is no dict".into());
                }
            }
            other => {
                return Err(format!(
                    "instruction {other:#04x}, which no state dict needs; nothing is executed"
                ));
            }
        }
        Ok(())
    }

    fn set(&mut self, items: Vec<Item>) -> Result<(), String> {
        let Some(Item::Dict(dict)) = self.stack.last() else {
            return Err("it sets an item of something that is no dict".into());
        };
        let (pairs, rest) = items.as_chunks::<2>();
        if !rest.is_empty() {
            return Err("a key without a value".into());
        }
        let pairs = pairs.iter().map(|[key, value]| (key.clone(), value.clone()));
        self.dicts[*dict].extend(pairs);
        Ok(())
    }

    fn pop_tuple(&mut self) -> Result<Vec<Item>, String> {
        /// More than any call of a state dict has.
        const ARGUMENTS_MAX: usize = 16;
        match self.pop()? {
            Item::Tuple(tuple) if self.tuples[tuple].len() > ARGUMENTS_MAX => {
                Err(format!("a call with {} arguments", self.tuples[tuple].len()))
            }
            Item::Tuple(tuple) => Ok(self.tuples[tuple].clone()),
            other => Err(format!("a {} where a tuple should be", other.kind())),
        }
    }

    /// `("storage", type, name, device, elements)`.
    fn storage(&mut self) -> Result<(), String> {
        let id = self.pop_tuple()?;
        match id.as_slice() {
            [Item::Text(what), Item::Known(Known::Storage(of)), Item::Text(key), ..]
                if &**what == "storage" =>
            {
                let item = Item::Storage(of, key.clone());
                self.stack.push(item);
                Ok(())
            }
            _ => Err("a reference to something that is no storage of a known type".into()),
        }
    }

    fn call(&mut self) -> Result<(), String> {
        let arguments = self.pop_tuple()?;
        match (self.pop()?, arguments.as_slice()) {
            (Item::Known(Known::OrderedDict), []) => self.push_dict(),
            (Item::Known(Known::Size), [Item::Tuple(of)]) => self.stack.push(Item::Tuple(*of)),
            (Item::Known(Known::RebuildParameter), [tensor @ Item::Tensor(_), ..]) => {
                self.stack.push(tensor.clone());
            }
            (
                Item::Known(Known::RebuildTensor),
                [
                    Item::Storage(of, key),
                    Item::Int(first),
                    Item::Tuple(shape),
                    Item::Tuple(strides),
                    ..,
                ],
            ) => {
                let tensor = PickledTensor {
                    storage: of,
                    key: key.clone(),
                    first: u64::try_from(*first).map_err(|_| "a storage before its beginning")?,
                    shape: self.sizes(*shape)?,
                    strides: self.sizes(*strides)?,
                };
                self.tensors.push(tensor);
                self.stack.push(Item::Tensor(self.tensors.len() - 1));
            }
            (what, _) => {
                return Err(format!("a {} with arguments that it does not take", what.kind()));
            }
        }
        Ok(())
    }

    fn sizes(&self, tuple: usize) -> Result<Vec<u64>, String> {
        const DIMS_MAX: usize = 8;
        let items = &self.tuples[tuple];
        if items.len() > DIMS_MAX {
            return Err(format!("a tensor of {} dimensions", items.len()));
        }
        let size = |item: &Item| match item {
            Item::Int(n) => u64::try_from(*n).map_err(|_| format!("a size of {n}")),
            other => Err(format!("a {} where a size should be", other.kind())),
        };
        items.iter().map(size).collect()
    }
}

/// A whole number of up to eight bytes, the lowest first.
fn long(bytes: &[u8]) -> Result<i64, String> {
    if bytes.len() > 8 {
        return Err(format!("a number of {} bytes", bytes.len()));
    }
    let fill = if bytes.last().is_some_and(|last| last & 0x80 != 0) { 0xFF } else { 0 };
    let mut all = [fill; 8];
    all[..bytes.len()].copy_from_slice(bytes);
    Ok(i64::from_le_bytes(all))
}

#[cfg(test)]
#[path = "pickle_test.rs"]
mod tests;
