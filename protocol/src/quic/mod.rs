//! The transport shell.
