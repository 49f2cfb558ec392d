//! What every frame on every stream looks like, and how its flat parts are written and read.
//!
//! ```text
//! ┌───────────── prelude, 8 bytes ──────────────┬───────────────┬──────────────────────────────┐
//! │ body_len u32 │ header_len u8 │ kind u8 │ version u8 │ 0 u8 │ header ≤ 64 B │ body: records, then payload   │
//! └─────────────────────────────────────────────┴───────────────┴──────────────────────────────┘
//! ```
//!
//! All numbers are little-endian. Headers and records are flat rkyv archives (fixed-size fields
//! alone: no string, map or pointer), read by validated access only. Payloads are raw tensor bytes
//! whose shape and type follow from the plan: a peer never sends them. The transport (QUIC) has a
//! checksum, so frames have none.

use crate::version::FRAME_VERSION;

/// Bytes of a frame's prelude.
pub const PRELUDE_LEN: usize = 8;

/// The largest header, in bytes.
pub const HEADER_LEN_MAX: usize = 64;

/// The largest body of any frame: one step of 8,192 rows of 8,192 floats with room to spare.
/// Receivers check a tighter bound, which follows from the plan, before they allocate.
pub const BODY_LEN_MAX: usize = 512 << 20;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FrameKind {
    /// The first frame of an activation link: `activation::LinkHello`.
    LinkHello = 1,
    /// A sequence begins: `activation::OpenHeader`, `request::SamplingRecord`, token ids.
    Open = 2,
    /// A batch: `activation::StepHeader`, row records, block grants, hidden states.
    Step = 3,
    /// A sequence ends: `activation::CloseHeader`.
    Close = 4,
    /// What the last stage sampled: `activation::SamplesHeader`, sample and candidate records.
    Samples = 5,
    /// What comes next (`shoal-req`) or has just been opened (`shoal-act`) is traced:
    /// `trace::TraceHeader`. Peers know it from protocol version `version::KNOWS_TRACES` on.
    Trace = 6,
    /// What one tensor rank tells another in the middle of a step: `activation::Partial`. Only between
    /// workers that run ranks (`version::KNOWS_RANKS`).
    Partial = 7,
    /// Two ranks that may be on one machine agree on a shorter way for their partial results:
    /// `activation::Near`. The first frames behind the greeting of such a link.
    Near = 8,
    /// A coordinator asks a head to go on with a sequence: `request::GenerateHeader`.
    Generate = 16,
    /// A head answers with one token: `request::TokenHeader`, candidate records.
    Token = 17,
    /// A head has finished: `request::DoneHeader`.
    Done = 18,
    /// A head has failed: `request::FailedHeader`, a message.
    Failed = 19,
    /// The head of an encoder answers with its one vector: `request::VectorHeader`, floats. Sent by
    /// encoders alone, which are deployed where every member speaks `version::KNOWS_ENCODERS`.
    Vector = 20,
    /// Whose request comes next: `prefix::TenantHeader`. Sent only where every member of the cluster
    /// speaks `version::KNOWS_PREFIXES`.
    Tenant = 21,
    /// A head says how much of a prompt it did not have to compute: `prefix::ReusedHeader`. Only to who
    /// sent a `Tenant`.
    Reused = 22,
    /// A bounded postcard message (control, admin, join): no header, the message is the body.
    Message = 32,
}

impl FrameKind {
    /// Every kind.
    pub const ALL: &'static [FrameKind] = &[
        FrameKind::LinkHello,
        FrameKind::Open,
        FrameKind::Step,
        FrameKind::Close,
        FrameKind::Samples,
        FrameKind::Generate,
        FrameKind::Token,
        FrameKind::Done,
        FrameKind::Failed,
        FrameKind::Message,
        FrameKind::Trace,
        FrameKind::Partial,
        FrameKind::Vector,
        FrameKind::Near,
        FrameKind::Tenant,
        FrameKind::Reused,
    ];

    fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| *kind as u8 == byte)
    }
}

/// The first eight bytes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prelude {
    /// What the frame is.
    pub kind: FrameKind,
    /// Bytes of the header that follows.
    pub header_len: usize,
    /// Bytes of the body behind the header.
    pub body_len: usize,
}

impl Prelude {
    /// The eight bytes. Panics in debug builds where a length is over its bound: the sender made it.
    pub fn encode(&self) -> [u8; PRELUDE_LEN] {
        debug_assert!(self.header_len <= HEADER_LEN_MAX && self.body_len <= BODY_LEN_MAX);
        let len = (self.body_len as u32).to_le_bytes();
        [len[0], len[1], len[2], len[3], self.header_len as u8, self.kind as u8, FRAME_VERSION, 0]
    }

