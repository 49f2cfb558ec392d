//! `shoal adapters …`, and what lets clients do the same.

use std::path::PathBuf;

use clap::{Args as ClapArgs, Subcommand};
use shoal_protocol::id::DeploymentName;

use super::values::name;
use super::{ClusterArgs, ListArgs};

/// `shoal adapters …`.
#[derive(Debug, Subcommand)]
pub enum AdaptersCommand {
    /// Serve a LoRA adapter beside its base model, and wait until it can be used
    #[command(after_help = LOAD_EXAMPLES)]
    Load(AdapterLoadArgs),
    /// Show the adapters, and where they can be used
    List(ListArgs),
    /// Stop serving an adapter; answers that use it end first
    Unload(AdapterUnloadArgs),
}

const LOAD_EXAMPLES: &str = "\
Examples:
  shoal adapters load support --deployment llama-8b /adapters/support
  shoal adapters load sql --deployment llama-8b org/llama-8b-sql@v2

Requests choose it by its name, as they choose a model. The folder is one that PEFT has written
(adapter_config.json with adapter_model.safetensors or .bin); each coordinator and worker must be able to
read it under the same path. One of the Hugging Face hub each of them fetches, at the commit that its
revision means now.";

/// `shoal adapters load`.
#[derive(Debug, Clone, ClapArgs)]
pub struct AdapterLoadArgs {
    /// What clients will call it
    #[arg(value_parser = name)]
    pub name: DeploymentName,
    /// Its folder, or org/name or org/name@revision of the hub
    pub path: PathBuf,
    /// The deployment of its base model
    #[arg(long, value_name = "D", value_parser = name)]
    pub deployment: DeploymentName,
    /// Which cluster.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

/// `shoal adapters unload`.
#[derive(Debug, Clone, ClapArgs)]
pub struct AdapterUnloadArgs {
    /// The adapter
    #[arg(value_parser = name)]
    pub name: DeploymentName,
    /// Which cluster.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

/// Who may load adapters besides operators.
#[derive(Debug, Clone, Copy, Default, ClapArgs)]
pub struct RuntimeAdapterArgs {
    /// Let whoever may use the public API load and unload adapters through it too, as vLLM's clients
    /// do (/v1/load_lora_adapter, /v1/unload_lora_adapter)
    #[arg(long)]
    pub allow_runtime_adapters: bool,
}
