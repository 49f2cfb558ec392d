//! Real `shoal` processes on loopback.

mod admin;
mod binary;
pub mod cluster;
pub mod disk;
pub mod logs;
mod older;
mod process;
pub mod relay;
mod up;

pub use admin::Admin;
pub use binary::shoal;
pub use cluster::Cluster;
pub use older::older;
pub use process::{Finished, Process, Signal, is_running, signal, wait_until_gone};
pub use up::{Up, UpOptions, Worker};