    /// Reads the eight bytes and checks each against its bound.
    pub fn decode(bytes: &[u8; PRELUDE_LEN]) -> Result<Self, FrameError> {
        let body_len = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize;
        let header_len = bytes[4] as usize;
        if bytes[6] != FRAME_VERSION {
            return Err(FrameError::Version { found: bytes[6] });
        }
        let kind =
            FrameKind::from_byte(bytes[5]).ok_or(FrameError::UnknownKind { found: bytes[5] })?;
        if bytes[7] != 0 {
            return Err(FrameError::Reserved { found: bytes[7] });
        }
        if header_len > HEADER_LEN_MAX {
            return Err(FrameError::TooLong {
                what: "header",
                len: header_len,
                max: HEADER_LEN_MAX,
            });
        }
        if body_len > BODY_LEN_MAX {
            return Err(FrameError::TooLong { what: "body", len: body_len, max: BODY_LEN_MAX });
        }
        Ok(Self { kind, header_len, body_len })
    }
}

/// Why bytes from a peer are no frame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The version byte is not ours.
    #[error("a frame of layout {found}; this build reads layout {FRAME_VERSION}")]
    Version {
        /// The byte.
        found: u8,
    },
    /// No frame has this kind.
    #[error("a frame of unknown kind {found}")]
    UnknownKind {
        /// The byte.
        found: u8,
    },
    /// A frame that does not belong here.
    #[error("a {found:?} frame where {expected} was expected")]
    UnexpectedKind {
        /// What came.
        found: FrameKind,
        /// What could have come.
        expected: &'static str,
    },
    /// The reserved byte is in use.
    #[error("the reserved byte of a frame is {found}, not 0")]
    Reserved {
        /// The byte.
        found: u8,
    },
    /// A length is over its bound.
    #[error("the {what} of a frame is {len} long; at most {max} is allowed here")]
    TooLong {
        /// Which part.
        what: &'static str,
        /// Its length.
        len: usize,
        /// The bound.
        max: usize,
    },
    /// A length is not the one that follows from the plan.
    #[error("the {what} of a frame is {len} bytes long; {expected} bytes follow from the plan")]
    WrongLength {
        /// Which part.
        what: &'static str,
        /// Its length.
        len: usize,
        /// What it should be.
        expected: usize,
    },
    /// The archive did not pass validation, or a field has a value that it may not have.
    #[error("the {what} of a frame is not valid: {why}")]
    Invalid {
        /// Which part.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
}

/// A flat rkyv archive of fixed size: a header or a record.
pub trait Flat: Sized {
    /// Its bytes on the wire.
    const LEN: usize;

    /// What it is called in errors.
    const NAME: &'static str;

    /// Writes exactly `LEN` bytes to the front of `out`.
    fn write_to(&self, out: &mut [u8]);

    /// Reads exactly `LEN` bytes, validated. `bytes` need not be aligned.
    fn read_from(bytes: &[u8]) -> Result<Self, FrameError>;

    /// Appends the `LEN` bytes.
    fn append_to(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.resize(start + Self::LEN, 0);
        self.write_to(&mut out[start..]);
    }

    /// Reads `count` records from the front of `bytes`; the rest is returned behind them.
    fn read_many(bytes: &[u8], count: usize) -> Result<(Vec<Self>, &[u8]), FrameError> {
        let len = count.checked_mul(Self::LEN).filter(|len| *len <= bytes.len()).ok_or(
            FrameError::WrongLength {
                what: Self::NAME,
                len: bytes.len(),
                expected: count.saturating_mul(Self::LEN),
            },
        )?;
        let (records, rest) = bytes.split_at(len);
        let records =
            records.chunks_exact(Self::LEN).map(Self::read_from).collect::<Result<_, _>>()?;
        Ok((records, rest))
    }
}

