//! Loading a shard: what it reads, what it takes of memory, and how it refuses what is damaged.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod support;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use shoal_protocol::model::Checkpoint;
use shoal_protocol::units::Bytes;
use shoal_shard_worker::backend::cpu::{CpuOps, Isa};
use shoal_shard_worker::collective::Alone;
use shoal_shard_worker::model::{LoadError, LoadOptions, WeightsError, load_shard};

use support::{Setup, assignment, fixtures, load, random_model};

/// A copy of a fixture, to damage.
fn copy(name: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixtures().join("models").join(name)).unwrap() {
        let file = entry.unwrap().path();
        std::fs::copy(&file, folder.path().join(file.file_name().unwrap())).unwrap();
    }
    folder
}

fn truncate(file: &Path, by: u64) {
    let handle = std::fs::OpenOptions::new().write(true).open(file).unwrap();
    handle.set_len(handle.metadata().unwrap().len() - by).unwrap();
}

/// The file with this tensor in a model of many files.
fn file_of(folder: &Path, tensor: &str) -> PathBuf {
    Checkpoint::open(folder).unwrap().locate(tensor).unwrap().file.to_path_buf()
}

#[test]
fn damaged_fixtures_are_refused_with_file_and_tensor() {
    const TENSOR: &str = "model.layers.4.mlp.up_proj.weight";
    let check = |damage: &dyn Fn(&Path, &Path), words: &[&str]| {
        let folder = copy("qwen2-many-files");
        let file = file_of(folder.path(), TENSOR);
        damage(folder.path(), &file);
        let error = Checkpoint::open(folder.path()).unwrap_err().to_string();
        let name = file.file_name().unwrap().to_str().unwrap();
        for word in words {
            let word = word.replace("FILE", name);
            assert!(error.contains(&word), "expected {word:?} in: {error}");
        }
    };
    let edit = |file: &Path, from: &str, to: &str| {
        let bytes = std::fs::read(file).unwrap();
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes()).unwrap();
        let edited = [&bytes[..at], to.as_bytes(), &bytes[at + from.len()..]].concat();
        std::fs::write(file, edited).unwrap();
    };
    check(&|_, file| truncate(file, 1), &["FILE: truncated", "tensor `model.", "ends at byte"]);
    check(&|_, file| std::fs::remove_file(file).unwrap(), &["FILE: No such file"]);
    check(&|_, file| std::fs::write(file, "junk").unwrap(), &["FILE: this is no intact"]);
    check(&|_, file| edit(file, "mlp.up_proj", "mlp.xx_proj"), &["FILE: ", TENSOR, "is missing"]);
    // 45 x 32 and 32 x 45 take the same bytes, so that the file itself is still well formed.
    check(
        &|_, file| {
            let bytes = std::fs::read(file).unwrap();
            let at = bytes.windows(TENSOR.len()).position(|w| w == TENSOR.as_bytes()).unwrap();
            let end = at + bytes[at..].iter().position(|&b| b == b'}').unwrap();
            let entry = std::str::from_utf8(&bytes[at..end]).unwrap();
            edit(file, entry, &entry.replace("[45,32]", "[32,45]"));
        },
        &["FILE: ", TENSOR, "has shape [32, 45]", "should be [45, 32]"],
    );
    check(
        &|folder, _| {
            edit(&folder.join("model.safetensors.index.json"), TENSOR, "something.else");
        },
        &["model.safetensors.index.json: ", TENSOR, "is missing"],
    );
}

#[test]
fn what_changes_between_opening_and_loading_is_refused() {
    let folder = copy("qwen2-many-files");
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let setup = Setup::plain(checkpoint.spec());
    let file = file_of(folder.path(), "model.norm.weight");

    let mut other = assignment(&checkpoint, &setup, 0);
    other.replica.model.fingerprint[0] ^= 1;
    let error = load(&checkpoint, &other, 1, setup.isa).err().unwrap();
    assert!(matches!(error, LoadError::OtherModel { .. }), "{error}");

    truncate(&file, 4);
    let error = load(&checkpoint, &assignment(&checkpoint, &setup, 0), 2, setup.isa);
    let error = error.err().unwrap();
    assert!(matches!(error, LoadError::Weights(WeightsError::Read { .. })), "{error}");
    let words = error.to_string();
    assert!(words.contains(file.to_str().unwrap()) && words.contains("tensor `model."), "{words}");
    assert!(words.contains("has become shorter"), "{words}");
}

#[test]
fn assignments_that_no_shard_can_be_are_refused() {
    let folder = copy("llama2-mha");
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let setup = Setup::plain(checkpoint.spec());
    let check = |change: &dyn Fn(&mut shoal_protocol::plan::Assignment), words: &str| {
        let mut changed = assignment(&checkpoint, &setup, 0);
        change(&mut changed);
        let error = load(&checkpoint, &changed, 1, setup.isa).err().unwrap();
        assert!(matches!(error, LoadError::Assignment(_)), "{error}");
        assert!(error.to_string().contains(words), "{error}");
    };
    check(&|a| a.stage.0 = 1, "stage 1 of 1");
    check(&|a| a.rank.0 = 1, "rank 1 of 1");
    check(&|a| a.replica.stages[0].layers.end = 4, "layers 0..4 of a model of 3");
    check(&|a| a.replica.stages[0].layers.end = 0, "layers 0..0 of a model of 3");
}

