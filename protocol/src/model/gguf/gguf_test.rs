use super::*;

/// Writes a file as the format's page says.
#[derive(Clone, Default)]
pub(super) struct Writer {
    keys: Vec<(String, u32, Vec<u8>)>,
    tensors: Vec<(String, Vec<u64>, u32, u64)>,
    data: usize,
}

pub(super) fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

impl Writer {
    pub(super) fn key(mut self, key: &str, value_type: u32, value: &[u8]) -> Self {
        self.keys.push((key.to_owned(), value_type, value.to_vec()));
        self
    }

    /// `shape` has rows first.
    pub(super) fn tensor(mut self, name: &str, shape: &[u64], dtype: u32, bytes: usize) -> Self {
        let dims = shape.iter().rev().copied().collect();
        self.tensors.push((name.to_owned(), dims, dtype, self.data as u64));
        self.data += bytes.next_multiple_of(32);
        self
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (key, value_type, value) in &self.keys {
            out.extend(text(key));
            out.extend(value_type.to_le_bytes());
            out.extend(value);
        }
        for (name, dims, dtype, offset) in &self.tensors {
            out.extend(text(name));
            out.extend((dims.len() as u32).to_le_bytes());
            out.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
            out.extend(dtype.to_le_bytes());
            out.extend(offset.to_le_bytes());
        }
        out.resize(out.len().next_multiple_of(32) + self.data, 0);
        out
    }
}

fn parse(bytes: &[u8]) -> Result<Gguf, String> {
    Gguf::parse(bytes, bytes.len() as u64).map_err(|refused| match refused {
        Refused::Io(error) => error.to_string(),
        Refused::Bad(reason) => reason,
    })
}

fn small() -> Writer {
    Writer::default()
        .key("general.architecture", 8, &text("llama"))
        .key("a.list", 9, &[&8_u32.to_le_bytes()[..], &1_u64.to_le_bytes(), &text("ä")].concat())
        .tensor("one", &[3, 32], 8, 3 * 34)
        .tensor("two", &[5], 0, 20)
}

#[test]
fn a_header_is_read_whole() {
    let bytes = small().bytes();
    let found = parse(&bytes).unwrap();
    assert_eq!(found.get("general.architecture").and_then(Value::as_str), Some("llama"));
    assert_eq!(found.get("a.list"), Some(&Value::List(vec![Value::Text("ä".into())])));
    let one = found.tensor("one").unwrap();
    assert_eq!(
        (one.shape.as_slice(), one.dtype, one.len),
        (&[3, 32][..], Ok(StoredType::Q8_0), 102)
    );
    let two = found.tensor("two").unwrap();
    assert_eq!(two.offset, one.offset + 128);
    assert_eq!(two.offset + 32, bytes.len() as u64);
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let bytes = small().bytes();
    // The last tensor ends 12 bytes before the padding does.
    for len in 0..bytes.len() - 12 {
        let reason = parse(&bytes[..len]).err();
        let reason = reason.unwrap_or_else(|| panic!("{len} of {} bytes", bytes.len()));
        assert!(reason.contains("truncated"), "{len}: {reason}");
    }
    parse(&bytes[..bytes.len() - 12]).unwrap();
}

#[test]
fn counts_that_no_file_has_allocate_nothing() {
    let head = |tensors: u64, keys: u64| {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(keys.to_le_bytes());
        bytes.resize(4096, 0);
        bytes
    };
    let list = |count: u64| {
        let list = [&4_u32.to_le_bytes()[..], &count.to_le_bytes()].concat();
        Writer::default().key("long", 9, &list).bytes()
    };
    for (bytes, words) in [
        (head(u64::MAX, 0), "announces 18446744073709551615 tensors"),
        (head(1 << 20, 0), "1048576 tensors"),
        (head(0, 1 << 16), "65536 keys"),
        (list(u64::MAX / 2), "announces 9223372036854775807 elements of `long`"),
        (list(1 << 20), "1048576 elements of `long`"),
        (Writer::default().key(&"k".repeat(2000), 0, &[0]).bytes(), "a key has 2000 bytes"),
        (
            Writer::default().key("k", 8, &u64::MAX.to_le_bytes()).bytes(),
            "k has 18446744073709551615",
        ),
    ] {
        let reason = parse(&bytes).err().unwrap();
        assert!(reason.contains(words), "{reason}");
    }
}

