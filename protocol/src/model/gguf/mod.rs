//! The header of a GGUF file: what it says of itself, and where its tensors are.
//!
//! ```text
//! "GGUF" │ version │ tensors │ keys │ key: type: value … │ name: dims: type: offset … │ padding │ data
//! ```
//!
//! Nothing is believed: every length is compared with what is left of the file before anything is
//! allocated for it, every tensor's range with the file's end and with its neighbours'.

mod architectures;
mod config;
mod model;
mod parts;

pub(super) use model::{Found, open, renamed};
pub use parts::{all_parts, first_part, gguf_of, stem};

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{BufReader, Read};
use std::ops::Range;
use std::path::Path;

use crate::model::checkpoint::CheckpointError;
use crate::model::stored::StoredType;

/// The longest header: a vocabulary of a million tokens with its merges has some forty MiB.
pub(crate) const HEADER_LEN_MAX: u64 = 256 << 20;
/// More tensors than any published model has.
const TENSORS_MAX: u64 = 1 << 20;
/// The longest tensor of rotations' factors; a head of 512 has 256 of four bytes.
const FACTORS_MAX: u64 = 1 << 16;
/// More keys than any published file has.
const KEYS_MAX: u64 = 1 << 16;
/// Elements of all lists together. In memory each takes 32 bytes, and a vocabulary of a million tokens
/// with its merges, scores and kinds has four million.
const ELEMENTS_MAX: u64 = 1 << 24;
/// The longest key or name of a tensor; the format says 65,535 and 64.
const NAME_MAX: u64 = 1 << 10;
/// Dimensions of a tensor, as the format says.
const DIMS_MAX: u32 = 4;

/// A value of the metadata.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Any unsigned whole number.
    Unsigned(u64),
    /// Any signed whole number.
    Signed(i64),
    /// Any number with a fraction.
    Float(f64),
    /// True or false.
    Bool(bool),
    /// A text; bytes that are no UTF-8 are replaced.
    Text(String),
    /// Values of one type.
    List(Vec<Value>),
}

impl Value {
    /// As a whole number that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Value::Unsigned(n) => Some(*n),
            Value::Signed(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }

    /// As a number.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Value::Unsigned(n) => Some(*n as f64),
            Value::Signed(n) => Some(*n as f64),
            Value::Float(n) => Some(*n),
            _ => None,
        }
    }

    /// As a text.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// As true or false.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            Value::Bool(yes) => Some(*yes),
            _ => None,
        }
    }

    /// As a list.
    pub fn as_list(&self) -> Option<&[Value]> {
        match self {
            Value::List(values) => Some(values),
            _ => None,
        }
    }
}

/// A file's header.
#[derive(Debug)]
pub struct Gguf {
    /// The metadata.
    pub values: BTreeMap<String, Value>,
    /// Its tensors in the order of their data.
    pub tensors: Vec<GgufTensor>,
    /// Where each stands among them, by name: a model asks for as many as there are.
    places: HashMap<String, usize>,
    /// The length of the whole file.
    pub file_len: u64,
    /// The length of the header, without what pads it.
    pub header_len: u64,
    /// BLAKE3 of the header's bytes.
    pub header_hash: [u8; 32],
}

/// One tensor as the header describes it.
#[derive(Clone, Debug)]
pub struct GgufTensor {
    /// Its name.
    pub name: String,
    /// Its shape, rows first: the file has it the other way round.
    pub shape: Vec<u64>,
    /// The type of its elements, or the format's number of a type that is not read.
    pub dtype: Result<StoredType, u32>,
    /// From the file's beginning.
    pub offset: u64,
    /// Bytes; 0 where the type is not read.
    pub len: u64,
}

