//! What people and scripts get to see: data for stdout, talk for stderr.

pub mod access;
pub mod adapters;
pub mod ca;
pub mod coordinators;
pub mod json;
pub mod progress;
pub mod table;
pub mod upgrade;

#[cfg(test)]
mod golden;
