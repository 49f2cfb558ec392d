//! ● Who this coordinator is: it founds a cluster, joins one, or finds itself again in its data folder.
//!
//! | in the folder | with `--join` | what happens |
//! |---|---|---|
//! | nothing | no | it founds a cluster: a CA, a log with one voter |
//! | nothing | yes | it joins: an identity, an empty log that waits for the leader |
//! | `identity` or `ca.key`, and `state.redb` | either | it goes on as what it was, and says so where a token is given |
//! | anything else | either | refused: a vote may be lost, or numbers would be given twice |

use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use shoal_protocol::id::{NodeId, Role};
use shoal_protocol::quic::ca::CertificateAuthority;
use shoal_protocol::quic::identity::Identity;
use shoal_protocol::quic::join;
use shoal_protocol::quic::renew::unused_token;

use crate::api::auth::may_listen;
use crate::config::CoordinatorConfig;
use crate::control::authority::{Authority, CaFiles};
use crate::control::peers::Outboxes;
use crate::control::state::{
    Change, CoordinatorCommand, Effect, KeyFingerprint, Keys, NodeCommand, Timestamp,
};
use crate::control::store::raft::{self, SendMessage, WhenEmpty};
use crate::control::store::{self, ControlStore, StoreConfig, StoreOwner};
use crate::start_error::StartError;

/// The file of an identity that a token has bought.
pub(crate) const IDENTITY_FILE: &str = "identity";

/// Who founds a cluster.
const FOUNDER: NodeId = NodeId::coordinator(1);

/// The admin certificate that a coordinator writes for its operator.
pub(crate) const OPERATOR: NodeId = NodeId::admin(1);

/// How long a coordinator may take to let this one in.
const JOIN_DEADLINE: Duration = Duration::from_secs(10);

/// What a coordinator begins with.
pub(crate) struct Begun {
    pub me: NodeId,
    pub store: ControlStore,
    pub owner: StoreOwner,
    pub authority: Authority,
    pub identity: Identity,
    pub outboxes: Outboxes,
}

/// Finds out who this is.
pub(crate) async fn begin(config: &CoordinatorConfig) -> Result<Begun, StartError> {
    let data = &config.data;
    create_folder(data)?;
    let has_state = config.store.may_have_state(data);
    let keys = CaFiles::of(data).load()?;
    let joined = Identity::load(&data.join(IDENTITY_FILE))?;
    let incomplete =
        |found, missing| StartError::Incomplete { path: data.to_owned(), found, missing };
    match (joined, keys.is_empty()) {
        (Some(identity), _) if identity.node.role != Role::Coordinator => {
            Err(StartError::NoCoordinator { path: data.to_owned(), node: identity.node })
        }
        (Some(_), _) if !has_state => Err(incomplete("an identity", "the cluster's state")),
        (Some(identity), _) => resume(config, identity, keys).await,
        (None, false) if !has_state => Err(incomplete("the CA's key", "the cluster's state")),
        (None, false) => {
            let identity = keys[0].issue_identity(FOUNDER, SystemTime::now())?;
            let begun = finish_founding(config, resume(config, identity, keys).await?).await?;
            begun.identity.save(&data.join(IDENTITY_FILE))?;
            Ok(begun)
        }
        (None, true) => match (&config.join[..], &config.token) {
            ([], _) => found(config).await,
            (_, None) => Err(StartError::NoToken { path: data.to_owned() }),
            (addresses, Some(_)) if data.join(raft::FILE_NAME).exists() => {
                tracing::warn!("a join broke off here before; joining {addresses:?} again");
                enter(config).await
            }
            _ => enter(config).await,
        },
    }
}

/// Goes on as what it was: believes what its copy of the state says, or what another coordinator said
/// since, and shows a fresh certificate where it has the key of the CA that signs.
async fn resume(
    config: &CoordinatorConfig,
    identity: Identity,
    keys: Vec<CertificateAuthority>,
) -> Result<Begun, StartError> {
    let founding = keys.first().map_or(identity.ca.as_slice(), |ca| ca.certificate());
    let authority = Authority::awaiting(founding);
    let mut begun = open(config, identity, authority, WhenEmpty::Wait).await?;
    let known = begun.store.state().authorities.trust().unwrap_or_default();
    let newest = known.or_newer(Some(&begun.identity.trust));
    if newest.revision > 0 {
        begun.authority.follow(newest);
    }
    for key in keys {
        begun.authority.keep(key);
    }
    if let Some(token) = &config.token {
        let knows = begun.identity.trusting(begun.authority.told());
        tracing::warn!("{}", unused_token(&knows, token));
    }
    if let Some(fresh) = begun.authority.certify(&begun.identity, SystemTime::now())? {
        fresh.save(&config.data.join(IDENTITY_FILE))?;
        begun.identity = fresh;
    }
    Ok(begun)
}

