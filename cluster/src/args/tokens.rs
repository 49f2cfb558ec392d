//! `shoal token create | list | revoke`.

use std::num::NonZeroU32;
use std::time::Duration;

use clap::{Args as ClapArgs, Subcommand, ValueEnum};
use shoal_protocol::id::Role;
use shoal_protocol::join::JoinToken;

use super::values::{count, duration, nonzero, token};
use super::{ClusterArgs, ListArgs, TokenRevokeArgs};

/// `shoal token …`.
#[derive(Debug, Subcommand)]
pub enum TokenCommand {
    /// Make a token and print it to stdout
    #[command(after_help = TOKEN_EXAMPLES)]
    Create(TokenCreateArgs),
    /// Show the tokens that can still be used
    List(ListArgs),
    /// Take a token back
    Revoke(TokenRevokeArgs),
}

const TOKEN_EXAMPLES: &str = "\
Examples:
  shoal token create --role worker                            for one worker, within the hour
  shoal token create --role worker --uses 8 --expires 30m     for eight

A token carries the fingerprint of the cluster's CA, so a joiner knows whom it talks to.";

/// `shoal token create`.
#[derive(Debug, Clone, ClapArgs)]
pub struct TokenCreateArgs {
    /// What its user will be
    #[arg(long, value_enum)]
    pub role: TokenRole,
    /// How many nodes may use it
    #[arg(long, value_name = "N", default_value_t = nonzero(1), value_parser = count)]
    pub uses: NonZeroU32,
    /// How long it is good for: 90s, 30m, 1h, 7d
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = duration)]
    pub expires: Duration,
    /// Which cluster.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

/// The roles that a token can give.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TokenRole {
    /// Runs shards.
    Worker,
    /// Serves the API and holds the state, beside other coordinators.
    Coordinator,
}

impl From<TokenRole> for Role {
    fn from(role: TokenRole) -> Self {
        match role {
            TokenRole::Worker => Role::Worker,
            TokenRole::Coordinator => Role::Coordinator,
        }
    }
}

/// What a node that joins shows at its first start.
#[derive(Debug, Clone, ClapArgs)]
pub struct InvitationArgs {
    /// What `shoal token create` printed, with the role of this node; the environment variable keeps it
    /// out of the list of processes
    #[arg(
        long,
        value_name = "T",
        env = "SHOAL_TOKEN",
        hide_env_values = true,
        value_parser = token
    )]
    pub token: Option<JoinToken>,
}