impl Gguf {
    /// Reads and checks the header of a file.
    pub fn read(path: &Path) -> Result<Self, CheckpointError> {
        let unreadable = |source| CheckpointError::Read { file: path.to_owned(), source };
        let metadata = std::fs::metadata(path).map_err(unreadable)?;
        if !metadata.is_file() {
            let file = path.to_owned();
            return Err(CheckpointError::Gguf { file, reason: "it is not a regular file".into() });
        }
        let file = File::open(path).map_err(unreadable)?;
        Self::parse(BufReader::new(file), metadata.len()).map_err(|error| match error {
            Refused::Io(source) => unreadable(source),
            Refused::Bad(reason) => CheckpointError::Gguf { file: path.to_owned(), reason },
        })
    }

    /// The same of any bytes, of which there are `file_len`.
    fn parse(from: impl Read, file_len: u64) -> Result<Self, Refused> {
        let mut reader = Reader::new(from, file_len);
        let magic = reader.array::<4>("the magic")?;
        if &magic != b"GGUF" {
            return Err(Refused::Bad(format!("it begins with {magic:?}; expected `GGUF`")));
        }
        let version = reader.u32("the version")?;
        if !(2..=3).contains(&version) {
            let words =
                format!("it has version {version} of the format; versions 2 and 3 are read");
            return Err(Refused::Bad(words));
        }
        // A tensor takes at least 24 bytes of the header, a key 13.
        let tensors = reader.count("tensors", TENSORS_MAX, 24)?;
        let keys = reader.count("keys", KEYS_MAX, 13)?;
        let mut values = BTreeMap::new();
        for _ in 0..keys {
            let key = reader.text("a key", NAME_MAX)?;
            let value_type = reader.u32(&key)?;
            let value = reader.value(&key, value_type)?;
            if values.insert(key.clone(), value).is_some() {
                return Err(Refused::Bad(format!("it has key `{key}` twice")));
            }
        }
        let mut found = Vec::new();
        for _ in 0..tensors {
            found.push(reader.tensor()?);
        }
        let alignment = values.get("general.alignment").map_or(Some(32), Value::as_u64);
        let alignment = alignment.filter(|a| a.is_power_of_two() && *a <= 1 << 20);
        let alignment = alignment.ok_or_else(|| {
            Refused::Bad("`general.alignment` is no power of two up to a mebibyte".into())
        })?;
        let data = reader.done.next_multiple_of(alignment);
        let tensors = place(found, data, alignment, file_len)?;
        let (header_len, header_hash) = (reader.done, *reader.hasher.finalize().as_bytes());
        let places = (0..).zip(&tensors).map(|(at, tensor)| (tensor.name.clone(), at)).collect();
        Ok(Self { values, tensors, places, file_len, header_len, header_hash })
    }

    /// A value by its key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    /// A tensor by its name.
    pub fn tensor(&self, name: &str) -> Option<&GgufTensor> {
        self.tensors.get(*self.places.get(name)?)
    }
}

/// How long the header is of a file of this length that begins with what is read here, and of which no more
/// is read, and where the factors of rotations are, which are looked at with it; why it is none.
pub(crate) fn header_len(from: impl Read, file_len: u64) -> Result<(u64, Vec<Range<u64>>), String> {
    let header = Gguf::parse(from, file_len).map_err(|refused| match refused {
        Refused::Io(error) => error.to_string(),
        Refused::Bad(reason) => reason,
    })?;
    // By their names, of which a file has each once: what starts alike could be a million requests.
    let factors = config::FACTORS.iter().filter_map(|name| header.tensor(name));
    let factors = factors.filter(|tensor| tensor.dtype.is_ok());
    let factors = factors.map(|tensor| tensor.offset..tensor.offset + tensor.len.min(FACTORS_MAX));
    Ok((header.header_len, factors.collect()))
}

