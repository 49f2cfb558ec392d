//! `shoal ca …`.

use clap::{Args as ClapArgs, Subcommand};

use super::{ClusterArgs, ListArgs};

/// `shoal ca …`.
#[derive(Debug, Subcommand)]
pub enum CaCommand {
    /// Let a new CA take the place of the one that signs the nodes' certificates
    #[command(after_help = ROTATE_EXAMPLES)]
    Rotate(CaRotateArgs),
    /// Show the CAs that are believed, and how far a rotation is
    List(ListArgs),
}

const ROTATE_EXAMPLES: &str = "\
Examples:
  shoal ca rotate --wait                   until the old CA is believed no more
  shoal ca rotate --wait --skip-absent     not waiting for machines that are off

Nothing stops meanwhile: streams go on, and links that are up stay up. The old CA is believed until every
node shows a certificate of the new one, at most 24 hours; a node that was off comes back by itself.
Said again while a rotation is under way, it goes on with that one.";

/// `shoal ca rotate`.
#[derive(Debug, Clone, ClapArgs)]
pub struct CaRotateArgs {
    /// Wait until the old CA is believed no more
    #[arg(long)]
    pub wait: bool,
    /// Do not wait for nodes that are off before the old CA is believed no more
    #[arg(long)]
    pub skip_absent: bool,
    /// Which cluster.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}
