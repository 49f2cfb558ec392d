//! ○ The bytes of a single token, as log-probabilities report them.
//!
//! Decoding one token alone is not enough: a part of a character would come out as U+FFFD, and
//! decoders that drop the first space would drop it from each token.

use std::collections::HashMap;

use shoal_protocol::id::TokenId;
use tokenizers::Tokenizer;

/// How a vocabulary writes bytes.
#[derive(Debug)]
pub enum Pieces {
    /// GPT-2's way: each byte is one printable character; this is the way back.
    ByteLevel(HashMap<char, u8>),
    /// SentencePiece's way: `▁` for a space, `<0x0A>` for a byte.
    SentencePiece,
    /// Anything else: what decoding the token alone gives.
    Other,
}

impl Pieces {
    /// Looks at the tokenizer's decoder.
    pub fn of(tokenizer: &Tokenizer) -> Self {
        let decoder = serde_json::to_string(&tokenizer.get_decoder()).unwrap_or_default();
        let has = |kind: &str| decoder.contains(&format!("\"type\":\"{kind}\""));
        if has("ByteLevel") {
            Self::ByteLevel(byte_characters())
        } else if has("ByteFallback") || has("Metaspace") {
            Self::SentencePiece
        } else {
            Self::Other
        }
    }

    /// The bytes of `id`; none where the vocabulary has no such token.
    pub fn bytes(&self, tokenizer: &Tokenizer, id: TokenId) -> Vec<u8> {
        let Some(piece) = tokenizer.id_to_token(id) else { return Vec::new() };
        // Added tokens stand as they are, whatever the vocabulary's way.
        if tokenizer.get_added_vocabulary().is_special_token(&piece) {
            return piece.into_bytes();
        }
        match self {
            Self::ByteLevel(table) => piece
                .chars()
                .map(|c| table.get(&c).copied())
                .collect::<Option<Vec<u8>>>()
                .unwrap_or_else(|| piece.into_bytes()),
            Self::SentencePiece => match byte_piece(&piece) {
                Some(byte) => vec![byte],
                None => piece.replace('▁', " ").into_bytes(),
            },
            Self::Other => tokenizer.decode(&[id], false).unwrap_or_default().into_bytes(),
        }
    }
}

/// `<0x0A>` is byte 10.
fn byte_piece(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

/// GPT-2's table: printable Latin-1 bytes are themselves, the rest are moved up behind U+00FF in
/// order.
fn byte_characters() -> HashMap<char, u8> {
    let mut moved = 0;
    let character = |byte: u8| match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        _ => {
            moved += 1;
            // 68 bytes are moved: U+0100 to U+0143, all of them characters.
            char::from_u32(0xff + moved).unwrap_or(char::REPLACEMENT_CHARACTER)
        }
    };
    let characters: Vec<char> = (0..=255).map(character).collect();
    characters.into_iter().zip(0..=255).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_table_is_gpt2s() {
        let table = byte_characters();
        assert_eq!(table.len(), 256);
        for (character, byte) in [('Ġ', b' '), ('Ċ', b'\n'), ('A', b'A'), ('é', 0xe9), ('Ń', 0xad)]
        {
            assert_eq!(table.get(&character), Some(&byte), "{character}");
        }
    }

    #[test]
    fn byte_pieces_are_exactly_that() {
        assert_eq!(byte_piece("<0x0A>"), Some(10));
        for piece in ["<0x0>", "<0xZZ>", "0x0A", "<0x0A", "<0x+A>", "<0x00A>"] {
            assert_eq!(byte_piece(piece), None, "{piece}");
        }
    }
}
