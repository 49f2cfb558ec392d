//! Where a worker listens, and where others find it.

use std::net::SocketAddr;

use clap::Args as ClapArgs;
use shoal_shard_worker::Addresses;

use super::values::address;

/// The four addresses of `shoal worker`.
#[derive(Debug, Clone, Copy, Default, ClapArgs)]
pub struct WorkerAddressArgs {
    /// Where to take requests of coordinators (UDP) [default: any port of the address that leads to
    /// the coordinators]
    #[arg(long, value_name = "ADDR", value_parser = address)]
    pub requests: Option<SocketAddr>,
    /// Where to take activations of other workers (UDP) [default: as for --requests]
    #[arg(long, value_name = "ADDR", value_parser = address)]
    pub activations: Option<SocketAddr>,
    /// Where coordinators reach --requests, if that is another address
    #[arg(long, value_name = "ADDR", value_parser = address)]
    pub advertise_requests: Option<SocketAddr>,
    /// Where workers reach --activations, if that is another address
    #[arg(long, value_name = "ADDR", value_parser = address)]
    pub advertise_activations: Option<SocketAddr>,
}

impl From<WorkerAddressArgs> for Addresses {
    fn from(args: WorkerAddressArgs) -> Self {
        let WorkerAddressArgs { requests, activations, advertise_requests, advertise_activations } =
            args;
        Self { requests, activations, advertise_requests, advertise_activations }
    }
}