#[test]
fn what_is_not_of_the_format_is_refused_by_name() {
    let nested = [&9_u32.to_le_bytes()[..], &0_u64.to_le_bytes()].concat();
    let mut other_version = small().bytes();
    other_version[4] = 9;
    let mut overlap = small();
    overlap.tensors[1].3 = 32;
    let mut odd = small();
    odd.tensors[1].3 = 100;
    for (bytes, words) in [
        (b"PK\x03\x04".repeat(20), "expected `GGUF`"),
        (other_version, "version 9"),
        (small().key("a.list", 0, &[1]).bytes(), "key `a.list` twice"),
        (small().tensor("one", &[1], 0, 4).bytes(), "tensor `one` is there twice"),
        (small().key("k", 13, &[]).bytes(), "value of type 13"),
        (small().key("k", 9, &nested).bytes(), "list of values of type 9"),
        (
            small().tensor("t", &[2, 33], 8, 68).bytes(),
            "rows of 33 elements; blocks of Q8_0 have 32",
        ),
        (small().tensor("t", &[u64::MAX, u64::MAX], 0, 4).bytes(), "beyond any file"),
        (small().tensor("t", &[1; 5], 0, 4).bytes(), "5 dimensions"),
        (small().key("general.alignment", 4, &7_u32.to_le_bytes()).bytes(), "no power of two"),
        (overlap.bytes(), "tensors `one` and `two` share bytes"),
        (odd.bytes(), "begins at 100, no multiple of 32"),
    ] {
        let reason = parse(&bytes).err().unwrap();
        assert!(reason.contains(words), "expected {words:?} in {reason:?}");
    }
    // A type that is not read is refused when its tensor is wanted.
    let found = parse(&small().tensor("t", &[256], 10, 84).bytes()).unwrap();
    assert_eq!(found.tensor("t").unwrap().dtype, Err(10));
    assert_eq!(type_name(10), "Q2_K");
}

#[test]
fn of_factors_only_those_that_are_read_come_with_the_header_and_not_more_than_they_can_have() {
    let mut file = small()
        .tensor("rope_factors_long.weight", &[32], 0, 128)
        .tensor("rope_freqs.weight", &[1 << 20], 0, 4 << 20)
        .tensor("rope_factors_short.weight", &[256], 10, 84);
    for other in 0..1000 {
        file = file.tensor(&format!("rope_freqs.{other}"), &[1], 0, 4);
    }
    let bytes = file.bytes();
    let found = parse(&bytes).unwrap();
    let at = |name: &str| found.tensor(name).unwrap().offset;
    let (long, all) = (at("rope_factors_long.weight"), at("rope_freqs.weight"));
    let (len, ranges) = header_len(bytes.as_slice(), bytes.len() as u64).unwrap();
    assert_eq!(len, found.header_len);
    // That of a type that is not read has no place.
    assert_eq!(ranges, [all..all + FACTORS_MAX, long..long + 128]);
}

#[test]
fn rows_of_turned_heads_come_back_to_their_places() {
    use crate::model::RowOrder;
    let order = RowOrder::PairsTogether { head_dim: 6 };
    // In the file of each head: 0 3 1 4 2 5.
    let rows: Vec<u64> = (0..12).map(|row| order.model_row(row)).collect();
    assert_eq!(rows, [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]);
}

#[test]
fn tensors_are_found_by_their_names_whatever_the_order_of_their_data() {
    let mut file = small();
    for (i, offset) in [(0, 64), (1, 0), (2, 32)] {
        file.tensors.push((format!("t{i}"), vec![4], 0, file.data as u64 + offset));
    }
    file.data += 96;
    let gguf = parse(&file.bytes()).unwrap();
    for (name, ..) in &file.tensors {
        assert_eq!(gguf.tensor(name).map(|tensor| &tensor.name), Some(name));
    }
    assert!(gguf.tensor("t3").is_none());
    let order: Vec<_> = gguf.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    assert!(order.ends_with(&["t1", "t2", "t0"]), "{order:?}");
}
