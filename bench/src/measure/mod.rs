//! Measuring: statistics, the machine, the report.

pub mod machine;
pub mod report;
pub mod stats;

pub use machine::Machine;
pub use report::Report;
pub use stats::Series;
