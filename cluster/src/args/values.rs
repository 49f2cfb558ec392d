//! How each value is read, and what is said of one that cannot be.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::time::Duration;

use shoal_coordinator::config::{BadUrl, EtcdUrl};
use shoal_coordinator::router::policy::Policy;
use shoal_protocol::access::KeyName;
use shoal_protocol::id::{DeploymentName, NodeId, Role};
use shoal_protocol::join::JoinToken;
use shoal_protocol::mesh::{MeshAsked, Objective, Reduction, ZoneName};
use shoal_protocol::plan::{Activations, KvPrecision, Precision, StagesAsked};
use shoal_protocol::units::Bytes;
use shoal_shard_worker::agent::inventory::{MEMORY_MIN, THREADS_MAX};
use shoal_shard_worker::backend::cpus::Cpus;

/// For defaults, which are from 1 up.
pub const fn nonzero(n: u32) -> NonZeroU32 {
    match NonZeroU32::new(n) {
        Some(n) => n,
        None => NonZeroU32::MIN,
    }
}

/// A whole number from 1 up.
pub fn count(text: &str) -> Result<NonZeroU32, String> {
    text.parse().map_err(|_| format!("`{text}` is not a whole number from 1 up"))
}

/// Compute threads of a worker.
pub fn threads(text: &str) -> Result<NonZeroU32, String> {
    let most = THREADS_MAX as u32;
    text.parse().ok().filter(|n: &NonZeroU32| n.get() <= most).ok_or_else(|| {
        format!("`{text}` is no number of compute threads; a worker has 1 to {most}")
    })
}

/// `IP:PORT`, `localhost:PORT` or `:PORT`.
pub fn address(text: &str) -> Result<SocketAddr, String> {
    let missing_port =
        || format!("`{text}` has no port; write {text}:8000, or {text}:0 for any free one");
    match text.parse() {
        Ok(address) => Ok(address),
        Err(_) if text.parse::<std::net::IpAddr>().is_ok() => Err(missing_port()),
        Err(_) => resolve(text).ok_or_else(|| {
            format!(
                "`{text}` is not an address; write IP:PORT, such as 127.0.0.1:8000 or [::1]:8000"
            )
        }),
    }
}

/// Where a coordinator takes the cluster's conversations. Nobody knows the port but whoever chose it.
pub fn coordinator(text: &str) -> Result<SocketAddr, String> {
    let bad = |what: &str| {
        format!(
            "{what}; write IP:PORT, as a coordinator's --cluster says it, such as 10.0.0.1:4000 (there is no \
             default port: `shoal coordinators list` shows it)"
        )
    };
    let digits = |port: &str| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
    let port = |text: &str| text.rsplit_once(':').is_some_and(|(_, port)| digits(port));
    match address(text) {
        Ok(address) if address.port() == 0 => Err(bad(&format!("`{text}` has no port"))),
        Ok(address) => Ok(address),
        Err(_) if text.parse::<std::net::IpAddr>().is_ok() || !port(text) => {
            Err(bad(&format!("`{text}` has no port")))
        }
        Err(_) if text.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_err()) => {
            Err(bad(&format!("the port of `{text}` is not one from 1 to 65535")))
        }
        Err(_) => Err(bad(&format!("`{text}` is no address, and names are not looked up"))),
    }
}

/// `localhost:PORT` and `:PORT`, the two names that people type and that need no resolver.
fn resolve(text: &str) -> Option<SocketAddr> {
    let port = text.strip_prefix("localhost:").or_else(|| text.strip_prefix(':'))?;
    Some(SocketAddr::from(([127, 0, 0, 1], port.parse().ok()?)))
}

/// The memory of a worker, which holds something.
pub fn memory(text: &str) -> Result<Bytes, String> {
    match text.parse::<Bytes>() {
        Ok(Bytes(0)) => {
            Err("a budget of nothing holds nothing; write a size such as 600MiB".into())
        }
        Ok(bytes) if bytes < MEMORY_MIN => Err(format!(
            "a budget of {bytes} holds nothing: a layer with its cache and its buffers takes about {MEMORY_MIN} even of \
             the built-in demo model, so a worker needs as much; write a size such as 600MiB"
        )),
        Ok(bytes) => Ok(bytes),
        Err(error) => Err(error.to_string()),
    }
}

