//! The verbs about who may do what: `keys`, `token list | revoke`, `nodes`.

use std::num::NonZeroU32;
use std::time::Duration;

use clap::{Args as ClapArgs, Subcommand};
use shoal_protocol::access::KeyName;
use shoal_protocol::id::NodeId;

use super::ClusterArgs;
use super::values::{count, duration, key_name, node, token_id};

/// `shoal keys …`.
#[derive(Debug, Subcommand)]
pub enum KeysCommand {
    /// Make a key and print it to stdout, this once
    #[command(after_help = KEYS_EXAMPLES)]
    Create(KeyCreateArgs),
    /// Show the keys' names, limits and standing
    List(ListArgs),
    /// Take a key back; requests that are under way still end
    Revoke(KeyRevokeArgs),
}

const KEYS_EXAMPLES: &str = "\
Examples:
  shoal keys create alice                            good until it is revoked
  shoal keys create ci --rpm 60 --concurrent 4       at most 60 requests a minute, 4 at a time
  export OPENAI_API_KEY=$(shoal keys create bob --expires 30d)

Limits are counted by each coordinator for itself. Once a key was made every request to /v1 needs
one, on loopback too; /health, /ready and /metrics need none. Where there is a key, the API may listen
on other addresses than loopback (`shoal coordinator --listen`).";

/// `shoal keys create`.
#[derive(Debug, Clone, ClapArgs)]
pub struct KeyCreateArgs {
    /// What to call it
    #[arg(value_parser = key_name)]
    pub name: KeyName,
    /// Requests a minute [default: any number]
    #[arg(long, value_name = "N", value_parser = count)]
    pub rpm: Option<NonZeroU32>,
    /// Requests at the same time [default: any number]
    #[arg(long, value_name = "N", value_parser = count)]
    pub concurrent: Option<NonZeroU32>,
    /// How long it is good for: 90s, 30m, 1h, 30d [default: until it is revoked]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub expires: Option<Duration>,
    /// Which cluster.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

/// `shoal keys revoke`.
#[derive(Debug, Clone, ClapArgs)]
pub struct KeyRevokeArgs {
    /// The key's name
    #[arg(value_parser = key_name)]
    pub name: KeyName,
    /// Which cluster.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

/// `shoal token revoke`.
#[derive(Debug, Clone, ClapArgs)]
pub struct TokenRevokeArgs {
    /// Its id, or the beginning of it, as `shoal token list` shows it
    #[arg(value_parser = token_id)]
    pub id: String,
    /// Which cluster.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

/// `shoal nodes …`.
#[derive(Debug, Subcommand)]
pub enum NodesCommand {
    /// Show everybody who belongs to the cluster
    List(ListArgs),
    /// Forget a node for ever: it is out at once, and its certificate is not renewed
    #[command(after_help = NODES_EXAMPLES)]
    Remove(NodeRemoveArgs),
}

const NODES_EXAMPLES: &str = "\
Examples:
  shoal nodes remove w3            a worker that is gone, or that nothing is placed on
  shoal nodes remove w3 --force    even while it computes: its layers are placed elsewhere

Its number is never given again. The machine may join again with a new token and an empty --data.";

/// `shoal nodes remove`.
#[derive(Debug, Clone, ClapArgs)]
pub struct NodeRemoveArgs {
    /// The node, such as w3
    #[arg(value_parser = node)]
    pub node: NodeId,
    /// Even while it is connected and computes
    #[arg(long)]
    pub force: bool,
    /// Which cluster.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

/// `shoal … list`.
#[derive(Debug, Clone, ClapArgs)]
pub struct ListArgs {
    /// Print one line of JSON
    #[arg(long)]
    pub json: bool,
    /// Which cluster.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}
