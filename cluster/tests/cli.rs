//! The binary from the outside, where no cluster is needed: what is printed where, and exit codes.

use std::process::{Command, Output};

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
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains("shoal token create"), "{stderr}");
}
