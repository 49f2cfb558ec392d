//! ○ The planted bugs: each is a line of a shell or of a disk that does what it should not.
//!
//! They are switched on at run time, one at a time, and consulted by the simulator's shells. What they
//! prove is that the invariants see what such a mistake does, not that the code has none.

macro_rules! bugs {
    ($($(#[doc = $doc:literal])* $name:ident = $label:literal;)*) => {
        /// A mistake that can be planted.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Bug { $($(#[doc = $doc])* $name,)* }

        impl Bug {
            /// All of them.
            pub const ALL: &'static [Bug] = &[$(Bug::$name),*];

            /// Its name on a command line.
            pub fn label(self) -> &'static str {
                match self { $(Bug::$name => $label,)* }
            }

            /// What it does, for people.
            pub fn words(self) -> &'static str {
                match self { $(Bug::$name => concat!($($doc),*),)* }
            }

            /// The bug of this name.
            pub fn of(label: &str) -> Option<Bug> {
                Self::ALL.iter().copied().find(|bug| bug.label() == label)
            }
        }
    };
}

bugs! {
    /// A write is called durable while the disk still has it in its cache.
    SkipSync = "skip-sync";
    /// What a message promises is written after the message has left.
    SendBeforeWrite = "send-before-write";
    /// Term and vote are forgotten at a restart.
    ForgetVote = "forget-vote";
    /// A change is acknowledged when its leader has taken it, before a majority has it.
    AckBeforeCommit = "ack-before-commit";
    /// A read is answered from this copy without asking anybody.
    ReadWithoutQuorum = "read-without-quorum";
    /// A read is answered at its index although this copy has not reached it.
    ReadBeforeApply = "read-before-apply";
    /// A change that is sent again is sent as a new one.
    ApplyTwice = "apply-twice";
    /// A restart does not count its incarnation up, so commands of two starts look the same.
    SameIncarnation = "same-incarnation";
    /// A coordinator that lost its disk comes back under its old number.
    OldIdOnNewDisk = "old-id-on-new-disk";
    /// Entries that were contradicted stay on the disk behind those that replace them.
    KeepOldTail = "keep-old-tail";
    /// A compaction drops the entries and does not store the snapshot.
    LoseSnapshot = "lose-snapshot";
    /// A compaction drops one entry more than its snapshot has.
    CompactOneTooFar = "compact-one-too-far";
    /// A coordinator that follows tells workers what to be.
    FollowerActs = "follower-acts";
    /// A worker obeys whoever speaks, whatever the epoch.
    IgnoreEpoch = "ignore-epoch";
    /// A shard links with a neighbour of another generation.
    IgnoreGeneration = "ignore-generation";
    /// A shard says that it is ready before its links are up.
    ReadyBeforeLinked = "ready-before-linked";
    /// A shard says that it has stopped while it still holds its memory.
    StoppedTooEarly = "stopped-too-early";
    /// A worker that has fallen silent is never given up.
    NeverDead = "never-dead";
    /// A token that is here already is given to the client again.
    StaleDelivered = "stale-delivered";
    /// Events of an attempt that was given up count for the one that runs.
    OldAttemptTaken = "old-attempt-taken";
    /// What was generated before becomes prompt when an answer goes on.
    ReceivedBecomesPrompt = "received-becomes-prompt";
    /// An answer goes on without one of the tokens that it has.
    ResumeDropsToken = "resume-drops-token";
    /// A place at a replica is given back twice.
    PlaceFreedTwice = "place-freed-twice";
    /// A place at a replica is never given back where the attempt was lost.
    PlaceLeaks = "place-leaks";
}
