//! An etcd that wants certificates, and one that wants a password.

use std::path::Path;

use etcd_client::{Client, ConnectOptions, Permission, PermissionType};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use shoal_coordinator::config::{EtcdConfig, TlsFiles};
use shoal_coordinator::control::store::etcd;

use crate::contract::{coordinator, enrol, insist, within, workers};
use crate::process::{EtcdProcess, Flags, is_skipped};

/// Writes `ca.pem`, and NAME.pem with NAME.key for each name.
fn certificates(folder: &Path, names: &[&str]) {
    let mut params = CertificateParams::new([]).expect("names");
    params.distinguished_name.push(DnType::CommonName, "the test's CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(params, KeyPair::generate().expect("a key"))
        .expect("a certificate");
    let write = |name: String, text: String| {
        std::fs::write(folder.join(name), text).expect("a file");
    };
    write("ca.pem".into(), ca.pem());
    for name in names {
        let key = KeyPair::generate().expect("a key");
        let names = ["127.0.0.1".to_owned(), "localhost".to_owned()];
        let mut params = CertificateParams::new(names).expect("names");
        params.distinguished_name.push(DnType::CommonName, *name);
        let certificate = params.signed_by(&key, &ca).expect("a certificate");
        write(format!("{name}.pem"), certificate.pem());
        write(format!("{name}.key"), key.serialize_pem());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_with_certificates_on_both_sides() {
    if is_skipped() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    certificates(folder.path(), &["server", "client"]);
    let file = |name: &str| folder.path().join(name);
    let flag = |flag: &str, name: &str| format!("--{flag}={}", file(name).display());
    let flags = vec![
        flag("cert-file", "server.pem"),
        flag("key-file", "server.key"),
        flag("trusted-ca-file", "ca.pem"),
        "--client-cert-auth".to_owned(),
    ];
    let process = EtcdProcess::start(1, Flags { flags, tls: true });
    let url = format!("etcds://{}", process.address(0)).parse().expect("a URL");
    let tls = TlsFiles {
        ca: Some(file("ca.pem")),
        certificate: Some(file("client.pem")),
        key: Some(file("client.key")),
    };
    let config = EtcdConfig { tls, ..EtcdConfig::plain(url) };
    let opened = within("the start", etcd::open(&config, coordinator(1))).await;
    let (store, owner) = opened.expect("the store opens");
    insist(&store, enrol()).await;
    drop(store);
    owner.close().await;
    // Another CA: whoever answers is not believed.
    let other = tempfile::tempdir().expect("a folder");
    certificates(other.path(), &[]);
    let tls = TlsFiles { ca: Some(other.path().join("ca.pem")), ..config.tls };
    let config = EtcdConfig { tls, ..config };
    let error = within("the start", etcd::open(&config, coordinator(1))).await.unwrap_err();
    assert!(error.to_string().contains("the cluster's state at etcds://"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_with_a_password_from_a_file_also_after_etcd_was_started_again() {
    if is_skipped() {
        return;
    }
    let process = EtcdProcess::start(1, Flags::default());
    let mut root = process.client().await;
    for (user, password) in [("root", "secret"), ("shoal", "hunter2")] {
        root.user_add(user, password, None).await.expect("a user");
    }
    root.role_add("shoal").await.expect("a role");
    let keys = Permission::new(PermissionType::Readwrite, "shoal/").with_prefix();
    root.role_grant_permission("shoal", keys).await.expect("a permission");
    root.user_grant_role("shoal", "shoal").await.expect("a role");
    root.user_grant_role("root", "root").await.expect("a role");
    root.auth_enable().await.expect("users count");

    let password = process.folder().join("password");
    std::fs::write(&password, "hunter2\n").expect("a file");
    let url = format!("etcd://shoal@{}", process.address(0)).parse().expect("a URL");
    let config = EtcdConfig { password: Some(password.clone()), ..EtcdConfig::plain(url) };
    let opened = within("the start", etcd::open(&config, coordinator(1))).await;
    let (store, _owner) = opened.expect("the store opens");
    insist(&store, enrol()).await;
    // The tokens of before are good for nothing now.
    process.kill(0);
    process.start_member(0);
    insist(&store, enrol()).await;
    // And the password itself has changed: what is there can be read, and more when it is right.
    let as_root = ConnectOptions::new().with_user("root", "secret");
    let mut root = Client::connect([process.address(0)], Some(as_root)).await.expect("a client");
    root.user_change_password("shoal", "other").await.expect("a password");
    std::fs::write(&password, "wrong").expect("a file");
    let error = within("the start", etcd::open(&config, coordinator(2))).await.unwrap_err();
    assert!(error.to_string().contains("invalid user ID or password"), "{error}");
    std::fs::write(&password, "other").expect("a file");
    let opened = within("the start", etcd::open(&config, coordinator(2))).await;
    assert_eq!(workers(&opened.expect("the store opens").0.state()), 2);
}
