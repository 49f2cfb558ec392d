//! `shoal upgrade …`.

use clap::Subcommand;

use super::ListArgs;

/// `shoal upgrade …`.
#[derive(Debug, Subcommand)]
pub enum UpgradeCommand {
    /// Show which protocol version each node speaks
    Status(ListArgs),
    /// Refuse older builds from now on, once every node runs the newer one
    #[command(after_help = FINISH_EXAMPLES)]
    Finish(ListArgs),
}

const FINISH_EXAMPLES: &str = "\
Until then a worker may go back to its older build. Where a node still runs it, or is away and nobody
knows, this is refused with its name, and nothing changes.";
