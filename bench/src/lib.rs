//! Numbers we can defend: seeded workloads, paired measurements, and the machine's own limits
//! beside each figure.
//!
//! A figure is the median of several runs. A comparison is the median of ratios of runs that were
//! interleaved A B A B …, because these machines drift. Every report carries the machine's memory
//! bandwidth with one and with two threads, measured in the same run.

pub mod admin;
pub mod client;
pub mod cluster;
pub mod measure;
pub mod micro;
pub mod news;
pub mod processes;
pub mod scenarios;
pub mod workload;