/// Gives tensors their place in the file and sorts them by it; no two may share bytes.
fn place(
    mut tensors: Vec<GgufTensor>,
    data: u64,
    alignment: u64,
    file_len: u64,
) -> Result<Vec<GgufTensor>, Refused> {
    let mut names = HashSet::new();
    for tensor in &mut tensors {
        let bad = |why: String| Refused::Bad(format!("tensor `{}` {why}", tensor.name));
        if !names.insert(tensor.name.clone()) {
            return Err(bad("is there twice".into()));
        }
        if !tensor.offset.is_multiple_of(alignment) {
            return Err(bad(format!("begins at {}, no multiple of {alignment}", tensor.offset)));
        }
        let Ok(dtype) = tensor.dtype else { continue };
        let (columns, rows) = tensor.shape.split_last().unwrap_or((&1, &[]));
        let (elements, _) = dtype.block();
        if !columns.is_multiple_of(elements) {
            let words =
                format!("has rows of {columns} elements; blocks of {dtype} have {elements}");
            return Err(bad(words));
        }
        let row = dtype.row_bytes(*columns);
        let len = row.and_then(|len| rows.iter().try_fold(len, |len, n| len.checked_mul(*n)));
        let end = len.and_then(|len| data.checked_add(tensor.offset)?.checked_add(len));
        match (len, end) {
            (Some(len), Some(end)) if end <= file_len => {
                tensor.offset += data;
                tensor.len = len;
            }
            _ => {
                let end = end.map_or("beyond any file".to_owned(), |end| format!("at byte {end}"));
                let words = format!(
                    "ends {end}, but the file has {file_len} bytes: it is truncated; copy or \
                     download it again"
                );
                return Err(bad(words));
            }
        }
    }
    tensors.sort_by_key(|tensor| (tensor.offset, tensor.len));
    let placed = || tensors.iter().filter(|tensor| tensor.dtype.is_ok());
    for (one, next) in placed().zip(placed().skip(1)) {
        if one.offset + one.len > next.offset {
            let words = format!("tensors `{}` and `{}` share bytes", one.name, next.name);
            return Err(Refused::Bad(words));
        }
    }
    Ok(tensors)
}

/// Why a header is refused.
#[derive(Debug)]
enum Refused {
    Io(std::io::Error),
    Bad(String),
}

/// Reads the header, and knows how much of the file there still is.
struct Reader<R> {
    from: R,
    done: u64,
    left: u64,
    /// Elements of lists that are still read.
    elements_left: u64,
    hasher: blake3::Hasher,
}

impl<R: Read> Reader<R> {
    fn new(from: R, file_len: u64) -> Self {
        Self {
            from,
            done: 0,
            left: file_len.min(HEADER_LEN_MAX),
            elements_left: ELEMENTS_MAX,
            hasher: blake3::Hasher::new(),
        }
    }

    /// Refuses what is longer than what is left.
    fn expect(&self, what: &str, bytes: Option<u64>) -> Result<(), Refused> {
        if bytes.is_some_and(|bytes| bytes <= self.left) {
            return Ok(());
        }
        let bytes = bytes.map_or("too many".to_owned(), |bytes| bytes.to_string());
        Err(Refused::Bad(format!(
            "{what} at byte {} takes {bytes} bytes, and {} are left: it is truncated or damaged; copy or download \
             it again",
            self.done, self.left
        )))
    }

