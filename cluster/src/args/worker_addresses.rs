//! Where a worker listens, and where others find it.

use std::net::SocketAddr;

use clap::Args as ClapArgs;
use shoal_shard_worker::Addresses;

use super::values::address;

/// The addresses of `shoal worker`.
#[derive(Debug, Clone, Copy, Default, ClapArgs)]
pub struct WorkerAddressArgs {
    /// Where to take requests of coordinators (UDP) [default: any port of the address that leads to
    /// the coordinators]
    #[arg(long, value_name = "ADDR", value_parser = address)]
    pub requests: Option<SocketAddr>,
    /// Where to take activations of other workers (UDP) [default: as for --requests]
    #[arg(long, value_name = "ADDR", value_parser = address)]
    pub activations: Option<SocketAddr>,
    /// Where to give weights to other workers (UDP) [default: any port of the address of --activations]
    #[arg(long, value_name = "ADDR", value_parser = address)]
    pub blobs: Option<SocketAddr>,
    /// Where coordinators reach --requests, if that is another address
    #[arg(long, value_name = "ADDR", value_parser = address)]
    pub advertise_requests: Option<SocketAddr>,
    /// Where workers reach --activations, if that is another address
    #[arg(long, value_name = "ADDR", value_parser = address)]
    pub advertise_activations: Option<SocketAddr>,
    /// Where workers reach --blobs, if that is another address
    #[arg(long, value_name = "ADDR", value_parser = address)]
    pub advertise_blobs: Option<SocketAddr>,
}

impl From<WorkerAddressArgs> for Addresses {
    fn from(args: WorkerAddressArgs) -> Self {
        let WorkerAddressArgs { requests, activations, blobs, .. } = args;
        let WorkerAddressArgs {
            advertise_requests, advertise_activations, advertise_blobs, ..
        } = args;
        Self {
            requests,
            activations,
            blobs,
            advertise_requests,
            advertise_activations,
            advertise_blobs,
        }
    }
}
