use super::*;

fn name(path: &str) -> Option<(&str, u64, u64)> {
    PartName::of(Path::new(path)).map(|name| (name.stem, name.number, name.count))
}

#[test]
fn parts_are_known_by_their_names() {
    for (path, expected) in [
        ("/m/A-00002-of-00003.gguf", Some(("A", 2, 3))),
        ("Big-of-fish-00001-of-00012.gguf", Some(("Big-of-fish", 1, 12))),
        ("A-00000-of-00003.gguf", None),
        ("A-00004-of-00003.gguf", None),
        ("A-2-of-3.gguf", None),
        ("A-0000x-of-00003.gguf", None),
        ("A-+0001-of-00003.gguf", None),
        ("A-00001-of-00003.bin", None),
        ("A-00003.gguf", None),
        ("00001-of-00003.gguf", None),
        ("A.gguf", None),
    ] {
        assert_eq!(name(path), expected, "{path}");
    }
    let first = |path: &str| first_part(Path::new(path)).to_string_lossy().into_owned();
    assert_eq!(first("/m/A-00003-of-00003.gguf"), "/m/A-00001-of-00003.gguf");
    assert_eq!(first("/m/A.gguf"), "/m/A.gguf");
    assert_eq!(stem(Path::new("/m/A-00003-of-00003.gguf")), "A");
    assert_eq!(stem(Path::new("/m/A-1.5.gguf")), "A-1.5");
}

/// The model in three parts that llama.cpp's converter wrote.
fn model() -> (tempfile::TempDir, impl Fn(u64) -> PathBuf) {
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/gguf");
    let folder = tempfile::tempdir().unwrap();
    for number in 1..=3 {
        let name = format!("mixtral-bf16-0000{number}-of-00003.gguf");
        std::fs::copy(from.join(&name), folder.path().join(&name)).unwrap();
    }
    let path = folder.path().to_owned();
    (folder, move |number| path.join(format!("mixtral-bf16-0000{number}-of-00003.gguf")))
}

fn refusal(path: &Path) -> String {
    crate::model::Checkpoint::open(path).expect_err("a refusal").to_string()
}

#[test]
fn any_part_and_their_folder_are_the_model() {
    let (folder, part) = model();
    let open = |path: &Path| crate::model::Checkpoint::open(path).unwrap();
    let first = open(&part(1));
    assert_eq!(first.gguf(), Some(&*part(1)));
    for path in [part(2), part(3), folder.path().to_owned()] {
        let other = open(&path);
        assert_eq!(other.gguf(), Some(&*part(1)), "{}", path.display());
        assert_eq!(other.fingerprint(), first.fingerprint());
        assert_eq!(other.check_tokenizer().unwrap(), part(1));
    }
    let files: BTreeSet<_> = first
        .tensors(crate::units::LayerRange::new(0, first.spec().layers))
        .iter()
        .map(|tensor| first.locate(&tensor.name).unwrap().file.to_path_buf())
        .collect();
    let expected: BTreeSet<PathBuf> = (1..=3).map(&part).collect();
    assert_eq!(files, expected);
    // Beside another model the folder does not say which.
    std::fs::copy(part(1), folder.path().join("other.gguf")).unwrap();
    let error = refusal(folder.path());
    assert!(error.contains("several GGUF files"), "{error}");
    assert!(error.contains("mixtral-bf16-00001-of-00003.gguf"), "{error}");
}

#[test]
fn a_change_in_any_part_is_another_model() {
    let (_folder, part) = model();
    let fingerprint = || crate::model::Checkpoint::open(&part(1)).unwrap().fingerprint();
    let before = fingerprint();
    let mut bytes = std::fs::read(part(3)).unwrap();
    bytes.extend([0; 32]);
    std::fs::write(part(3), bytes).unwrap();
    assert_ne!(fingerprint(), before);
}

#[test]
fn a_part_that_is_missing_cut_or_of_another_model_is_named() {
    for lost in 1..=3 {
        let (folder, part) = model();
        std::fs::remove_file(part(lost)).unwrap();
        let other = part(lost % 3 + 1);
        for path in [other.as_path(), folder.path()] {
            let error = refusal(path);
            let name = part(lost).display().to_string();
            let words = format!("part {lost} of 3 is missing");
            assert!(error.contains(&name) && error.contains(&words), "{error}");
        }
        let (_folder, part) = model();
        let bytes = std::fs::read(part(lost)).unwrap();
        std::fs::write(part(lost), &bytes[..bytes.len() / 2]).unwrap();
        let error = refusal(&part(1));
        let name = part(lost).display().to_string();
        assert!(error.contains(&name) && error.contains("truncated"), "{error}");
    }
    let (_folder, part) = model();
    std::fs::copy(part(3), part(2)).unwrap();
    let error = refusal(&part(1));
    assert!(error.contains("00002-of-00003.gguf") && error.contains("is part 3 of 3"), "{error}");
    // Of another model in as many parts.
    let (_folder, part) = model();
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/gguf");
    std::fs::copy(from.join("deepseek3-bf16-00002-of-00003.gguf"), part(2)).unwrap();
    let error = refusal(&part(3));
    assert!(error.contains("00002-of-00003.gguf") && error.contains("another model"), "{error}");
}

#[test]
fn a_part_that_was_renamed_says_so() {
    let (folder, part) = model();
    let path = folder.path().join("fish.gguf");
    std::fs::rename(part(1), &path).unwrap();
    let error = refusal(&path);
    assert!(error.contains("one of 3 parts") && error.contains("-of-00003.gguf"), "{error}");
}