/// Founds a cluster. The state is written before the CA's key, so a founding that is cut off leaves a
/// state without nodes that anybody relies on, and is begun anew.
async fn found(config: &CoordinatorConfig) -> Result<Begun, StartError> {
    let data = &config.data;
    // Nobody has made a key yet, and a start that is refused for that leaves nothing behind.
    let at = Timestamp::of(SystemTime::now());
    let empty = !config.store.may_have_state(data);
    if empty && !may_listen(&Keys::default(), config.listen, at) {
        return Err(StartError::NotLoopback { address: config.listen });
    }
    let ca = CertificateAuthority::create(SystemTime::now())?;
    let identity = ca.issue_identity(FOUNDER, SystemTime::now())?;
    let begun = open(config, identity, Authority::holding(ca), WhenEmpty::Found).await?;
    if !begun.store.state().is_new() {
        let (found, missing) = ("the cluster's state", "the CA's key");
        return Err(StartError::Incomplete { path: data.to_owned(), found, missing });
    }
    let begun = finish_founding(config, begun).await?;
    if let Some(ca) = begun.authority.current() {
        CaFiles::of(data).save(&ca)?;
    }
    // Its key stays the same from now on, so that it can be renewed as everybody's.
    begun.identity.save(&data.join(IDENTITY_FILE))?;
    tracing::info!("founded a cluster in {}", data.display());
    Ok(begun)
}

/// The founder and its operator have numbers, before anybody else gets one. Where others may found a cluster
/// in the same store at the same time, one of them does.
async fn finish_founding(config: &CoordinatorConfig, begun: Begun) -> Result<Begun, StartError> {
    let shared = matches!(config.store, StoreConfig::Etcd(_));
    let ca = KeyFingerprint(begun.authority.fingerprint());
    let own = begun.identity.key_fingerprint().map_or(ca, KeyFingerprint);
    for node in [FOUNDER, OPERATOR] {
        let state = begun.store.state();
        if state.coordinators.iter().next().is_some() {
            break;
        }
        // The operator's key is a new one each time, and so is the founder's until it is on disk, so the
        // CA stands for the key that renews them where it must be known whose they are.
        let key = if node == FOUNDER && !shared { own } else { ca };
        let given = match state.nodes.get(node) {
            // In a folder of our own it is left of a founding that was cut off.
            Some(known) if shared && known.key != key => None,
            Some(_) => continue,
            None => {
                let enrol = Change::Node(NodeCommand::Enrol { role: node.role, key });
                Some(begun.store.propose(enrol).await?)
            }
        };
        let wanted = [Effect::NodeAdded { node }];
        if given.as_deref() != Some(&wanted[..]) {
            take_back(&begun.store, given.as_deref()).await;
            begun.owner.close().await;
            return Err(StartError::FoundedByAnother);
        }
    }
    Ok(begun)
}

/// The number that another founder left: nobody will be it.
async fn take_back(store: &ControlStore, given: Option<&[Effect]>) {
    let Some([Effect::NodeAdded { node }]) = given else { return };
    let remove = match node.role {
        Role::Coordinator => Change::Coordinator(CoordinatorCommand::Remove { node: *node }),
        _ => Change::Node(NodeCommand::Remove { node: *node }),
    };
    if let Err(error) = store.propose(remove).await {
        tracing::info!(%node, "its number was not taken back: {error}");
    }
}

/// Joins the cluster of the first who can let it in.
async fn enter(config: &CoordinatorConfig) -> Result<Begun, StartError> {
    let data = &config.data;
    let Some(token) = &config.token else {
        return Err(StartError::NoToken { path: data.to_owned() });
    };
    if token.role != Role::Coordinator {
        return Err(StartError::WrongToken { role: token.role });
    }
    let identity = join::join_any(&config.join, token, JOIN_DEADLINE).await?;
    tracing::info!(node = %identity.node, "joined the cluster");
    let authority = Authority::awaiting(&identity.ca);
    // The log's file first: an identity without it would be taken for a lost vote.
    let begun = open(config, identity.clone(), authority, WhenEmpty::Wait).await?;
    identity.save(&data.join(IDENTITY_FILE))?;
    Ok(begun)
}

async fn open(
    config: &CoordinatorConfig,
    identity: Identity,
    authority: Authority,
    empty: WhenEmpty,
) -> Result<Begun, StartError> {
    let outboxes = Outboxes::default();
    let send: SendMessage = {
        let outboxes = outboxes.clone();
        Box::new(move |message| outboxes.push(message))
    };
    let me = identity.node;
    let (store, owner) = store::open(&config.store, &config.data, me, empty, send).await?;
    Ok(Begun { me, store, owner, authority, identity, outboxes })
}

fn create_folder(path: &Path) -> Result<(), StartError> {
    // Keys lie in it.
    let created = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    created.map_err(|source| StartError::Data { path: path.to_owned(), source })
}
