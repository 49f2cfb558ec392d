//! Who may use the public API: keys, of which only the hash of the secret is kept.
//!
//! A key that was taken back, or whose time is over, stays listed until room is needed. Once a key was
//! made there is always one listed, so nobody can open the API again by taking the last one back.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use shoal_protocol::access::{KeyLimits, KeyName, KeyStanding};

use super::command::{Advice, Effect, Noun, Refusal, Timestamp};

/// The most keys, those of the past included: each is under 200 bytes of a state that is sent and
/// copied whole, and each request is compared with all of them (a few microseconds).
pub const KEYS_MAX: usize = 1024;

/// The longest life of a key that has an end: what is meant to be for ever says so.
pub const EXPIRY_MAX: Duration = Duration::from_secs(3650 * 86_400);

/// The highest limit of a key: a number beyond it is a slip of the hand.
pub const LIMIT_MAX: u32 = 10_000_000;

/// BLAKE3 of a key's text. The text holds 32 random bytes and is never kept.
#[derive(Clone, Copy, Debug, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct KeyHash(pub [u8; 32]);

impl KeyHash {
    /// The hash of what a client showed.
    pub fn of(secret: &str) -> Self {
        Self(*blake3::hash(secret.as_bytes()).as_bytes())
    }
}

/// Takes the same time wherever the first difference is.
impl PartialEq for KeyHash {
    fn eq(&self, other: &Self) -> bool {
        blake3::Hash::from_bytes(self.0) == blake3::Hash::from_bytes(other.0)
    }
}

/// Changes of who may use the public API.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum KeyCommand {
    /// Make one.
    Create {
        /// What people call it.
        name: KeyName,
        /// The hash of its text.
        hash: KeyHash,
        /// What its user may do at most.
        limits: KeyLimits,
        /// How long it is good for; `None`: until it is revoked.
        expires: Option<Duration>,
    },
    /// Take one back.
    Revoke {
        /// Which.
        name: KeyName,
    },
}

/// All keys, oldest first.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Keys {
    all: Vec<ApiKey>,
}

/// One key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ApiKey {
    /// What people call it; no two good keys have the same.
    pub name: KeyName,
    /// The hash of its text.
    pub hash: KeyHash,
    /// What its user may do at most.
    pub limits: KeyLimits,
    /// When it was made.
    pub created: Timestamp,
    /// The last second at which it is good.
    pub expires: Option<Timestamp>,
    /// When it was taken back.
    pub revoked: Option<Timestamp>,
}

impl ApiKey {
    /// Whether it opens anything at this time.
    pub fn standing(&self, at: Timestamp) -> KeyStanding {
        match (self.revoked, self.expires) {
            (Some(_), _) => KeyStanding::Revoked,
            (None, Some(last)) if last < at => KeyStanding::Expired,
            (None, _) => KeyStanding::Good,
        }
    }

    fn is_good(&self, at: Timestamp) -> bool {
        self.standing(at) == KeyStanding::Good
    }
}

impl Keys {
    /// All of them, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &ApiKey> {
        self.all.iter()
    }

    /// Whether a key was ever made: from then on the API asks for one.
    pub fn ever(&self) -> bool {
        !self.all.is_empty()
    }

    /// Whether any key opens anything at this time.
    pub fn any_good(&self, at: Timestamp) -> bool {
        self.all.iter().any(|key| key.is_good(at))
    }

    /// The key with this hash, whatever its standing. Looks at every key, whichever matches.
    pub fn find(&self, hash: &KeyHash) -> Option<&ApiKey> {
        self.all.iter().fold(None, |found, key| if key.hash == *hash { Some(key) } else { found })
    }

    pub(super) fn create(
        &mut self,
        name: &KeyName,
        hash: KeyHash,
        limits: KeyLimits,
        expires: Option<Duration>,
        at: Timestamp,
    ) -> Result<Vec<Effect>, Refusal> {
        for limit in [limits.requests_per_minute, limits.concurrent].into_iter().flatten() {
            if limit == 0 || limit > LIMIT_MAX {
                return Err(Refusal::BadKeyLimit { limit });
            }
        }
        if expires.is_some_and(|life| life.as_secs() == 0 || life > EXPIRY_MAX) {
            return Err(Refusal::BadKeyExpiry);
        }
        if self.all.iter().any(|key| key.name == *name && key.is_good(at)) {
            return Err(Refusal::KeyNameTaken { name: name.clone() });
        }
        if self.all.iter().any(|key| key.hash == hash) {
            return Err(Refusal::KeyUsedBefore);
        }
        if self.all.len() >= KEYS_MAX {
            let past = self.all.iter().position(|key| !key.is_good(at));
            let advice = Advice::RevokeKey;
            let full = Refusal::TooMany { what: Noun::Keys, max: KEYS_MAX, advice };
            self.all.remove(past.ok_or(full)?);
        }
        self.all.push(ApiKey {
            name: name.clone(),
            hash,
            limits,
            created: at,
            expires: expires.map(|life| at + life),
            revoked: None,
        });
        Ok(vec![Effect::KeyCreated { name: name.clone() }])
    }

    pub(super) fn revoke(&mut self, name: &KeyName, at: Timestamp) -> Result<Vec<Effect>, Refusal> {
        // The newest of that name: older ones are of the past.
        let found = self.all.iter_mut().rev().find(|key| key.name == *name);
        match found {
            None => Err(Refusal::UnknownKey { name: name.clone() }),
            Some(ApiKey { revoked: Some(_), .. }) => {
                Err(Refusal::KeyRevokedBefore { name: name.clone() })
            }
            Some(key) => {
                key.revoked = Some(at);
                Ok(vec![Effect::KeyRevoked { name: name.clone() }])
            }
        }
    }
}

#[cfg(test)]
#[path = "keys_test.rs"]
mod tests;