/// The model of the tests below: 3 layers and 60 MiB in bf16, of which a middle stage has 11.
fn large() -> (tempfile::TempDir, Checkpoint) {
    random_model(
        r#"{
        "architectures": ["LlamaForCausalLM"], "hidden_size": 1024, "intermediate_size": 1000,
        "num_attention_heads": 16, "num_key_value_heads": 4, "num_hidden_layers": 3,
        "vocab_size": 6001, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
        "torch_dtype": "bfloat16", "tie_word_embeddings": false
    }"#,
    )
}

#[test]
fn a_stage_reads_its_own_bytes_and_says_how_far_it_is() {
    let (folder, checkpoint) = large();
    // Without the data of other stages' tensors a middle stage must load all the same.
    let setup = Setup { cuts: vec![0, 1, 2, 3], ..Setup::plain(checkpoint.spec()) };
    let spec = checkpoint.spec();
    let mut own = 0;
    let mut data = std::fs::read(folder.path().join("model.safetensors")).unwrap();
    for tensor in spec.tensors(shoal_protocol::units::LayerRange::new(0, 3)) {
        let location = checkpoint.locate(&tensor.name).unwrap();
        if tensor.layer == Some(1) {
            own += if tensor.is_matrix { location.len } else { 0 };
        } else {
            data[location.offset as usize..][..location.len as usize].fill(0xff);
        }
    }
    std::fs::write(folder.path().join("model.safetensors"), data).unwrap();

    let seen = Mutex::new(Vec::new());
    let options = LoadOptions {
        threads: NonZeroUsize::new(2).unwrap(),
        on_progress: &|done, total| seen.lock().unwrap().push((done, total)),
        cancel: &AtomicBool::new(false),
    };
    let ops = CpuOps::new(1, Isa::best()).unwrap();
    let mut shard =
        load_shard(ops, &checkpoint, &assignment(&checkpoint, &setup, 1), &options).unwrap();
    let seen = seen.into_inner().unwrap();
    assert!(seen.iter().all(|(done, total)| done <= total && *total == Bytes(own)), "{seen:?}");
    assert!(seen.contains(&(Bytes(own), Bytes(own))), "{seen:?}");

    let mut hidden = vec![0.5; 1024];
    let span = shoal_shard_worker::model::Span {
        first_row: 0,
        rows: 1,
        first_position: 0,
        blocks: &[0],
        adapter: None,
    };
    let batch = shoal_shard_worker::model::Batch { spans: &[span], rows: 1, sample_rows: &[] };
    shard.forward(&batch, None, &mut hidden, None, &mut Alone).unwrap();
    assert!(hidden.iter().all(|value| value.is_finite()), "a NaN of another stage was read");
}

#[test]
fn loading_stops_when_it_is_cancelled() {
    let (_folder, checkpoint) = large();
    let setup = Setup::plain(checkpoint.spec());
    let cancel = AtomicBool::new(false);
    let calls = Mutex::new(0);
    let options = LoadOptions {
        threads: NonZeroUsize::new(2).unwrap(),
        on_progress: &|_, _| {
            *calls.lock().unwrap() += 1;
            cancel.store(true, Ordering::Relaxed);
        },
        cancel: &cancel,
    };
    let ops = CpuOps::new(1, setup.isa).unwrap();
    let error = load_shard(ops, &checkpoint, &assignment(&checkpoint, &setup, 0), &options);
    assert!(matches!(error.err().unwrap(), LoadError::Weights(WeightsError::Cancelled)));
    // One piece, and the one that the other thread had begun.
    assert!(*calls.lock().unwrap() <= 2);
}

/// Experts whose rows are columns of the file, in matrices of more than a piece.
#[test]
fn what_lies_the_other_way_round_is_read_once_for_each_part_of_it() {
    let (folder, checkpoint) = random_model(
        r#"{"architectures": ["GptOssForCausalLM"], "hidden_size": 256, "intermediate_size": 8192,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64,
            "num_hidden_layers": 1, "num_local_experts": 1, "num_experts_per_tok": 1,
            "max_position_embeddings": 512, "torch_dtype": "float32"}"#,
    );
    let name = "model.layers.0.mlp.experts.gate_up_proj";
    let gate_and_up = checkpoint.locate(name).unwrap().len;
    let assignment = assignment(&checkpoint, &Setup::plain(checkpoint.spec()), 0);
    // What this thread, the only one that loads, has read of all files.
    let read = || -> u64 {
        let io = std::fs::read_to_string("/proc/thread-self/io").unwrap();
        io.lines().find_map(|line| line.strip_prefix("rchar: ")).unwrap().parse().unwrap()
    };
    let before = read();
    load(&checkpoint, &assignment, 1, Isa::best()).unwrap();
    let read = read() - before;
    // Gate and up are two parts of one tensor.
    let file = std::fs::metadata(folder.path().join("model.safetensors")).unwrap().len();
    let expected = file + gate_and_up;
    assert!(read.abs_diff(expected) < 1 << 16, "read {read} bytes, expected {expected}");
}
