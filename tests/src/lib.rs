//! What the tests of whole clusters share: real processes on loopback, a client of their API, and
//! models to serve.
//!
//! Every wait is for an event and has a deadline; whatever was started is killed when its value is
//! dropped; a log with an error that nobody expected fails the test.

pub mod api;
pub mod collector;
pub mod faults;
pub mod hub;
pub mod model;
pub mod plan;
pub mod planted;
pub mod proc;
pub mod signed;
pub mod sim;
pub mod slow;
