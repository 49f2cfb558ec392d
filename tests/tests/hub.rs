//! Models of a hub: what comes over the wire, what lies on the disk, what is refused, and whole clusters
//! that serve one. The hub is played by a server of ours.

#[path = "hub/adapters.rs"]
mod adapters;
#[path = "hub/gguf.rs"]
mod gguf;
#[path = "hub/lies.rs"]
mod lies;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;
use shoal_protocol::blob::{
    BlobError, BlobSettings, Cut, Filling, ModelCache, Patience, S3Keys, Side, Wanted,
};
use shoal_protocol::model::Checkpoint;
use shoal_protocol::plan::ModelSource;
use shoal_tests::hub::{COMMIT, Fault, Hub, S3_KEY, S3_SECRET, S3_URL};
use shoal_tests::model::{RandomLlama, demo};
use shoal_tests::proc::{Process, Up, UpOptions};

const REPO: &str = "shoal/demo";
const WEIGHTS: &str = "model.safetensors";
const CUT: Cut = Cut { chunk: 64 << 10, run: 256 << 10 };

/// Fast, so that no test waits for long.
const PATIENCE: Patience = Patience {
    connect: Duration::from_secs(5),
    read: Duration::from_millis(700),
    first_pause: Duration::from_millis(5),
    tries: 3,
    within: Duration::from_secs(20),
};

fn settings(hub: &Hub) -> BlobSettings {
    BlobSettings { endpoint: hub.url(), cut: CUT, patience: PATIENCE, ..BlobSettings::default() }
}

fn source(revision: &str) -> ModelSource {
    ModelSource::Hub { repo: REPO.to_owned(), revision: revision.to_owned() }
}

fn whole() -> Result<Wanted> {
    let bytes = 0..std::fs::metadata(demo().join(WEIGHTS))?.len();
    Ok(Wanted { file: WEIGHTS.to_owned(), bytes })
}

fn fill(cache: &ModelCache, wanted: &[Wanted]) -> Result<(), BlobError> {
    let cancel = AtomicBool::new(false);
    let filling = Filling { on_progress: &|_, _| {}, cancel: &cancel };
    cache.fill(&source(COMMIT), wanted, &filling)
}

#[test]
fn a_model_of_a_hub_has_the_fingerprint_of_its_folder_before_its_weights_are_here() -> Result<()> {
    let hub = Hub::serve(&demo(), REPO, None)?;
    let data = tempfile::tempdir()?;
    let cache = ModelCache::new(data.path(), settings(&hub));
    let pinned = cache.pin(&source("main"))?;
    assert_eq!(pinned, source(COMMIT));
    let folder = cache.prepare(&pinned, Side::Text, &AtomicBool::new(false))?;
    let (here, there) = (Checkpoint::open(&folder)?, Checkpoint::open(&demo())?);
    assert_eq!(here.fingerprint(), there.fingerprint());
    here.check_tokenizer()?;
    let (sent, all) = (hub.counts().weights(), hub.weights());
    assert!(sent < all / 4, "{sent} of {all} bytes of weights for a header");
    // A worker does without a tokenizer.
    let other = tempfile::tempdir()?;
    let folder = ModelCache::new(other.path(), settings(&hub)).prepare(
        &pinned,
        Side::Weights,
        &AtomicBool::new(false),
    )?;
    assert!(!folder.join("tokenizer.json").exists());
    assert_eq!(Checkpoint::open(&folder)?.fingerprint(), there.fingerprint());
    Ok(())
}

