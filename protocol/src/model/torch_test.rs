use std::path::PathBuf;

use super::*;

/// Files that torch 2 wrote: `scripts` beside them.
fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/torch/small.pth")
}

fn refusal(change: impl FnOnce(&mut Vec<u8>)) -> String {
    let folder = tempfile::tempdir().unwrap();
    let mut bytes = std::fs::read(fixture()).unwrap();
    change(&mut bytes);
    let path = folder.path().join("m.pth");
    std::fs::write(&path, bytes).unwrap();
    read(&path).err().expect("a refusal").to_string()
}

#[test]
fn tensors_are_ranges_of_the_file() {
    let header = read(&fixture()).unwrap();
    let bytes = std::fs::read(fixture()).unwrap();
    let floats = |name: &str| -> Vec<f32> {
        let tensor = header.tensors.iter().find(|tensor| tensor.name == name).unwrap();
        assert_eq!(tensor.dtype, "F32", "{name}");
        let data = &bytes[tensor.offset as usize..][..tensor.len as usize];
        data.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
    };
    assert_eq!(floats("counting"), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    // A part of the same storage.
    assert_eq!(floats("part"), [2.0, 3.0]);
    let half = header.tensors.iter().find(|tensor| tensor.name == "half").unwrap();
    assert_eq!((half.dtype.as_str(), half.shape.as_slice(), half.len), ("BF16", &[2, 2][..], 8));
}

#[test]
fn damaged_archives_are_refused() {
    let cut = refusal(|bytes| bytes.truncate(bytes.len() / 2));
    assert!(cut.contains("no zip archive"), "{cut}");
    let old = refusal(|bytes| *bytes = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.".to_vec());
    assert!(old.contains("torch before 1.6"), "{old}");
    let asks = refusal(|bytes| {
        let at = bytes.windows(5).position(|w| w == b"torch").unwrap();
        bytes[at..at + 5].copy_from_slice(b"shell");
    });
    assert!(asks.contains("`shell."), "{asks}");
}

#[test]
fn a_tensor_whose_rows_are_apart_is_refused() {
    let tensor = PickledTensor {
        storage: "FloatStorage",
        key: "0".into(),
        first: 0,
        shape: vec![2, 3],
        strides: vec![1, 2],
    };
    let words = |tensor: &PickledTensor, len| match located("w".into(), tensor, (64, len)) {
        Ok(_) => panic!("taken"),
        Err(Refused::Bad(reason)) => reason,
        Err(Refused::Io(error)) => error.to_string(),
    };
    assert!(words(&tensor, 24).contains("strides [1, 2] for shape [2, 3]"));
    let rows = PickledTensor { strides: vec![3, 1], ..tensor };
    assert!(located("w".into(), &rows, (64, 24)).is_ok());
    assert!(words(&rows, 23).contains("more than its storage of 23 bytes"));
    let huge =
        PickledTensor { shape: vec![u64::MAX, u64::MAX], strides: vec![u64::MAX, 1], ..rows };
    assert!(words(&huge, 24).contains("more than its storage"));
}
