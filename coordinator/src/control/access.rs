//! ● Who may do what, from the operator's side: API keys, join tokens, nodes.

use std::time::{Duration, SystemTime};

use shoal_protocol::access::{AccessCall, AccessReply, KeyLimits, KeyName, KeyView};
use shoal_protocol::error::{ErrorCode, WireError};
use shoal_protocol::id::NodeId;
use shoal_protocol::join::Hex;

use super::agents::Agents;
use super::state::{ApiKey, Change, KeyCommand, KeyHash, Timestamp};
use super::store::ControlStore;

/// How every key begins: what a scanner for leaked secrets looks for.
const KEY_PREFIX: &str = "sk-shoal-";

/// Answers operators about access.
#[derive(Clone, Debug)]
pub struct AccessServer {
    /// The replicated state.
    pub store: ControlStore,
    /// The connected workers.
    pub agents: Agents,
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
            AccessCall::ListTokens
            | AccessCall::RevokeToken { .. }
            | AccessCall::ListNodes
            | AccessCall::RemoveNode { .. } => {
                Err(WireError::new(ErrorCode::Unsupported, "this version does not know how"))
            }
        }
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