#[test]
fn only_what_is_asked_for_comes_and_another_process_finds_it_again() -> Result<()> {
    let hub = Hub::serve(&demo(), REPO, None)?;
    let data = tempfile::tempdir()?;
    let cache = ModelCache::new(data.path(), settings(&hub));
    let folder = cache.prepare(&source(COMMIT), Side::Weights, &AtomicBool::new(false))?;
    let before = hub.counts().weights();
    let part = Wanted { file: WEIGHTS.to_owned(), bytes: 1_000_000..1_200_000 };
    fill(&cache, std::slice::from_ref(&part))?;
    let sent = hub.counts().weights() - before;
    assert!((200_000..=200_000 + 2 * CUT.chunk).contains(&sent), "{sent}");
    let (here, there) =
        (std::fs::read(folder.join(WEIGHTS))?, std::fs::read(demo().join(WEIGHTS))?);
    assert!(here[1_000_000..1_200_000] == there[1_000_000..1_200_000]);
    // A process that begins anew asks for nothing at all.
    let answers = hub.counts().answers;
    let again = ModelCache::new(data.path(), settings(&hub));
    again.prepare(&source(COMMIT), Side::Weights, &AtomicBool::new(false))?;
    fill(&again, &[part])?;
    assert_eq!(hub.counts().answers, answers);
    fill(&again, &[whole()?])?;
    assert!(std::fs::read(folder.join(WEIGHTS))? == there);
    Ok(())
}

#[test]
fn what_passes_is_waited_for_and_what_came_is_kept() -> Result<()> {
    let there = std::fs::read(demo().join(WEIGHTS))?;
    for faults in [
        vec![Fault::Status(503, Some(1)), Fault::Status(429, None)],
        vec![Fault::Cut(100_000), Fault::Cut(10), Fault::Cut(70_000)],
        vec![Fault::Hang(Duration::from_millis(1500))],
        vec![Fault::Status(500, None), Fault::Cut(0)],
    ] {
        let hub = Hub::serve(&demo(), REPO, None)?;
        let data = tempfile::tempdir()?;
        let cache = ModelCache::new(data.path(), settings(&hub));
        let folder = cache.prepare(&source(COMMIT), Side::Weights, &AtomicBool::new(false))?;
        let before = hub.counts().weights();
        hub.fail(WEIGHTS, &faults);
        fill(&cache, &[whole()?]).with_context(|| format!("{faults:?}"))?;
        assert!(std::fs::read(folder.join(WEIGHTS))? == there, "{faults:?}");
        if matches!(faults[0], Fault::Cut(_)) {
            // Every byte that was sent counts: none was sent twice.
            let sent = hub.counts().weights() - before;
            assert_eq!(sent, there.len() as u64, "{faults:?}");
        }
    }
    Ok(())
}

#[test]
fn what_does_not_pass_is_refused_with_the_hub_and_the_reason() -> Result<()> {
    let check = |file: &str, faults: &[Fault], words: &[&str]| -> Result<()> {
        let hub = Hub::serve(&demo(), REPO, None)?;
        let data = tempfile::tempdir()?;
        let cache = ModelCache::new(data.path(), settings(&hub));
        let get = || -> Result<(), BlobError> {
            let pinned = cache.pin(&source("main"))?;
            if file == WEIGHTS {
                cache.prepare(&pinned, Side::Text, &AtomicBool::new(false))?;
                hub.fail(file, faults);
                return fill(&cache, &[whole().expect("the demo model")]);
            }
            hub.fail(file, faults);
            cache.prepare(&pinned, Side::Text, &AtomicBool::new(false)).map(drop)
        };
        let error = get().err().with_context(|| format!("{file}: {faults:?}"))?.to_string();
        for words in [hub.url().as_str()].iter().chain(words) {
            assert!(error.contains(words), "{file}: {faults:?}: `{words}` is not in `{error}`");
        }
        // Another try finds nothing half-made.
        hub.fail(file, &[]);
        cache.prepare(&source(COMMIT), Side::Text, &AtomicBool::new(false))?;
        Ok(fill(&cache, &[whole()?])?)
    };
    let down = vec![Fault::Status(503, None); 40];
    check("config.json", &down, &["config.json", "3 tries", "503", "as it was told"])?;
    check(WEIGHTS, &down, &[WEIGHTS, "503"])?;
    check("config.json", &[Fault::Lie], &["config.json", "hash"])?;
    check(WEIGHTS, &[Fault::Lie], &[WEIGHTS, "SHA-256"])?;
    check(WEIGHTS, &[Fault::Whole], &[WEIGHTS, "does not serve ranges"])?;
    check(WEIGHTS, &[Fault::Shifted], &[WEIGHTS, "Content-Range"])?;
    check("config.json", &[Fault::Status(404, None)], &["config.json", "HF_TOKEN"])?;
    check(WEIGHTS, &[Fault::Status(403, None)], &["403", "HF_TOKEN"])?;
    check(WEIGHTS, &[Fault::Status(418, None)], &["418", "as it was told"])
}

