//! Who may join: tokens, of which only the hash of the secret is kept.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use shoal_protocol::id::Role;

use super::command::{Advice, Effect, Noun, Refusal, Timestamp};

/// The most tokens that are alive at once: far more than a person makes, and a bound on the state.
pub const TOKENS_MAX: usize = 1024;

/// The most uses of one token: the largest cluster that one line is meant to fill.
pub const USES_MAX: u32 = 10_000;

/// The longest life of a token: one that is forgotten in a shell history must not open the cluster
/// for ever.
pub const EXPIRY_MAX: Duration = Duration::from_secs(30 * 86_400);

/// BLAKE3 of a token's secret. The secret itself is 32 random bytes and is never kept.
#[derive(Clone, Copy, Debug, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TokenHash(pub [u8; 32]);

impl TokenHash {
    /// The hash of a secret.
    pub fn of(secret: &[u8; 32]) -> Self {
        Self(*blake3::hash(secret).as_bytes())
    }
}

/// Takes the same time wherever the first difference is.
impl PartialEq for TokenHash {
    fn eq(&self, other: &Self) -> bool {
        blake3::Hash::from_bytes(self.0) == blake3::Hash::from_bytes(other.0)
    }
}

/// Changes of who may join. Spending a token is part of `NodeCommand::Join`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum TokenCommand {
    /// Make one.
    Create {
        /// The hash of its secret.
        hash: TokenHash,
        /// What its users will be.
        role: Role,
        /// How often it may be used.
        uses: u32,
        /// How long it is good for.
        expires: Duration,
    },
    /// Take one back.
    Revoke {
        /// The hash of its secret.
        hash: TokenHash,
    },
}

/// All tokens that can still be used, as far as was known when the state last changed.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Tokens {
    alive: Vec<Token>,
}

/// One token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Token {
    /// The hash of its secret.
    pub hash: TokenHash,
    /// What its users will be.
    pub role: Role,
    /// How often it may still be used; never 0.
    pub uses_left: u32,
    /// The last second at which it is good.
    pub expires: Timestamp,
}

impl Tokens {
    /// All of them, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &Token> {
        self.alive.iter()
    }

    /// Whether the token could be spent at this time. Looks at every token, whichever matches.
    pub fn is_good(&self, hash: &TokenHash, at: Timestamp) -> bool {
        self.alive.iter().filter(|token| token.hash == *hash && token.expires >= at).count() > 0
    }

    pub(super) fn create(
        &mut self,
        hash: TokenHash,
        role: Role,
        uses: u32,
        expires: Duration,
        at: Timestamp,
    ) -> Result<Vec<Effect>, Refusal> {
        if uses == 0 || uses > USES_MAX {
            return Err(Refusal::BadUses { uses });
        }
        if expires.as_secs() == 0 || expires > EXPIRY_MAX {
            return Err(Refusal::BadExpiry);
        }
        if self.alive.iter().filter(|token| token.expires >= at).count() >= TOKENS_MAX {
            return Err(Refusal::TooMany {
                what: Noun::Tokens,
                max: TOKENS_MAX,
                advice: Advice::WaitForExpiry,
            });
        }
        self.alive.retain(|token| token.expires >= at);
        self.alive.push(Token { hash, role, uses_left: uses, expires: at + expires });
        Ok(vec![Effect::TokenCreated { role }])
    }

    /// Forgets a token.
    pub(super) fn revoke(&mut self, hash: &TokenHash) -> Result<Vec<Effect>, Refusal> {
        let found = self.alive.iter().position(|token| token.hash == *hash);
        let token = self.alive.remove(found.ok_or(Refusal::BadToken)?);
        Ok(vec![Effect::TokenRevoked { role: token.role }])
    }

    /// Takes one use and says what its user becomes.
    pub(super) fn spend(&mut self, hash: &TokenHash, at: Timestamp) -> Result<Role, Refusal> {
        let found = self.alive.iter().position(|token| token.hash == *hash && token.expires >= at);
        let token = &mut self.alive[found.ok_or(Refusal::BadToken)?];
        let role = token.role;
        token.uses_left -= 1;
        self.alive.retain(|token| token.uses_left > 0);
        Ok(role)
    }
}
