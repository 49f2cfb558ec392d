//! What there can be too many of, and what to do about it: words of a refusal.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What there can be too many of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Noun {
    /// Join tokens.
    Tokens,
    /// Deployments.
    Deployments,
    /// Nodes.
    Nodes,
    /// API keys.
    Keys,
    /// Replicas.
    Replicas,
    /// Adapters, in the whole cluster.
    Adapters,
    /// Adapters of one deployment.
    AdaptersOfDeployment,
}

impl fmt::Display for Noun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Noun::Tokens => "join tokens",
            Noun::Deployments => "deployments",
            Noun::Nodes => "nodes of this role",
            Noun::Keys => "API keys",
            Noun::Replicas => "numbers of replicas given",
            Noun::Adapters => "adapters in this cluster",
            Noun::AdaptersOfDeployment => "adapters of this deployment",
        })
    }
}

/// What to do about too many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Advice {
    /// Time helps.
    WaitForExpiry,
    /// Remove one.
    Undeploy,
    /// Nothing helps.
    NewCluster,
    /// Take one back.
    RevokeKey,
    /// Unload one.
    UnloadAdapter,
}

impl fmt::Display for Advice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Advice::WaitForExpiry => "use those, or wait until one expires",
            Advice::Undeploy => "`shoal undeploy` one first",
            Advice::NewCluster => "their numbers are used up; start a new cluster",
            Advice::RevokeKey => "`shoal keys revoke` one first",
            Advice::UnloadAdapter => "`shoal adapters unload` one first",
        })
    }
}
