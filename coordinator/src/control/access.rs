//! ● Who may do what, from the operator's side: API keys, join tokens, nodes, and the CA.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use shoal_protocol::access::{
    AccessCall, AccessReply, KeyLimits, KeyName, KeyView, NodeView, NodesKnown, TokenView,
};
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::{DeploymentName, NodeId, Role};
use shoal_protocol::join::Hex;
use shoal_protocol::presence::PresenceView;

use super::agents::Agents;
use super::reconcile::ObservedWorker;
use super::rotation::CaServer;
use super::state::{
    ApiKey, Change, ClusterState, KeyCommand, KeyHash, NodeCommand, Timestamp, Token, TokenCommand,
    TokenHash,
};
use super::store::ControlStore;

/// How every key begins: what a scanner for leaked secrets looks for.
const KEY_PREFIX: &str = "sk-shoal-";

/// Bytes of a token's hash that are its id: among a thousand tokens no two begin alike.
const TOKEN_ID_LEN: usize = 6;

/// Answers operators about access.
#[derive(Clone, Debug)]
pub struct AccessServer {
    /// The replicated state.
    pub store: ControlStore,
    /// The connected workers.
    pub agents: Agents,
    /// Answers what is asked about the CA.
    pub ca: CaServer,
}

impl AccessServer {
    /// One call.
    pub async fn answer(
        &self,
        operator: NodeId,
        call: AccessCall,
    ) -> Result<AccessReply, WireError> {
        match call {
            AccessCall::CreateKey { name, limits, expires_s } => {
                self.create_key(operator, name, limits, expires_s).await
            }
            AccessCall::ListKeys => {
                let (state, now) = (self.store.read().await?, Timestamp::of(SystemTime::now()));
                Ok(AccessReply::Keys(state.keys.iter().map(|key| key_view(key, now)).collect()))
            }
            AccessCall::RevokeKey { name } => {
                self.store.propose(Change::Key(KeyCommand::Revoke { name: name.clone() })).await?;
                tracing::info!(%operator, %name, "API key revoked");
                Ok(AccessReply::Done)
            }
            AccessCall::ListTokens => {
                let (state, now) = (self.store.read().await?, Timestamp::of(SystemTime::now()));
                // Those that have expired are forgotten with the next one that is made.
                let alive = state.tokens.iter().filter(|token| token.expires >= now);
                Ok(AccessReply::Tokens(alive.map(token_view).collect()))
            }
            AccessCall::RevokeToken { id } => {
                let state = self.store.read().await?;
                let hash = find_token(&state, &id)?;
                self.store.propose(Change::Token(TokenCommand::Revoke { hash })).await?;
                tracing::info!(%operator, %id, "join token revoked");
                Ok(AccessReply::Done)
            }
            AccessCall::ListNodes => {
                let state = self.store.read().await?;
                let heard = self.store.presence();
                Ok(AccessReply::Nodes(node_views(&state, &self.agents.observe(), &heard)))
            }
            // Whoever asks for this has no majority, so there is nothing to wait for.
            AccessCall::ListNodesKnown => {
                let (state, heard) = (self.store.state(), self.store.presence());
                Ok(AccessReply::NodesKnown(NodesKnown {
                    nodes: node_views(&state, &self.agents.observe(), &heard),
                    as_of_s: state.clock().0,
                    no_majority: heard.no_majority,
                }))
            }
            AccessCall::RemoveNode { node, force } => self.remove_node(operator, node, force).await,
            AccessCall::RotateCa { skip_absent } => self.ca.rotate(operator, skip_absent).await,
            AccessCall::ListCas => self.ca.list().await,
            AccessCall::RenewAdmin { csr } => self.ca.renew(operator, &csr),
        }
    }

