//! The binary from the outside, where no cluster is needed: what is printed where, and exit codes.

use std::io::{BufRead, BufReader};
use std::process::{Command, Output, Stdio};

/// Runs the binary where no cluster can be found.
fn shoal(args: &[&str]) -> (Option<i32>, String, String) {
    let empty = tempfile::tempdir().expect("a folder");
    let Output { status, stdout, stderr } = Command::new(env!("CARGO_BIN_EXE_shoal"))
        .args(args)
        .env_remove("SHOAL_CONTEXT")
        .env_remove("SHOAL_TOKEN")
        .env("XDG_RUNTIME_DIR", empty.path())
        .env("TMPDIR", empty.path())
        .output()
        .expect("the binary runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (status.code(), text(stdout), text(stderr))
}

#[test]
fn help_is_data_and_a_mistake_is_talk() {
    for args in [&["--help"][..], &["up", "--help"], &["-h"], &["--version"]] {
        let (code, stdout, stderr) = shoal(args);
        assert_eq!((code, stderr.as_str()), (Some(0), ""), "{args:?}");
        assert!(stdout.contains("shoal"), "{args:?}: {stdout}");
    }
    for args in [&[][..], &["up", "--wrokers", "2"], &["swim"], &["deploy", "a", "b"]] {
        let (code, stdout, stderr) = shoal(args);
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{args:?}");
        assert!(stderr.contains("Usage"), "{args:?}: {stderr}");
    }
}

#[test]
fn exit_codes_tell_the_endings_apart() {
    for (args, expected, words) in [
        (&["status"][..], 4, "no `shoal up` runs here"),
        (&["chat", "--ask", "?"], 4, "--context"),
        (&["status", "--context", "/no/such/file"], 2, "/no/such/file"),
        (&["status", "--context", "/proc/self/exe"], 1, "damaged"),
        (&["up", "/no/such/model"], 3, "/no/such/model"),
        (&["up", "/proc/self/exe"], 3, "is not a folder"),
        (
            &["coordinators", "recover-alone", "--data", "/no/such"],
            3,
            "there is no folder /no/such",
        ),
    ] {
        let (code, stdout, stderr) = shoal(args);
        assert_eq!((code, stdout.as_str()), (Some(expected), ""), "{args:?}: {stderr}");
        assert!(stderr.contains(words), "{args:?}: {stderr}");
    }
}

#[test]
fn a_worker_without_a_token_is_told_where_to_get_one() {
    let data = tempfile::tempdir().unwrap();
    let path = data.path().to_str().unwrap();
    let (code, _, stderr) = shoal(&["worker", "--join", "127.0.0.1:9", "--data", path]);
    assert_eq!(code, Some(3), "{stderr}");
    assert!(stderr.contains("shoal token create"), "{stderr}");
}

#[test]
fn a_folder_without_a_model_is_refused_before_anything_is_started_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let (code, stdout, stderr) = shoal(&["up", folder.path().to_str().unwrap()]);
    assert_eq!((code, stdout.as_str()), (Some(3), ""), "{stderr}");
    assert!(
        stderr.contains("config.json") && stderr.contains("no model here: expected a folder"),
        "{stderr}"
    );
    assert!(!stderr.contains("logs:") && !stderr.contains("joined"), "{stderr}");
}

#[test]
fn a_preference_that_a_policy_cannot_have_is_a_mistake() {
    let data = tempfile::tempdir().unwrap();
    let path = data.path().join("c1");
    let line = ["coordinator", "--listen", "127.0.0.1:0", "--cluster", "127.0.0.1:0", "--data"];
    let more = [path.to_str().unwrap(), "--policy", "p2c", "--prefix-affinity"];
    let (code, _, stderr) = shoal(&line.into_iter().chain(more).collect::<Vec<_>>());
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("--policy score"), "{stderr}");
}

/// One that has run and was told to stop.
fn founded(data: &std::path::Path) {
    let mut coordinator = Command::new(env!("CARGO_BIN_EXE_shoal"))
        .args(["coordinator", "--listen", "127.0.0.1:0", "--cluster", "127.0.0.1:0"])
        .args(["--announce", "--lifeline", "--data"])
        .arg(data)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the binary runs");
    let mut line = String::new();
    let stdout = coordinator.stdout.take().expect("it is piped");
    BufReader::new(stdout).read_line(&mut line).expect("an announcement");
    drop(coordinator.stdin.take());
    assert!(coordinator.wait().expect("its end").success(), "{line}");
}

#[test]
fn a_damaged_state_is_told_in_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("c1");
    founded(&data);
    let state = data.join("state.redb");
    let sound = std::fs::read(&state).unwrap();
    let damaged = [
        (sound[..sound.len() / 2].to_vec(), "the file is damaged"),
        (b"hello, this is no database".repeat(1000), "the file is damaged"),
        (Vec::new(), "has an identity but not the cluster's state"),
    ];
    for (bytes, words) in damaged {
        std::fs::write(&state, bytes).unwrap();
        let line = ["coordinator", "--listen", "127.0.0.1:0", "--cluster", "127.0.0.1:0", "--data"];
        let (code, _, stderr) = shoal(&[&line[..], &[data.to_str().unwrap()]].concat());
        assert_eq!(code, Some(3), "{stderr}");
        assert!(stderr.contains(words) && stderr.contains("backup"), "{stderr}");
        assert!(!stderr.contains("panicked") && stderr.lines().count() == 1, "{stderr}");
    }
}

#[test]
fn a_lone_coordinator_has_nobody_to_give_up() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("c1");
    founded(&data);
    let (code, _, stderr) =
        shoal(&["coordinators", "recover-alone", "--data", data.to_str().unwrap()]);
    assert_eq!(code, Some(3), "{stderr}");
    assert!(stderr.contains("c1 is the only coordinator already"), "{stderr}");
}