/// Processors to compute on.
pub fn cpus(text: &str) -> Result<Cpus, String> {
    let cpus: Cpus = text.parse()?;
    match cpus.count() {
        count if count > THREADS_MAX => Err(format!(
            "`{text}` are {count} processors; a worker computes on at most {THREADS_MAX}"
        )),
        _ => Ok(cpus),
    }
}

/// How weights are held.
pub fn precision(text: &str) -> Result<Precision, String> {
    text.parse()
}

/// How keys and values are held.
pub fn kv(text: &str) -> Result<KvPrecision, String> {
    text.parse()
}

/// What rows are in products with whole numbers.
pub fn activations(text: &str) -> Result<Activations, String> {
    text.parse()
}

/// A deployment's name.
pub fn name(text: &str) -> Result<DeploymentName, String> {
    text.parse().map_err(|error: shoal_protocol::id::BadId| error.to_string())
}

/// How replicas are chosen.
pub fn policy(text: &str) -> Result<Policy, String> {
    text.parse()
        .map_err(|error: shoal_coordinator::router::policy::UnknownPolicy| error.to_string())
}

/// An API key's name.
pub fn key_name(text: &str) -> Result<KeyName, String> {
    text.parse().map_err(|error: shoal_protocol::id::BadId| error.to_string())
}

/// A node, by its id.
pub fn node(text: &str) -> Result<NodeId, String> {
    text.parse()
        .map_err(|_| format!("`{text}` is not a node; write w3, as `shoal nodes list` does"))
}

/// The beginning of a join token's id.
pub fn token_id(text: &str) -> Result<String, String> {
    // Whoever pastes the token itself has not meant to have it in an error.
    let id = text.len() >= 4 && text.len() <= 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
    id.then(|| text.to_owned())
        .ok_or_else(|| "that is no id of a token; `shoal token list` shows them".to_owned())
}

/// A number of stages, or `auto`.
pub fn stages(text: &str) -> Result<StagesAsked, String> {
    if text == "auto" {
        return Ok(StagesAsked::Auto);
    }
    let bad = |_| format!("`{text}` is neither `auto` nor a whole number from 1 up");
    text.parse::<NonZeroU32>().map(|n| StagesAsked::Exactly(n.get())).map_err(bad)
}

/// `STAGESxRANKS`, or `auto`.
pub fn mesh(text: &str) -> Result<MeshAsked, String> {
    text.parse()
}

/// What a layout is to be good at.
pub fn objective(text: &str) -> Result<Objective, String> {
    text.parse()
}

/// How ranks come to one result.
pub fn reduction(text: &str) -> Result<Reduction, String> {
    text.parse()
}

/// A failure domain.
pub fn zone(text: &str) -> Result<ZoneName, String> {
    text.parse().map_err(|error: shoal_protocol::id::BadId| error.to_string())
}

/// A worker, as `shoal status` or as `shoal up` calls it.
pub fn worker(text: &str) -> Result<NodeId, String> {
    let short = text.strip_prefix("worker-").map(|number| format!("w{number}"));
    let id: Result<NodeId, _> = short.as_deref().unwrap_or(text).parse();
    match id {
        Ok(id) if id.role == Role::Worker => Ok(id),
        _ => Err(format!("`{text}` is not a worker; write w2 or worker-2")),
    }
}

/// What `shoal token create` printed.
pub fn token(text: &str) -> Result<JoinToken, String> {
    text.parse().map_err(|error: shoal_protocol::join::BadJoinToken| error.to_string())
}

/// Which etcd, and where in it.
pub fn store(text: &str) -> Result<EtcdUrl, String> {
    text.parse().map_err(|error: BadUrl| error.to_string())
}

/// What this build can compute on.
pub fn device(text: &str) -> Result<String, String> {
    match text {
        "cpu" => Ok(text.to_owned()),
        _ => Err(format!("`{text}` is not a device that this build has; it has cpu")),
    }
}

/// A time with its unit.
pub fn duration(text: &str) -> Result<Duration, String> {
    let bad = || format!("`{text}` is not a time; write 90s, 30m, 1h or 7d");
    let split = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
    let (number, unit) = text.split_at(split);
    let number: u64 = number.parse().map_err(|_| bad())?;
    let unit_s = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3_600,
        "d" => 86_400,
        _ => return Err(bad()),
    };
    match number.checked_mul(unit_s) {
        Some(0) | None => Err(bad()),
        Some(seconds) => Ok(Duration::from_secs(seconds)),
    }
}
