//! ○ The words in which a shard says that a link was lost, and how a coordinator reads from them who
//! does not reach whom.
//!
//! They are the message of a `WireError` with `ErrorCode::WorkerLost`, which every version has sent in this
//! form; a field of its own would be one that older workers do not have.

use std::fmt;

use crate::id::NodeId;

/// What begins the reason where a neighbour has fallen silent and its host does not say that nobody
/// listens there.
pub const SILENT: &str = "it is frozen, or its machine or the way to it is gone";

/// The message: who was at the other end (its text begins with its id), and what happened.
pub fn message(neighbour: impl fmt::Display, why: impl fmt::Display) -> String {
    format!("the link to {neighbour} is gone: {why}")
}

/// The neighbour that has fallen silent at first hand: what is told of somebody else's link is not.
pub fn silent_neighbour(message: &str) -> Option<NodeId> {
    let (neighbour, why) = message.strip_prefix("the link to ")?.split_once(" is gone: ")?;
    if !why.starts_with(SILENT) {
        return None;
    }
    neighbour.split(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_neighbour_that_fell_silent_is_named_and_one_that_is_told_of_is_not() {
        let silent = format!("{SILENT}; silent for 45ms");
        let first = message("w2 (stage 1 at 10.0.0.2:4000)", &silent);
        assert_eq!(silent_neighbour(&first), Some(NodeId::worker(2)));
        let told = message("w3 (stage 2 at 10.0.0.3:4000)", format!("closed by peer: {first}"));
        assert_eq!(silent_neighbour(&told), None);
        let killed = message("w2 (stage 1)", "its process is gone: nobody listens at its address");
        assert_eq!(silent_neighbour(&killed), None);
        assert_eq!(silent_neighbour("the link to x is gone: it is frozen"), None);
    }
}
