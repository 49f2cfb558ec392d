//! What every store owes the control plane, told once and shown for each: `contract.rs` has the
//! sentences, a fixture has the store.
//!
//! The store in etcd runs against real `etcd` processes, started here on free ports. Where there is no
//! etcd the tests fail and say what to install; SHOAL_SKIP_ETCD=1 skips them and says so.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]
#![allow(clippy::large_futures, reason = "a test has one of them")]

#[path = "store_contract/contract.rs"]
#[macro_use]
mod contract;
#[path = "store_contract/etcd.rs"]
mod etcd;
#[path = "store_contract/local.rs"]
mod local;
#[path = "store_contract/process.rs"]
mod process;
#[path = "store_contract/proxy.rs"]
mod proxy;
#[path = "store_contract/raft.rs"]
mod raft;
#[path = "store_contract/secure.rs"]
mod secure;

contract!(lone_raft_store, crate::local::Local);
contract!(raft_store, crate::raft::RaftFixture);
contract!(etcd_store, crate::etcd::EtcdFixture);