    async fn remove_node(
        &self,
        operator: NodeId,
        node: NodeId,
        force: bool,
    ) -> Result<AccessReply, WireError> {
        let state = self.store.read().await?;
        let connected = self.agents.observe().get(&node).is_some_and(|worker| worker.connected);
        let deployment = is_placed(&state, node).filter(|_| connected && !force);
        if let Some(deployment) = deployment {
            let words = format!(
                "{node} is connected and computes layers of {deployment}, whose answers would break \
                 off; take them elsewhere first (`shoal drain {node}`), or remove it all the same \
                 with --force"
            );
            return Err(WireError::new(ErrorCode::InvalidRequest, words));
        }
        self.store.propose(Change::Node(NodeCommand::Remove { node })).await?;
        tracing::info!(%operator, %node, force, "node removed");
        Ok(AccessReply::Done)
    }

    async fn create_key(
        &self,
        operator: NodeId,
        name: KeyName,
        limits: KeyLimits,
        expires_s: Option<u64>,
    ) -> Result<AccessReply, WireError> {
        let mut random = [0; 32];
        getrandom::fill(&mut random).map_err(|error| {
            WireError::new(ErrorCode::Internal, format!("no randomness: {error}"))
        })?;
        let secret = format!("{KEY_PREFIX}{}", Hex(&random));
        let (hash, expires) = (KeyHash::of(&secret), expires_s.map(Duration::from_secs));
        let create = KeyCommand::Create { name: name.clone(), hash, limits, expires };
        self.store.propose(Change::Key(create)).await?;
        tracing::info!(%operator, %name, ?limits, ?expires, "API key made");
        Ok(AccessReply::Key { secret })
    }
}

fn find_token(state: &ClusterState, id: &str) -> Result<TokenHash, WireError> {
    let id = id.to_ascii_lowercase();
    let mut found = state
        .tokens
        .iter()
        .filter(|token| !id.is_empty() && Hex(&token.hash.0).to_string().starts_with(&id));
    match (found.next(), found.next()) {
        (Some(token), None) => Ok(token.hash),
        (Some(_), Some(_)) => {
            let words = format!("several join tokens begin with `{id}`; give more of the id");
            Err(WireError::new(ErrorCode::InvalidRequest, words))
        }
        (None, _) => {
            let words = format!(
                "no join token has the id `{id}`: it was used up, has expired, or never was; \
                 `shoal token list` shows them"
            );
            Err(WireError::new(ErrorCode::NotFound, words))
        }
    }
}

fn token_view(token: &Token) -> TokenView {
    TokenView {
        id: Hex(&token.hash.0[..TOKEN_ID_LEN]).to_string(),
        role: token.role,
        uses_left: token.uses_left,
        expires_s: token.expires.0,
    }
}

fn node_views(
    state: &ClusterState,
    seen: &BTreeMap<NodeId, ObservedWorker>,
    heard: &PresenceView,
) -> Vec<NodeView> {
    let is_there = |node: NodeId| match node.role {
        Role::Worker => Some(seen.get(&node).is_some_and(|worker| worker.connected)),
        Role::Coordinator => Some(heard.of(node).is_some_and(|heard| heard.up)),
        Role::Admin => None,
    };
    let nodes = state.nodes.iter().map(|(node, known)| NodeView {
        node,
        joined_s: known.joined.0,
        starts: known.incarnation.map_or(0, |incarnation| incarnation.0),
        build: known.build.clone(),
        connected: is_there(node),
        placed: is_placed(state, node).is_some(),
    });
    nodes.collect()
}

/// The deployment of which a layer is on this node.
fn is_placed(state: &ClusterState, node: NodeId) -> Option<&DeploymentName> {
    let plan = state.plans.iter().find(|plan| plan.nodes().any(|placed| placed == node))?;
    Some(&plan.deployment)
}

fn key_view(key: &ApiKey, now: Timestamp) -> KeyView {
    KeyView {
        name: key.name.clone(),
        standing: key.standing(now),
        created_s: key.created.0,
        expires_s: key.expires.map(|at| at.0),
        revoked_s: key.revoked.map(|at| at.0),
        limits: key.limits,
    }
}
