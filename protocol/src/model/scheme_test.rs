use super::*;

fn scheme(json: &str) -> Result<Scheme, String> {
    Scheme::of(&serde_json::from_str(json).unwrap()).map_err(|error| error.to_string())
}

#[test]
fn schemes_are_read_by_name() {
    let four = |packing, group, zero_offset| Scheme::FourBits { packing, group, zero_offset };
    for (json, expected) in [
        (r#"{"quant_method": "fp8"}"#, Scheme::Fp8 { block: (0, 0) }),
        (
            r#"{"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 64]}"#,
            Scheme::Fp8 { block: (128, 64) },
        ),
        (
            r#"{"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups":
                {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}}}"#,
            Scheme::Fp8 { block: (0, 0) },
        ),
        (
            r#"{"quant_method": "gptq", "bits": 4, "group_size": -1}"#,
            four(FourBitPacking::Gptq, 0, 1),
        ),
        (
            r#"{"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}"#,
            four(FourBitPacking::Gptq, 32, 0),
        ),
        (
            r#"{"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}"#,
            four(FourBitPacking::Awq, 64, 0),
        ),
        (r#"{"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}"#, Scheme::Mxfp4),
    ] {
        assert_eq!(scheme(json), Ok(expected), "{json}");
    }
}

#[test]
fn what_is_not_read_is_refused_by_name() {
    for (json, words) in [
        (r#"{"quant_method": "bitsandbytes"}"#, "`bitsandbytes`"),
        (r#"{"load_in_4bit": true}"#, "a quantisation with ``"),
        (r#"{"quant_method": "gptq", "bits": 8}"#, "bits 8"),
        (r#"{"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}"#, "`marlin`"),
        (r#"{"quant_method": "gptq", "bits": 4, "group_size": 0}"#, "group_size 0"),
        (r#"{"quant_method": "awq", "bits": 4, "version": "gemv"}"#, "`gemv`"),
        (r#"{"quant_method": "fp8", "fmt": "e5m2"}"#, "e5m2"),
        (r#"{"quant_method": "fp8", "weight_block_size": [128]}"#, "[128]"),
        (r#"{"quant_method": "compressed-tensors", "format": "pack-quantized"}"#, "pack-quantized"),
    ] {
        let refusal = scheme(json).expect_err(json);
        assert!(refusal.contains(words) && refusal.contains("supported: `fp8`"), "{refusal}");
    }
}

#[test]
fn what_belongs_to_a_matrix_is_stored_as_what_reads_it_takes() {
    let found = |dtype: &str| HeaderTensor {
        name: "w.qweight".to_owned(),
        dtype: dtype.to_owned(),
        shape: vec![8, 4],
        offset: 0,
        len: 0,
    };
    let check = |dtype: &str, types| {
        let file = std::path::Path::new("m").into();
        part(file, found(dtype), &[8, 4], types).map(|part| part.dtype).map_err(|e| e.to_string())
    };
    assert_eq!(check("I32", WORDS), Ok(StoredType::I32));
    assert_eq!(check("F16", FLOATS), Ok(StoredType::F16));
    // Two bytes each where four are read: half of the tensor would be missing.
    for (dtype, types, words) in [
        ("F16", WORDS, "stored as F16; expected I32"),
        ("I64", WORDS, "stored as I64; expected I32"),
        ("I32", FLOATS, "stored as I32; expected F32, F16, BF16"),
    ] {
        let refusal = check(dtype, types).unwrap_err();
        assert!(refusal.contains("w.qweight") && refusal.contains(words), "{refusal}");
    }
}