#[test]
fn where_no_hub_is_whoever_deploys_hears_it_soon_and_a_worker_tries_on() -> Result<()> {
    // Nobody listens at the one; the other is no name, which the resolver says without asking anybody.
    for endpoint in ["http://127.0.0.1:1", "http://no..hub"] {
        let data = tempfile::tempdir()?;
        let patience = Patience { first_pause: Duration::from_millis(1), tries: 7, ..PATIENCE };
        let settings =
            BlobSettings { endpoint: endpoint.to_owned(), patience, ..BlobSettings::default() };
        let cache = ModelCache::new(data.path(), BlobSettings { hub_cache: None, ..settings });
        let tries = |error: BlobError| match error {
            BlobError::Unreachable { tries, why, .. } if why.contains("nobody is reached") => tries,
            error => panic!("{endpoint}: {error}"),
        };
        let never = AtomicBool::new(false);
        let waited = cache.pin(&source("main")).expect_err("no hub");
        assert_eq!(tries(waited), 4, "{endpoint}");
        // Its commit is known, so its files are the first that is asked for.
        let waited = cache.prepare(&source(COMMIT), Side::Text, &never).expect_err("no hub");
        assert_eq!(tries(waited), 4, "{endpoint}");
        let worker = cache.prepare(&source(COMMIT), Side::Weights, &never).expect_err("no hub");
        assert_eq!(tries(worker), 7, "{endpoint}");
    }
    Ok(())
}

#[test]
fn who_gives_a_model_up_does_not_wait_for_a_hub_that_is_down() -> Result<()> {
    let hub = Hub::serve(&demo(), REPO, None)?;
    let data = tempfile::tempdir()?;
    // Longer than this test may take.
    let patience = Patience { first_pause: Duration::from_secs(600), tries: 9, ..PATIENCE };
    let patience = Patience { within: Duration::from_secs(6000), ..patience };
    let cache = ModelCache::new(data.path(), BlobSettings { patience, ..settings(&hub) });
    hub.fail("config.json", &vec![Fault::Status(503, None); 9]);
    let cancel = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| cache.prepare(&source(COMMIT), Side::Weights, &cancel));
        // Another one waits for the first, which has the turn.
        let second = scope.spawn(|| cache.forget(&source(COMMIT), &cancel).err());
        while hub.left("config.json") == 9 && !first.is_finished() {
            std::thread::yield_now();
        }
        cancel.store(true, Ordering::Relaxed);
        let first = first.join().expect("no panic").map_err(|error| error.to_string());
        assert_eq!(first, Err("fetching was cancelled".to_owned()));
        let second = second.join().expect("no panic").map(|error| error.to_string());
        // Or it came first, and had nothing to wait for.
        assert!(second.is_none_or(|why| why == "fetching was cancelled"));
    });
    Ok(())
}

#[test]
fn a_token_opens_a_private_model_and_does_not_reach_the_cdn() -> Result<()> {
    let hub = Hub::serve(&demo(), REPO, Some("hf_secret"))?;
    let data = tempfile::tempdir()?;
    let without = ModelCache::new(data.path(), settings(&hub));
    let error = without.pin(&source("main")).unwrap_err().to_string();
    assert!(error.contains("401") && error.contains("HF_TOKEN"), "{error}");
    let token = Some("hf_secret".to_owned());
    let with = ModelCache::new(data.path(), BlobSettings { token, ..settings(&hub) });
    with.prepare(&with.pin(&source("main"))?, Side::Text, &AtomicBool::new(false))?;
    fill(&with, &[whole()?])?;
    assert_eq!(hub.counts().leaked, 0);
    let missing = ModelSource::Hub { repo: "shoal/none".to_owned(), revision: "main".to_owned() };
    let error = with.pin(&missing).unwrap_err().to_string();
    assert!(error.contains("shoal/none@main") && error.contains(&hub.url()), "{error}");
    Ok(())
}