    fn fill(&mut self, what: &str, buffer: &mut [u8]) -> Result<(), Refused> {
        self.expect(what, Some(buffer.len() as u64))?;
        self.from.read_exact(buffer).map_err(Refused::Io)?;
        self.done += buffer.len() as u64;
        self.left -= buffer.len() as u64;
        self.hasher.update(buffer);
        Ok(())
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Refused> {
        let mut bytes = [0; N];
        self.fill(what, &mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32, Refused> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64, Refused> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// How many of something follow that takes at least `each` bytes.
    fn count(&mut self, what: &str, max: u64, each: u64) -> Result<u64, Refused> {
        let count = self.u64(what)?;
        if count > max {
            return Err(Refused::Bad(format!(
                "it announces {count} {what}; at most {max} are read"
            )));
        }
        self.expect(&format!("{count} {what}"), count.checked_mul(each))?;
        Ok(count)
    }

    fn text(&mut self, what: &str, max: u64) -> Result<String, Refused> {
        let len = self.u64(what)?;
        if len > max {
            return Err(Refused::Bad(format!("{what} has {len} bytes; at most {max} are read")));
        }
        self.expect(what, Some(len))?;
        let mut bytes = vec![0; len as usize];
        self.fill(what, &mut bytes)?;
        Ok(String::from_utf8(bytes)
            .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
    }

    fn value(&mut self, key: &str, value_type: u32) -> Result<Value, Refused> {
        Ok(match value_type {
            0 => Value::Unsigned(self.array::<1>(key)?[0].into()),
            1 => Value::Signed(i8::from_le_bytes(self.array(key)?).into()),
            2 => Value::Unsigned(u16::from_le_bytes(self.array(key)?).into()),
            3 => Value::Signed(i16::from_le_bytes(self.array(key)?).into()),
            4 => Value::Unsigned(self.u32(key)?.into()),
            5 => Value::Signed(i32::from_le_bytes(self.array(key)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array(key)?).into()),
            7 => Value::Bool(self.array::<1>(key)?[0] != 0),
            8 => Value::Text(self.text(key, HEADER_LEN_MAX)?),
            9 => self.list(key)?,
            10 => Value::Unsigned(self.u64(key)?),
            11 => Value::Signed(i64::from_le_bytes(self.array(key)?)),
            12 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            other => {
                return Err(Refused::Bad(format!(
                    "key `{key}` has a value of type {other}; the format has types 0 to 12"
                )));
            }
        })
    }

    fn list(&mut self, key: &str) -> Result<Value, Refused> {
        let value_type = self.u32(key)?;
        let each = match value_type {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            other => {
                let words = format!("key `{key}` is a list of values of type {other}: not read");
                return Err(Refused::Bad(words));
            }
        };
        let count = self.count(&format!("elements of `{key}`"), self.elements_left, each)?;
        self.elements_left -= count;
        let values = (0..count).map(|_| self.value(key, value_type));
        Ok(Value::List(values.collect::<Result<_, _>>()?))
    }

    fn tensor(&mut self) -> Result<GgufTensor, Refused> {
        let name = self.text("the name of a tensor", NAME_MAX)?;
        let dims = self.u32(&name)?;
        if dims > DIMS_MAX {
            return Err(Refused::Bad(format!(
                "tensor `{name}` has {dims} dimensions; at most {DIMS_MAX} are read"
            )));
        }
        let mut shape = Vec::new();
        for _ in 0..dims {
            shape.push(self.u64(&name)?);
        }
        shape.reverse();
        let dtype = self.u32(&name)?;
        let offset = self.u64(&name)?;
        Ok(GgufTensor { name, shape, dtype: stored_type(dtype).ok_or(dtype), offset, len: 0 })
    }
}

/// The format's numbers of types.
fn stored_type(number: u32) -> Option<StoredType> {
    Some(match number {
        0 => StoredType::F32,
        1 => StoredType::F16,
        2 => StoredType::Q4_0,
        3 => StoredType::Q4_1,
        6 => StoredType::Q5_0,
        7 => StoredType::Q5_1,
        8 => StoredType::Q8_0,
        12 => StoredType::Q4K,
        13 => StoredType::Q5K,
        14 => StoredType::Q6K,
        30 => StoredType::Bf16,
        39 => StoredType::Mxfp4Block,
        _ => return None,
    })
}

/// What a type that is not read is called.
pub(super) fn type_name(number: u32) -> String {
    let known = match number {
        10 => "Q2_K",
        11 => "Q3_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        40 => "NVFP4",
        _ => return format!("type {number}"),
    };
    known.to_owned()
}

#[cfg(test)]
mod model_test;
#[cfg(test)]
#[path = "gguf_test.rs"]
mod tests;
