use super::*;

/// The bytes of a dict with one tensor `w` of shape `[2, 3]`, as torch writes it with protocol 2.
fn good() -> Vec<u8> {
    let text =
        |text: &str| [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat();
    [
        b"\x80\x02}q\x00".to_vec(),
        b"(".to_vec(),
        text("w"),
        b"q\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02((".to_vec(),
        text("storage"),
        b"ctorch\nFloatStorage\nq\x03".to_vec(),
        text("0"),
        text("cpu"),
        b"K\x0atQK\x04K\x02K\x03\x86K\x03K\x01\x86\x89ccollections\nOrderedDict\n)RtR".to_vec(),
        text("step"),
        b"M\x10\x00".to_vec(),
        b"u.".to_vec(),
    ]
    .concat()
}

#[test]
fn a_state_dict_is_its_tensors() {
    let expected = PickledTensor {
        storage: "FloatStorage",
        key: "0".into(),
        first: 4,
        shape: vec![2, 3],
        strides: vec![3, 1],
    };
    assert_eq!(state_dict(&good()), Ok(vec![("w".to_owned(), expected)]));
}

#[test]
fn a_pickle_cut_anywhere_is_refused() {
    let bytes = good();
    for len in 0..bytes.len() {
        assert!(state_dict(&bytes[..len]).is_err(), "{len}");
    }
}

#[test]
fn nothing_but_tensors_is_taken_out_of_a_pickle() {
    let evil: [(&[u8], &str); 8] = [
        (b"\x80\x02cos\nsystem\n(X\x02\0\0\0lstR.", "`os.system`"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.", "`builtins.eval`"),
        (b"\x80\x02ctorch\nload\n.", "`torch.load`"),
        (b"\x80\x02]i__main__\nX\n.", "instruction 0x69"),
        (b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.", "arguments that it does not take"),
        (b"\x80\x02ccollections\nOrderedDict\n}\x81.", "instruction 0x81"),
        (b"\x80\x02K\x01.", "no dict of tensors"),
        (b"\x80\x02K\x01}b.", "no dict"),
    ];
    for (bytes, words) in evil {
        let reason = state_dict(bytes).err().unwrap_or_else(|| panic!("{words} was taken"));
        assert!(reason.contains(words), "expected {words:?} in {reason:?}");
    }
}

#[test]
fn a_pickle_that_nests_without_end_is_refused_without_harm() {
    // A million tuples in each other, then a tuple of copies of it.
    let mut bytes = b"\x80\x02)".to_vec();
    bytes.extend([0x85].repeat(1_000_000));
    bytes.extend(b"q\x00");
    for _ in 0..100_000 {
        bytes.extend(b"h\x00h\x00\x86q\x00");
    }
    bytes.push(b'.');
    assert!(state_dict(&bytes).is_err());
}

/// `text` as an instruction that pushes it.
fn text(text: &str) -> Vec<u8> {
    [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat()
}

#[test]
fn a_name_that_is_repeated_or_long_is_refused_before_it_is_copied() {
    let tensor = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n\
                   X\x01\0\0\x000X\x03\0\0\0cpuK\x0atQK\x00))\x89)tRq\x01";
    let of = |name: &str, pairs: usize| {
        // A tensor as 1 and a name as 0 of the memo, then pairs of both: four bytes each.
        let pairs = b"h\x00h\x01".repeat(pairs);
        [
            b"\x80\x02".to_vec(),
            tensor.to_vec(),
            text(name),
            b"q\x00}(".to_vec(),
            pairs,
            b"u.".into(),
        ]
        .concat()
    };
    assert_eq!(state_dict(&of("w", 1)).map(|found| found.len()), Ok(1));
    let long = "w".repeat(1025);
    assert_eq!(state_dict(&of(&long[1..], 1)).map(|found| found.len()), Ok(1));
    // Copied once a pair, this would be 200 GB.
    let huge = "w".repeat(1 << 20);
    for (name, pairs, words) in [
        ("w", 2, "twice"),
        (long.as_str(), 1, "a name of 1025 bytes"),
        (huge.as_str(), 200_000, "a name of 1048576 bytes"),
    ] {
        let reason = state_dict(&of(name, pairs)).unwrap_err();
        assert!(reason.contains(words) && reason.len() < 200, "{reason}");
    }
}

#[test]
fn a_refusal_names_the_kind_of_what_is_wrong_and_not_all_of_it() {
    let huge = text(&"w".repeat(1 << 20));
    let size = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n\
                 X\x01\0\0\x000tQK\x00";
    for (pickle, words) in [
        ([&b"\x80\x02"[..], &huge, b"Q."].concat(), "a text where a tuple"),
        ([&b"\x80\x02"[..], &huge, b")R."].concat(), "a text with arguments"),
        ([&b"\x80\x02"[..], size, &huge, b"\x85)tR."].concat(), "a text where a size"),
    ] {
        let reason = state_dict(&pickle).unwrap_err();
        assert!(
            reason.contains(words) && reason.len() < 200,
            "{}",
            &reason[..reason.len().min(200)]
        );
    }
}