#[test]
fn what_the_hubs_own_cache_holds_whole_is_used_as_it_is_even_offline() -> Result<()> {
    let cache = tempfile::tempdir()?;
    let folder = cache.path().join("models--shoal--demo");
    let snapshot = folder.join("snapshots").join(COMMIT);
    copy(&demo(), &snapshot)?;
    std::fs::create_dir_all(folder.join("refs"))?;
    std::fs::write(folder.join("refs/main"), COMMIT)?;
    let data = tempfile::tempdir()?;
    let hub_cache = Some(cache.path().to_owned());
    let settings = BlobSettings { hub_cache, offline: true, ..BlobSettings::default() };
    let models = ModelCache::new(data.path(), settings);
    let pinned = models.pin(&source("main"))?;
    assert_eq!(models.prepare(&pinned, Side::Text, &AtomicBool::new(false))?, snapshot);
    fill(&models, &[whole()?])?;
    let other = ModelSource::Hub { repo: "shoal/other".to_owned(), revision: "main".to_owned() };
    let error = models.pin(&other).unwrap_err().to_string();
    assert!(error.contains("HF_HUB_OFFLINE") && error.contains("shoal/other"), "{error}");
    Ok(())
}

#[test]
fn a_folder_of_an_object_store_is_a_model_until_somebody_replaces_it() -> Result<()> {
    let store = Hub::serve(&demo(), REPO, None)?;
    let data = tempfile::tempdir()?;
    let asked = ModelSource::ObjectStore { url: S3_URL.to_owned(), revision: String::new() };
    let of = |store: &Hub, secret: &str| object_store(store, data.path(), secret);
    let error = of(&store, "another").pin(&asked).unwrap_err().to_string();
    assert!(error.contains("403") && error.contains("AWS_ACCESS_KEY_ID"), "{error}");
    let cache = of(&store, S3_SECRET);
    let pinned = cache.pin(&asked)?;
    let folder = cache.prepare(&pinned, Side::Text, &AtomicBool::new(false))?;
    assert_eq!(Checkpoint::open(&folder)?.fingerprint(), Checkpoint::open(&demo())?.fingerprint());
    let filling = Filling { on_progress: &|_, _| {}, cancel: &AtomicBool::new(false) };
    let half = Wanted { bytes: 0..1_000_000, ..whole()? };
    cache.fill(&pinned, &[half], &filling)?;

    // Other weights under the same name are another model, and no part of this one.
    let other = tempfile::tempdir()?;
    copy(&demo(), other.path())?;
    let mut weights = std::fs::read(demo().join(WEIGHTS))?;
    let last = weights.len() - 1;
    weights[last] ^= 1;
    std::fs::write(other.path().join(WEIGHTS), &weights)?;
    let replaced = Hub::serve(other.path(), REPO, None)?;
    let cache = of(&replaced, S3_SECRET);
    assert_ne!(cache.pin(&asked)?, pinned);
    let error = cache.fill(&pinned, &[whole()?], &filling).unwrap_err().to_string();
    assert!(error.contains("412") && error.contains(WEIGHTS), "{error}");
    of(&store, S3_SECRET).fill(&pinned, &[whole()?], &filling)?;
    assert!(std::fs::read(folder.join(WEIGHTS))? == std::fs::read(demo().join(WEIGHTS))?);
    Ok(())
}

/// The hub, asked as an object store with credentials of a session.
fn object_store(store: &Hub, data: &Path, secret: &str) -> ModelCache {
    let session = Some("for an hour".to_owned());
    let keys = Some(S3Keys { id: S3_KEY.to_owned(), secret: secret.to_owned(), session });
    let s3_endpoint = Some(store.url());
    ModelCache::new(data, BlobSettings { keys, s3_endpoint, ..settings(store) })
}

