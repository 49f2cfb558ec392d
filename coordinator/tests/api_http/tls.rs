//! The API with TLS, seen by a client that trusts the certificate it was made with.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use shoal_coordinator::api::tls::{Tls, TlsError, TlsFiles};
use shoal_coordinator::api::{Gate, Limits};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::setup::Setup;

const NAME: &str = "api.example";

/// A certificate and its key in a folder, each as `name.pem`.
struct Made {
    certificate: rcgen::Certificate,
    key: rcgen::KeyPair,
}

impl Made {
    fn new() -> Self {
        let key = rcgen::KeyPair::generate().expect("a key");
        let params = rcgen::CertificateParams::new(vec![NAME.to_owned()]).expect("a name");
        let certificate = params.self_signed(&key).expect("a certificate");
        Self { certificate, key }
    }

    fn write(&self, folder: &Path) -> TlsFiles {
        let files = TlsFiles { certificate: folder.join("cert.pem"), key: folder.join("key.pem") };
        std::fs::write(&files.certificate, self.certificate.pem()).expect("written");
        std::fs::write(&files.key, self.key.serialize_pem()).expect("written");
        files
    }
}

struct Served {
    setup: Setup,
    tls: Arc<Tls>,
    made: Made,
    folder: tempfile::TempDir,
}

async fn served() -> Served {
    let folder = tempfile::tempdir().expect("a folder");
    let made = Made::new();
    let tls = Arc::new(Tls::load(made.write(folder.path())).expect("good files"));
    let gate = Gate::without_keys();
    let setup = Setup::over(Limits::default(), gate, Some(Arc::clone(&tls))).await;
    Served { setup, tls, made, folder }
}

/// A connection of a client that trusts this certificate alone.
async fn connect(address: SocketAddr, trusted: &Made) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    let der: CertificateDer<'static> = trusted.certificate.der().clone();
    roots.add(der).expect("a root");
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let stream = TcpStream::connect(address).await?;
    let name = ServerName::try_from(NAME).expect("a name");
    TlsConnector::from(Arc::new(config)).connect(name, stream).await
}

async fn ask(mut stream: TlsStream<TcpStream>) -> String {
    let request = "GET /v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).await.expect("it reads");
    let mut answer = String::new();
    let read = tokio::time::timeout(Duration::from_secs(10), stream.read_to_string(&mut answer));
    read.await.expect("an answer in time").expect("a proper end");
    answer
}

#[tokio::test]
async fn a_client_that_trusts_the_certificate_is_answered_and_plain_http_is_not() {
    let served = served().await;
    let http = served.setup.http;
    let stream = connect(http, &served.made).await.expect("a handshake");
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
    let answer = ask(stream).await;
    assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("\"demo\""), "{answer}");
    assert!(connect(http, &Made::new()).await.is_err(), "another certificate was shown");

    let mut plain = TcpStream::connect(http).await.expect("it listens");
    plain.write_all(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n").await.expect("it reads");
    let mut bytes = Vec::new();
    // TLS's alert, or nothing.
    let _ = plain.read_to_end(&mut bytes).await;
    assert!(!bytes.starts_with(b"HTTP"), "{}", String::from_utf8_lossy(&bytes));
}

#[tokio::test]
async fn a_client_that_does_not_get_on_with_its_handshake_is_hung_up_on() {
    let served = served().await;
    let mut silent = TcpStream::connect(served.setup.http).await.expect("it listens");
    let mut byte = [0];
    let read = tokio::time::timeout(Duration::from_secs(9), silent.read(&mut byte)).await;
    assert_eq!(read.expect("an end in time").unwrap_or(0), 0);
}

#[tokio::test]
async fn a_handshake_does_not_hold_up_the_end() {
    let served = served().await;
    let _silent = TcpStream::connect(served.setup.http).await.expect("it listens");
    // It has been accepted once the next one is answered.
    ask(connect(served.setup.http, &served.made).await.expect("a handshake")).await;
    served.setup.draining.send_replace(true);
    let end = tokio::time::timeout(Duration::from_secs(3), served.setup.server).await;
    end.expect("an end in time").expect("no panic");
}

#[tokio::test]
async fn a_new_certificate_is_shown_once_it_is_whole() {
    let served = served().await;
    let (http, next) = (served.setup.http, Made::new());
    assert!(!served.tls.refresh().expect("nothing new"));

    // The certificate has been renewed, the key is still on its way.
    let files = TlsFiles {
        certificate: served.folder.path().join("cert.pem"),
        key: served.folder.path().join("key.pem"),
    };
    std::fs::write(&files.certificate, next.certificate.pem() + "\n").expect("written");
    let error = served.tls.refresh().expect_err("they do not fit");
    assert!(matches!(error, TlsError::Unusable { .. }), "{error}");
    connect(http, &served.made).await.expect("the certificate of before");
    assert!(!served.tls.refresh().expect("said once"));

    std::fs::write(&files.key, next.key.serialize_pem() + "\n").expect("written");
    assert!(served.tls.refresh().expect("they fit"));
    connect(http, &next).await.expect("the new certificate");
    assert!(connect(http, &served.made).await.is_err());

    std::fs::remove_file(&files.key).expect("removed");
    assert!(matches!(served.tls.refresh(), Err(TlsError::Read { .. })));
    connect(http, &next).await.expect("still");
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let made = Made::new();
    let certificate = made.certificate.pem();
    let key = made.key.serialize_pem();
    let other = Made::new().key.serialize_pem();
    let cut = &certificate[..certificate.len() / 2];
    let damaged = key.replace("\nM", "\n*");
    let large = "x".repeat(2 << 20);
    for (certificate, key, words) in [
        (certificate.as_str(), other.as_str(), "key.pem cannot be used"),
        (&certificate, &certificate, "key.pem holds no private key"),
        (&certificate, "", "key.pem holds no private key"),
        (&key, &key, "cert.pem holds no certificate"),
        (cut, &key, "cert.pem is damaged"),
        (&certificate, &damaged, "key.pem is damaged"),
        (&large, &key, "cert.pem is too large"),
    ] {
        let files = made.write(folder.path());
        std::fs::write(&files.certificate, certificate).expect("written");
        std::fs::write(&files.key, key).expect("written");
        let error = Tls::load(files).expect_err(words).to_string();
        assert!(error.contains(words), "{error}");
        assert!(!error.contains("BEGIN PRIVATE KEY-----\nM"), "{error}");
    }
    let none = TlsFiles { certificate: folder.path().join("no"), key: folder.path().join("no") };
    let error = Tls::load(none).expect_err("no file").to_string();
    assert!(error.contains("cannot read") && error.contains("/no"), "{error}");
}
