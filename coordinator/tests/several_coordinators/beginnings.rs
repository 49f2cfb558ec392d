//! A start that goes wrong leaves nothing behind that the next one would take for more than it is.

use std::net::{TcpListener, UdpSocket};

use shoal_coordinator::StartError;
use shoal_coordinator::config::CoordinatorConfig;
use shoal_protocol::id::Role;

use super::cluster::{C, Cluster};
use crate::control_support::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_start_whose_port_is_taken_founds_nothing_and_the_folder_joins_another_cluster() {
    let cluster = Cluster::of_one().await;
    let folder = tempfile::tempdir().unwrap();
    let (udp, tcp) = (UdpSocket::bind("127.0.0.1:0"), TcpListener::bind("127.0.0.1:0"));
    let (udp, tcp) = (udp.unwrap(), tcp.unwrap());
    let taken = CoordinatorConfig { cluster: udp.local_addr().unwrap(), ..config(folder.path()) };
    assert!(matches!(start(taken).await, Err(StartError::Cluster(_))));
    let taken = CoordinatorConfig { listen: tcp.local_addr().unwrap(), ..config(folder.path()) };
    assert!(matches!(start(taken).await, Err(StartError::Api { .. })));
    // Nor does one that would be open to everybody.
    let open = CoordinatorConfig { listen: ([0; 4], 0).into(), ..config(folder.path()) };
    assert!(matches!(start(open).await, Err(StartError::NotLoopback { .. })));
    assert!(!folder.path().join("ca.key").exists() && !folder.path().join("identity").exists());

    let token = cluster.operator(0).await.token(Role::Coordinator, 1, 60).await;
    let join = vec![cluster.node(0).cluster_address()];
    let joins = CoordinatorConfig { join, token: Some(token), ..config(folder.path()) };
    assert_eq!(start(joins).await.unwrap().id(), C[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_of_one_cluster_goes_on_in_it_whatever_token_is_given() {
    let (mut cluster, other) = (Cluster::of_one().await, Cluster::of_one().await);
    let elsewhere = other.operator(0).await.token(Role::Coordinator, 2, 60).await;
    let used = cluster.operator(0).await.token(Role::Coordinator, 1, 60).await;
    cluster.join(0).await;
    for (index, id) in C.into_iter().enumerate().take(2) {
        cluster.nodes[index].take().unwrap().drain().await;
        let join = vec![other.node(0).cluster_address()];
        let again = CoordinatorConfig { join, ..config(cluster.data(index)) };
        let joins = CoordinatorConfig { token: Some(elsewhere.clone()), ..again.clone() };
        let node = start(joins).await.unwrap();
        assert_eq!(node.id(), id);
        assert_eq!(other.node(0).view().coordinators.len(), 1, "it is not in that one");
        node.drain().await;
        // One that was made here may lie about.
        let joins = CoordinatorConfig { token: Some(used.clone()), ..again };
        assert_eq!(start(joins).await.unwrap().id(), id);
    }
}
