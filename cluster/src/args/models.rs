//! The words of `shoal models`.

use clap::Args as ClapArgs;

/// `shoal models`. It asks no cluster: it is about this binary.
#[derive(Debug, Clone, ClapArgs)]
pub struct ModelsArgs {
    /// Print one line of JSON
    #[arg(long)]
    pub json: bool,
}
