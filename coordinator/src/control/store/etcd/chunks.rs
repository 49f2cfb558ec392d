//! ○ A snapshot in pieces that etcd takes, and what names them.

use serde::{Deserialize, Serialize};

/// One piece: a third of what etcd takes in one request.
pub const PART_LEN: usize = 512 << 10;

/// The most pieces: a state of 64 MiB, a thousand times that of a large cluster.
pub const PARTS_MAX: u32 = 128;

/// What `PREFIX/snapshot` says. As JSON, for those who look with `etcdctl`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The last command in it.
    pub index: u64,
    /// Where its pieces are.
    pub folder: String,
    /// How many there are.
    pub parts: u32,
    /// The length of all together.
    pub len: u64,
}

/// Pieces that are no snapshot.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// The state has outgrown this store.
    #[error("the state has {len} bytes, more than {PARTS_MAX} pieces of {PART_LEN} hold")]
    TooLong {
        /// Its length.
        len: usize,
    },
    /// The manifest makes no sense.
    #[error("its manifest cannot be read: {0}")]
    Manifest(String),
    /// A piece is missing.
    #[error("piece {part} of {parts} is missing")]
    Missing {
        /// Which.
        part: u32,
        /// Of how many.
        parts: u32,
    },
    /// They do not add up.
    #[error("its pieces have {found} bytes together, not {expected}")]
    Length {
        /// What is there.
        found: usize,
        /// What the manifest says.
        expected: u64,
    },
}

impl Manifest {
    /// The manifest of a state; `folder` is drawn by whoever writes it.
    pub fn of(index: u64, folder: String, bytes: &[u8]) -> Result<Self, ChunkError> {
        let too_long = ChunkError::TooLong { len: bytes.len() };
        let parts = u32::try_from(bytes.len().div_ceil(PART_LEN)).map_err(|_| too_long.clone())?;
        if parts > PARTS_MAX {
            return Err(too_long);
        }
        Ok(Self { index, folder, parts, len: bytes.len() as u64 })
    }

    /// As it stands in etcd.
    pub fn encode(&self) -> Result<Vec<u8>, ChunkError> {
        serde_json::to_vec(self).map_err(|error| ChunkError::Manifest(error.to_string()))
    }

    /// As it was found in etcd.
    pub fn decode(bytes: &[u8]) -> Result<Self, ChunkError> {
        let manifest: Self = serde_json::from_slice(bytes)
            .map_err(|error| ChunkError::Manifest(error.to_string()))?;
        match manifest.parts {
            1..=PARTS_MAX => Ok(manifest),
            parts => Err(ChunkError::Manifest(format!("it names {parts} pieces"))),
        }
    }

    /// The pieces put together again.
    pub fn join(&self, parts: &[Option<Vec<u8>>]) -> Result<Vec<u8>, ChunkError> {
        let mut bytes = Vec::new();
        for part in 0..self.parts {
            let piece = parts.get(part as usize).and_then(Option::as_ref);
            let missing = ChunkError::Missing { part: part + 1, parts: self.parts };
            bytes.extend_from_slice(piece.ok_or(missing)?);
        }
        match bytes.len() {
            found if found as u64 == self.len => Ok(bytes),
            found => Err(ChunkError::Length { found, expected: self.len }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_cut_is_put_together_and_what_is_missing_is_named() {
        for len in [1, PART_LEN - 1, PART_LEN, PART_LEN + 1, 3 * PART_LEN] {
            let bytes: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
            let manifest = Manifest::of(7, "f".into(), &bytes).unwrap();
            assert_eq!(manifest.parts as usize, len.div_ceil(PART_LEN));
            let found = Manifest::decode(&manifest.encode().unwrap()).unwrap();
            assert_eq!(found, manifest);
            let mut parts: Vec<_> = bytes.chunks(PART_LEN).map(|p| Some(p.to_vec())).collect();
            assert_eq!(manifest.join(&parts), Ok(bytes));
            let last = parts.len();
            parts[last - 1] = None;
            let error = ChunkError::Missing { part: last as u32, parts: last as u32 };
            assert_eq!(manifest.join(&parts), Err(error));
            parts[last - 1] = Some(Vec::new());
            assert!(matches!(manifest.join(&parts), Err(ChunkError::Length { .. })));
        }
        let huge = vec![0; PART_LEN * PARTS_MAX as usize + 1];
        assert!(Manifest::of(1, "f".into(), &huge).is_err());
        for bad in ["", "{}", r#"{"index":1,"folder":"f","parts":0,"len":0}"#] {
            assert!(matches!(Manifest::decode(bad.as_bytes()), Err(ChunkError::Manifest(_))));
        }
    }
}
