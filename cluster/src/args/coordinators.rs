//! `shoal coordinators …`.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Subcommand};
use shoal_protocol::id::{NodeId, Role};

use super::ClusterArgs;

/// `shoal coordinators …`.
#[derive(Debug, Subcommand)]
pub enum CoordinatorsCommand {
    /// List them: who votes, who leads
    List(CoordinatorListArgs),
    /// Let coordinators that have joined vote
    #[command(after_help = ADD_EXAMPLES)]
    Add(CoordinatorAddArgs),
    /// Take the vote of coordinators and remove them from the cluster
    Remove(CoordinatorRemoveArgs),
    /// Go on with the one coordinator that is left, where a majority is lost for ever
    #[command(after_help = RECOVER_EXAMPLES)]
    RecoverAlone(RecoverAloneArgs),
}

const RECOVER_EXAMPLES: &str = "\
Example, on the machine of c3, after c1 and c2 have burned:
  systemctl stop shoal-coordinator
  shoal coordinators recover-alone --data /var/lib/shoal/coordinator                   shows what is there
  shoal coordinators recover-alone --data /var/lib/shoal/coordinator --give-up c1,c2   does it
  systemctl start shoal-coordinator

Never while the lost ones may come back with a majority of their own: what they decide meanwhile and
what this one decides cannot be brought together. Those that are given up are refused for ever.";

/// `shoal coordinators recover-alone`.
#[derive(Debug, Clone, ClapArgs)]
pub struct RecoverAloneArgs {
    /// The data folder of the coordinator that is left, which must not be running
    #[arg(long, value_name = "DIR")]
    pub data: PathBuf,
    /// All other coordinators, by name: each is lost for ever, and its machine stays off
    #[arg(long, value_name = "NODE", value_parser = coordinator, value_delimiter = ',')]
    pub give_up: Vec<NodeId>,
}

const ADD_EXAMPLES: &str = "\
Examples:
  shoal coordinators add c2 c3             from one to three, in one step
  shoal coordinators add c4 --replace c2   instead of one that is lost

A coordinator joins with `shoal token create --role coordinator` and `shoal coordinator --join`; it
serves the API at once, takes the log, and votes after this. 1, 3 or 5 vote.";

/// `shoal coordinators list`.
#[derive(Debug, Clone, ClapArgs)]
pub struct CoordinatorListArgs {
    /// Print them as one line of JSON
    #[arg(long)]
    pub json: bool,
    /// Which cluster.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

/// `shoal coordinators add`.
#[derive(Debug, Clone, ClapArgs)]
pub struct CoordinatorAddArgs {
    /// Those that are to vote, such as c2 c3
    #[arg(required = true, value_name = "NODE", value_parser = coordinator)]
    pub nodes: Vec<NodeId>,
    /// Remove this one in the same step
    #[arg(long, value_name = "NODE", value_parser = coordinator)]
    pub replace: Vec<NodeId>,
    /// Which cluster.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

/// `shoal coordinators remove`.
#[derive(Debug, Clone, ClapArgs)]
pub struct CoordinatorRemoveArgs {
    /// Those that are to go, such as c2 c3
    #[arg(required = true, value_name = "NODE", value_parser = coordinator)]
    pub nodes: Vec<NodeId>,
    /// Which cluster.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

fn coordinator(text: &str) -> Result<NodeId, String> {
    let node: NodeId = text.parse().map_err(|error| format!("{error}"))?;
    match node.role {
        Role::Coordinator => Ok(node),
        role => Err(format!("{node} is a {role}; a coordinator is c1, c2 …")),
    }
}
