//! Several coordinators of one cluster: joined, promoted, killed, replaced; over real sockets and files.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]
#![allow(dead_code, reason = "not every test needs all of the support")]

mod control_support;

mod several_coordinators {
    mod beginnings;
    mod ca;
    mod cluster;
    mod members;
    mod refusals;
}
