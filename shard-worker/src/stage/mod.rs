//! A stage: what it knows of its sequences, and how steps reach it and leave it.
//!
//! `table` is pure; the rest are shells.

pub mod table;