#[test]
fn what_is_signed_for_an_object_store_is_not_sent_on_to_another_host() -> Result<()> {
    let store = Hub::serve(&demo(), REPO, None)?;
    let data = tempfile::tempdir()?;
    let asked = ModelSource::ObjectStore { url: S3_URL.to_owned(), revision: String::new() };
    let cache = object_store(&store, data.path(), S3_SECRET);
    let pinned = cache.pin(&asked)?;
    store.fail(WEIGHTS, &[Fault::Elsewhere]);
    let prepared = cache.prepare(&pinned, Side::Weights, &AtomicBool::new(false));
    let error = prepared.unwrap_err().to_string();
    for words in ["302", "http://localhost", "a signed request does not go", "AWS_ENDPOINT_URL"] {
        assert!(error.contains(words), "`{words}` is not in `{error}`");
    }
    assert_eq!(store.counts().leaked, 0);
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        std::fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}

fn up(hub: &Hub, data: &Path) -> UpOptions {
    UpOptions::flags("--workers 2")
        .model(REPO)
        .env("HF_ENDPOINT", hub.url())
        // Nothing of whoever runs the tests.
        .env("HF_HOME", data)
        .env("HF_TOKEN", "hf_secret")
}

#[test]
fn a_cluster_answers_from_a_hub_as_it_does_from_the_folder() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let model = RandomLlama { layers: 4, hidden: 256, intermediate: 1024 };
    model.write(folder.path())?;
    let ask = |up: &Up| -> Result<Vec<u64>> {
        let more = json!({"max_tokens": 24, "temperature": 0, "return_token_ids": true});
        Ok(up.api().complete("Once upon", more)?.ok()?.token_ids())
    };
    let local = Up::start(&UpOptions::flags("--workers 2").model(folder.path()))?;
    let expected = ask(&local)?;
    local.stop(&[])?;
    assert!(!expected.is_empty());

    let hub = Hub::serve(folder.path(), REPO, Some("hf_secret"))?;
    let home = tempfile::tempdir()?;
    let remote = Up::start(&up(&hub, home.path()))?;
    assert_eq!(remote.ready["model"], "demo");
    assert_eq!(ask(&remote)?, expected);
    let status = remote.verb(&["status", "--json"])?.expect_code(0).stdout;
    assert!(status.contains(COMMIT), "{status}");
    remote.stop(&[])?;
    // Each worker has fetched the chunks of its own layers: the border's chunk twice.
    let (sent, all) = (hub.counts().weights(), hub.weights());
    let twice = 2 * (4 << 20) + 3 * (256 << 10);
    assert!(sent <= all + twice, "{sent} bytes were sent of a model of {all}");
    Ok(())
}

#[test]
fn a_cluster_gives_its_second_copy_the_weights_of_the_first() -> Result<()> {
    let folder = tempfile::tempdir()?;
    RandomLlama { layers: 4, hidden: 256, intermediate: 1024 }.write(folder.path())?;
    let hub = Hub::serve(folder.path(), REPO, Some("hf_secret"))?;
    let home = tempfile::tempdir()?;
    let mut options = up(&hub, home.path());
    options.flags.extend(["--stages".into(), "1".into()]);
    let cluster = Up::start(&options)?;
    let before = hub.counts().weights();
    cluster.verb(&["scale", "demo", "--replicas", "2"])?.expect_code(0);
    assert_eq!(hub.counts().weights(), before, "the hub was asked for what a worker has");
    cluster.stop(&[])?;
    Ok(())
}

#[test]
fn a_cluster_that_cannot_get_its_model_says_why() -> Result<()> {
    let hub = Hub::serve(&demo(), REPO, Some("another"))?;
    let data = tempfile::tempdir()?;
    let process: Process = Up::spawn(&up(&hub, data.path()), data.path())?;
    let ended = process.finish(Duration::from_secs(60))?;
    assert_ne!(ended.code(), Some(0));
    assert!(ended.stderr.contains("HF_TOKEN") && ended.stderr.contains("401"), "{}", ended.stderr);
    Ok(())
}