/// Defines a flat struct together with its `Flat` implementation.
macro_rules! flat {
    ($(#[$doc:meta])* pub struct $name:ident = $len:literal { $($(#[$field_doc:meta])* pub $field:ident: $type:ty,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Default, rkyv::Archive, rkyv::Serialize, rkyv::Deserialize)]
        #[rkyv(attr(allow(missing_docs)))]
        pub struct $name { $($(#[$field_doc])* pub $field: $type,)* }

        impl $crate::frame::Flat for $name {
            const LEN: usize = $len;
            const NAME: &'static str = stringify!($name);

            fn write_to(&self, out: &mut [u8]) {
                // A flat struct's archive is its fields and nothing else; the writer cannot run out
                // of a buffer of exactly that size.
                let buffer = rkyv::ser::writer::Buffer::from(&mut out[..$len]);
                rkyv::api::high::to_bytes_in::<_, rkyv::rancor::Error>(self, buffer)
                    .expect("a flat archive has a fixed size");
            }

            fn read_from(bytes: &[u8]) -> Result<Self, $crate::frame::FrameError> {
                let bytes: &[u8; $len] = bytes.try_into().map_err(|_| $crate::frame::FrameError::WrongLength {
                    what: stringify!($name),
                    len: bytes.len(),
                    expected: $len,
                })?;
                #[repr(C, align(16))]
                struct Aligned([u8; $len]);
                let aligned = Aligned(*bytes);
                let invalid = |error: rkyv::rancor::Error| $crate::frame::FrameError::Invalid {
                    what: stringify!($name),
                    why: error.to_string(),
                };
                rkyv::from_bytes::<Self, rkyv::rancor::Error>(&aligned.0).map_err(invalid)
            }
        }

        const _: () = assert!(size_of::<<$name as rkyv::Archive>::Archived>() == $len);
    };
}
pub(crate) use flat;

/// Appends token ids, little-endian.
pub fn append_tokens(tokens: &[u32], out: &mut Vec<u8>) {
    out.reserve(tokens.len() * 4);
    for token in tokens {
        out.extend_from_slice(&token.to_le_bytes());
    }
}

/// Reads `count` token ids from the front of `bytes`; the rest is returned behind them.
pub fn read_tokens(bytes: &[u8], count: usize) -> Result<(Vec<u32>, &[u8]), FrameError> {
    let len =
        count.checked_mul(4).filter(|len| *len <= bytes.len()).ok_or(FrameError::WrongLength {
            what: "tokens",
            len: bytes.len(),
            expected: count.saturating_mul(4),
        })?;
    let (tokens, rest) = bytes.split_at(len);
    let tokens = tokens.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
    Ok((tokens, rest))
}

/// Appends floats, little-endian.
pub fn append_floats(floats: &[f32], out: &mut Vec<u8>) {
    out.reserve(floats.len() * 4);
    for float in floats {
        out.extend_from_slice(&float.to_le_bytes());
    }
}

/// Reads `count` floats from the front of `bytes`; the rest is returned behind them.
pub fn read_floats(bytes: &[u8], count: usize) -> Result<(Vec<f32>, &[u8]), FrameError> {
    let (bits, rest) = read_tokens(bytes, count)?;
    Ok((bits.into_iter().map(f32::from_bits).collect(), rest))
}

/// Checks that nothing is left of a body.
pub fn expect_end(rest: &[u8], what: &'static str) -> Result<(), FrameError> {
    if rest.is_empty() {
        Ok(())
    } else {
        Err(FrameError::WrongLength { what, len: rest.len(), expected: 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prelude_survives_the_wire() {
        for kind in FrameKind::ALL {
            let prelude = Prelude { kind: *kind, header_len: 64, body_len: BODY_LEN_MAX };
            assert_eq!(Prelude::decode(&prelude.encode()), Ok(prelude));
        }
    }

    #[test]
    fn a_frame_begins_as_it_did_for_version_1() {
        let prelude = Prelude { kind: FrameKind::Message, header_len: 3, body_len: 0x0102 };
        assert_eq!(prelude.encode(), [2, 1, 0, 0, 3, 32, 1, 0]);
    }

    #[test]
    fn a_bad_prelude_is_refused_by_name() {
        let good = Prelude { kind: FrameKind::Step, header_len: 40, body_len: 100 }.encode();
        let with = |at: usize, byte: u8| {
            let mut bytes = good;
            bytes[at] = byte;
            Prelude::decode(&bytes)
        };
        assert!(matches!(with(3, 0xff), Err(FrameError::TooLong { what: "body", .. })));
        assert!(matches!(with(4, 65), Err(FrameError::TooLong { what: "header", .. })));
        assert!(matches!(with(5, 0), Err(FrameError::UnknownKind { found: 0 })));
        assert!(matches!(with(6, 9), Err(FrameError::Version { found: 9 })));
        assert!(matches!(with(7, 1), Err(FrameError::Reserved { found: 1 })));
    }
}
