//! GGUF models of the hub and of object stores: files that llama.cpp's converter wrote, in a repository
//! as people publish them.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use shoal_coordinator::api::tokenize::ModelText;
use shoal_protocol::blob::{BlobSettings, Cut, ModelCache, Side};
use shoal_protocol::model::Checkpoint;
use shoal_protocol::plan::{ModelSource, Numerics};
use shoal_protocol::units::LayerRange;
use shoal_shard_worker::agent::Models;
use shoal_tests::hub::{COMMIT, Hub, S3_SECRET, S3_URL};
use shoal_tests::plan::assignments;
use shoal_tests::proc::{Up, UpOptions};

use super::{object_store, settings, up};

const REPO: &str = "shoal/fish-GGUF";

/// The fixtures are small, so is what they are cut into.
const SMALL: Cut = Cut { chunk: 4 << 10, run: 16 << 10 };

fn fixtures() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/gguf")
}

/// Three models of which one is in parts and in a folder, and what lies beside them in such repositories.
fn repository(folder: &Path) -> Result<()> {
    let copy = |from: &str, to: &str| -> Result<()> {
        let to = folder.join(to);
        std::fs::create_dir_all(to.parent().context("a folder")?)?;
        std::fs::copy(fixtures().join(from), to).with_context(|| from.to_owned())?;
        Ok(())
    };
    copy("qwen3-tied-bf16.gguf", "fish-Q4_K_M.gguf")?;
    copy("llama31-rope8-bf16.gguf", "fish-BF16.gguf")?;
    for number in 1..=3 {
        let name = |stem: &str| format!("{stem}-0000{number}-of-00003.gguf");
        copy(&name("mixtral-bf16"), &name("F16/fish-F16"))?;
    }
    copy("gemma2-bf16.gguf", "mmproj-F16.gguf")?;
    std::fs::write(folder.join("README.md"), "fish")?;
    std::fs::write(folder.join("config.json"), r#"{"model_type": "fish"}"#)?;
    Ok(())
}

fn asked(file: &str) -> ModelSource {
    let (repo, revision) = (REPO.to_owned(), "main".to_owned());
    match file {
        "" => ModelSource::Hub { repo, revision },
        file => ModelSource::HubGguf { repo, revision, file: file.to_owned() },
    }
}

#[test]
fn a_gguf_model_is_found_by_quantisation_by_file_and_without_a_word() -> Result<()> {
    let folder = tempfile::tempdir()?;
    repository(folder.path())?;
    let hub = Hub::serve(folder.path(), REPO, None)?;
    let parts = "F16/fish-F16-00001-of-00003.gguf";
    for (word, file) in [
        ("", "fish-Q4_K_M.gguf"),
        ("q4_k_m", "fish-Q4_K_M.gguf"),
        ("BF16", "fish-BF16.gguf"),
        ("fish-BF16.gguf", "fish-BF16.gguf"),
        ("F16", parts),
        ("F16/fish-F16-00003-of-00003.gguf", parts),
    ] {
        let data = tempfile::tempdir()?;
        let cache = ModelCache::new(data.path(), settings(&hub));
        let before = hub.counts();
        let pinned = cache.pin(&asked(word))?;
        let (repo, revision) = (REPO.to_owned(), COMMIT.to_owned());
        assert_eq!(pinned, ModelSource::HubGguf { repo, revision, file: file.to_owned() });
        assert_eq!(cache.pin(&pinned)?, pinned);
        for side in [Side::Text, Side::Weights] {
            let prepared = cache.prepare(&pinned, side, &AtomicBool::new(false))?;
            let (here, there) =
                (Checkpoint::open(&prepared)?, Checkpoint::open(&folder.path().join(file))?);
            assert_eq!(here.fingerprint(), there.fingerprint(), "{word}");
        }
        // Of the others not a byte came.
        let stem = file.trim_end_matches("-00001-of-00003.gguf");
        let counts = hub.counts();
        let grown = |name: &&String| counts.bytes.get(*name) != before.bytes.get(*name);
        let (of_it, others): (Vec<_>, Vec<_>) =
            counts.bytes.keys().filter(grown).partition(|name| name.starts_with(stem));
        assert_eq!(of_it.len(), if file == parts { 3 } else { 1 }, "{word}: {of_it:?}");
        assert!(others.is_empty(), "{word}: {others:?}");
    }
    let counts = hub.counts();
    assert!(!counts.bytes.keys().any(|name| name.contains("mmproj")), "{counts:?}");
    assert!(!counts.bytes.contains_key("config.json"), "it is not the model's: {counts:?}");
    let cache = ModelCache::new(folder.path(), settings(&hub));
    for (word, why) in [("Q5_K_S", "`Q5_K_S` fits"), ("fish.gguf", "no file fish.gguf")] {
        let error = cache.pin(&asked(word)).unwrap_err().to_string();
        for words in [why, REPO, "fish-BF16.gguf, fish-Q4_K_M.gguf", parts] {
            assert!(error.contains(words), "`{words}` is not in `{error}`");
        }
    }
    Ok(())
}

#[test]
fn the_tokenizer_is_the_files_own_and_of_the_weights_only_headers_come_for_it() -> Result<()> {
    let folder = tempfile::tempdir()?;
    repository(folder.path())?;
    // Of another model: it is not this file's.
    std::fs::write(folder.path().join("tokenizer.json"), "{}")?;
    let hub = Hub::serve(folder.path(), REPO, None)?;
    let data = tempfile::tempdir()?;
    let cache = ModelCache::new(data.path(), settings(&hub));
    let pinned = cache.pin(&asked("BF16"))?;
    let prepared = cache.prepare(&pinned, Side::Text, &AtomicBool::new(false))?;
    let file = fixtures().join("llama31-rope8-bf16.gguf");
    let (here, there) = (ModelText::load(&prepared)?, ModelText::load(&file)?);
    for text in ["Hello, fish!", "Once upon a time"] {
        assert_eq!(here.encode(text, true)?, there.encode(text, true)?);
    }
    assert_eq!(here.end_tokens, there.end_tokens);
    // Another process finds it, and asks for nothing.
    let answers = hub.counts().answers;
    let again = ModelCache::new(data.path(), settings(&hub));
    assert_eq!(again.prepare(&pinned, Side::Text, &AtomicBool::new(false))?, prepared);
    assert_eq!(hub.counts().answers, answers);
    Ok(())
}

/// The bytes of all chunks that hold a part of these layers, and of those of these layers themselves.
fn chunks_of(checkpoint: &Checkpoint, layers: LayerRange) -> Result<(u64, u64)> {
    let (mut chunks, mut own) = (BTreeMap::new(), BTreeMap::new());
    for tensor in checkpoint.tensors(layers) {
        let at = checkpoint.locate(&tensor.name).context("a tensor")?;
        let file_len = std::fs::metadata(&at.file)?.len();
        for index in SMALL.touched(&(at.offset..at.offset + at.len)) {
            let bytes = SMALL.bytes(index, file_len);
            chunks.insert((at.file.clone(), index), bytes.end - bytes.start);
        }
        own.insert((at.file.clone(), at.offset), at.len);
    }
    Ok((chunks.values().sum(), own.values().sum()))
}

#[test]
fn a_worker_of_one_stage_of_two_fetches_its_half_of_a_gguf_model() -> Result<()> {
    let folder = tempfile::tempdir()?;
    repository(folder.path())?;
    for (word, place) in [("BF16", ""), ("Q4_K_M", ""), ("F16", "F16")] {
        let hub = Hub::serve(folder.path(), REPO, None)?;
        for stage in 0..2 {
            let data = tempfile::tempdir()?;
            let cache = ModelCache::new(data.path(), BlobSettings { cut: SMALL, ..settings(&hub) });
            let pinned = cache.pin(&asked(word))?;
            let prepared = cache.prepare(&pinned, Side::Weights, &AtomicBool::new(false))?;
            let checkpoint = Checkpoint::open(&prepared)?;
            let assignment = &assignments(&checkpoint, &pinned, (2, 1), Numerics::N1)?[stage];
            let models = Models {
                data: data.path().to_owned(),
                builtin: Vec::new(),
                threads: NonZeroUsize::MIN,
                cpus: Default::default(),
                cache,
                blobs: None,
            };
            let before = hub.counts().weights();
            models.load(assignment, &|_, _| (), &AtomicBool::new(false))?;
            let sent = hub.counts().weights() - before;
            // The chunks of its own tensors, not one more.
            let (chunks, own) = chunks_of(&checkpoint, assignment.layers())?;
            ensure!(sent == chunks, "{word}, stage {stage}: {sent} bytes, not {chunks}");
            let (_, all) = chunks_of(&checkpoint, LayerRange::new(0, checkpoint.spec().layers))?;
            println!("{word}, stage {stage}: {sent} bytes for {own} of {all}");
            ensure!(own < all && sent <= own + own / 4, "{word}, stage {stage}: {sent} for {own}");
            // What was read of the sparse file is what the file has.
            for tensor in checkpoint.tensors(assignment.layers()) {
                let at = checkpoint.locate(&tensor.name).context("a tensor")?;
                let name = at.file.file_name().context("a name")?;
                let (first, end) = (at.offset as usize, (at.offset + at.len) as usize);
                let here = std::fs::read(&at.file)?;
                let there = std::fs::read(folder.path().join(place).join(name))?;
                ensure!(here[first..end] == there[first..end], "{word}: {}", tensor.name);
            }
        }
    }
    Ok(())
}

#[test]
fn a_gguf_file_of_an_object_store_is_named_by_its_url() -> Result<()> {
    let folder = tempfile::tempdir()?;
    repository(folder.path())?;
    // There the files lie side by side.
    for entry in std::fs::read_dir(folder.path().join("F16"))? {
        let entry = entry?;
        std::fs::copy(entry.path(), folder.path().join(entry.file_name()))?;
    }
    std::fs::remove_file(folder.path().join("config.json"))?;
    let store = Hub::serve(folder.path(), REPO, None)?;
    let of = |file: &str| ModelSource::ObjectStore {
        url: format!("{S3_URL}{file}"),
        revision: String::new(),
    };
    for (file, first) in [
        ("/fish-BF16.gguf", "fish-BF16.gguf"),
        ("/fish-F16-00002-of-00003.gguf", "fish-F16-00001-of-00003.gguf"),
    ] {
        let data = tempfile::tempdir()?;
        let cache = object_store(&store, data.path(), S3_SECRET);
        let pinned = cache.pin(&of(file))?;
        assert_eq!(cache.pin(&pinned)?, pinned);
        let prepared = cache.prepare(&pinned, Side::Text, &AtomicBool::new(false))?;
        let there = Checkpoint::open(&folder.path().join(first))?;
        assert_eq!(Checkpoint::open(&prepared)?.fingerprint(), there.fingerprint());
    }
    let data = tempfile::tempdir()?;
    let cache = object_store(&store, data.path(), S3_SECRET);
    for (file, words) in [
        ("", "a GGUF model is named by its file, s3://bucket/folder/FILE.gguf"),
        ("/fish-Q9.gguf", "fish-Q9.gguf"),
        ("/fish-F16-00001-of-00004.gguf", "fish-F16-00001-of-00004.gguf"),
    ] {
        let error = cache.pin(&of(file)).unwrap_err().to_string();
        assert!(error.contains(words), "`{words}` is not in `{error}`");
    }
    Ok(())
}

#[test]
fn a_gguf_repository_answers_as_its_file_on_disk_does() -> Result<()> {
    let ask = |up: &Up| -> Result<Vec<u64>> {
        let more = json!({"max_tokens": 16, "temperature": 0, "return_token_ids": true,
            "ignore_eos": true});
        Ok(up.api().complete("Hello, fish!", more)?.ok()?.token_ids())
    };
    let folder = tempfile::tempdir()?;
    repository(folder.path())?;
    let file = folder.path().join("fish-BF16.gguf");
    let local = Up::start(&UpOptions::flags("--workers 2").model(file))?;
    let expected = ask(&local)?;
    local.stop(&[])?;
    assert_eq!(expected.len(), 16);

    let hub = Hub::serve(folder.path(), REPO, Some("hf_secret"))?;
    let home = tempfile::tempdir()?;
    let remote = Up::start(&up(&hub, home.path()).model(format!("{REPO}:bf16")))?;
    assert_eq!(remote.ready["model"], "fish-GGUF");
    assert_eq!(ask(&remote)?, expected);
    let status = remote.verb(&["status", "--json"])?.expect_code(0).stdout;
    for word in [REPO, COMMIT, "fish-BF16.gguf"] {
        assert!(status.contains(&format!("\"{word}\"")), "{word} is not in {status}");
    }
    let more = remote.verb(&["deploy", &format!("{REPO}:Q9_9"), "--name", "none"])?;
    assert_ne!(more.code(), Some(0));
    assert!(more.stderr.contains("fish-BF16.gguf, fish-Q4_K_M.gguf"), "{}", more.stderr);
    remote.stop(&[])?;
    Ok(())
}
