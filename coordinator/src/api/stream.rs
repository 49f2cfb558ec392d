//! ○ Token ids become text deltas: no delta ends within a character, and no delta holds any part of
//! a stop string.
//!
//! ```text
//! ids ─► window of the last ids, decoded whole ─► new characters ─► held back: what may begin a stop ─► delta
//! ```
//!
//! A token's text depends on its neighbours (bytes of one character, spaces that the first token
//! loses), so a small window is decoded again for each token and the difference taken.

use shoal_protocol::id::TokenId;

/// What a decoder puts where bytes are no UTF-8, or not yet.
const REPLACEMENT: char = '\u{fffd}';

/// How many tokens may wait for the rest of a character. A character has at most four bytes, so a
/// longer run is broken text that no further token can mend.
const HELD_TOKENS_MAX: usize = 32;

/// The model's side of detokenisation.
pub trait Decode {
    /// The text of these tokens, special tokens left out; broken characters as U+FFFD.
    fn decode(&self, ids: &[TokenId]) -> String;
}

/// The text of one answer as it grows.
#[derive(Debug)]
pub struct TextStream {
    stops: Vec<String>,
    /// The window: the ids of the last emitted piece, then those whose text is not emitted yet.
    ids: Vec<TokenId>,
    /// How many of `ids` are emitted.
    read: usize,
    /// Decoded, not given out: it may be the beginning of a stop string.
    held: String,
    /// Characters decoded so far, those held back included.
    chars: usize,
}

/// What one more token, or the end, gives.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Delta {
    /// New text; may be empty.
    pub text: String,
    /// The stop string that the answer ran into: the text ends before it, and nothing follows.
    pub stop: Option<usize>,
}

impl TextStream {
    /// An answer that ends at the first of these stop strings.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops, ids: Vec::new(), read: 0, held: String::new(), chars: 0 }
    }

    /// Characters decoded so far: where the next token's text begins.
    pub fn chars(&self) -> usize {
        self.chars
    }

    /// The stop string with this index.
    pub fn stop_text(&self, stop: usize) -> &str {
        self.stops.get(stop).map_or("", String::as_str)
    }

    /// One more token.
    pub fn push(&mut self, id: TokenId, decoder: &impl Decode) -> Delta {
        self.ids.push(id);
        let grown = self.grown(decoder);
        let waiting = self.ids.len() - self.read;
        let complete = !grown.is_empty() && !grown.ends_with(REPLACEMENT);
        // A token without text (a special one) keeps the window as it is, so that the next token
        // still sees its neighbour; a bound keeps a run of them from growing it for ever.
        if complete || waiting > HELD_TOKENS_MAX {
            self.ids.drain(..self.read);
            self.read = self.ids.len();
            self.scan(grown)
        } else {
            Delta::default()
        }
    }

    /// The end of the answer: everything that was held back, up to a stop string in it.
    pub fn finish(&mut self, decoder: &impl Decode) -> Delta {
        let rest = self.grown(decoder);
        self.ids.clear();
        self.read = 0;
        let mut delta = self.scan(rest);
        if delta.stop.is_none() {
            delta.text.push_str(&std::mem::take(&mut self.held));
        }
        delta
    }

    /// The text of the ids behind `read`.
    fn grown(&self, decoder: &impl Decode) -> String {
        let (emitted, waiting) = self.ids.split_at(self.read);
        if waiting.is_empty() {
            return String::new();
        }
        let all = decoder.decode(&self.ids);
        match all.strip_prefix(&decoder.decode(emitted)) {
            Some(new) => new.to_owned(),
            // A decoder with byte fallback gives up a whole run of bytes at a broken one, also the
            // characters that are out already. Then the new ids stand for themselves.
            None => decoder.decode(waiting),
        }
    }

    fn scan(&mut self, new: String) -> Delta {
        self.chars += new.chars().count();
        self.held.push_str(&new);
        let found = self.stops.iter().enumerate().filter_map(|(stop, text)| {
            // The earliest wins; of two that begin at the same place the one listed first.
            self.held.find(text.as_str()).map(|at| (at, stop))
        });
        if let Some((at, stop)) = found.min() {
            let mut text = std::mem::take(&mut self.held);
            text.truncate(at);
            return Delta { text, stop: Some(stop) };
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let held = self.held.split_off(self.held.len() - keep);
        Delta { text: std::mem::replace(&mut self.held, held), stop: None }
    }
}

/// The length of the longest end of `text` that is a beginning of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len().saturating_sub(1));
    (1..=longest)
        .rev()
        .find(|&len| {
            stop.is_char_boundary(len) && text.as_bytes().ends_with(&stop.as_bytes()[..len])
        })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each id is a byte.
    struct Bytes;

    impl Decode for Bytes {
        fn decode(&self, ids: &[TokenId]) -> String {
            let bytes: Vec<u8> = ids.iter().map(|id| *id as u8).collect();
            String::from_utf8_lossy(&bytes).into_owned()
        }
    }

    /// Each id is a piece of text.
    struct Pieces(&'static [&'static str]);

    impl Decode for Pieces {
        fn decode(&self, ids: &[TokenId]) -> String {
            ids.iter().map(|id| self.0[*id as usize]).collect()
        }
    }

    fn run(decoder: &impl Decode, ids: &[TokenId], stops: &[&str]) -> (Vec<String>, Option<usize>) {
        let mut stream = TextStream::new(stops.iter().map(|s| (*s).to_owned()).collect());
        let mut deltas = Vec::new();
        for id in ids {
            let delta = stream.push(*id, decoder);
            deltas.push(delta.text);
            if delta.stop.is_some() {
                return (deltas, delta.stop);
            }
        }
        let delta = stream.finish(decoder);
        deltas.push(delta.text);
        (deltas, delta.stop)
    }

    #[test]
    fn no_delta_ends_within_a_character() {
        for text in ["a", "é", "日本", "🐟x", "a🐟é\u{fffd}b"] {
            let ids: Vec<u32> = text.bytes().map(u32::from).collect();
            let (deltas, stop) = run(&Bytes, &ids, &[]);
            assert_eq!((deltas.concat().as_str(), stop), (text, None));
            // Nothing is given out before its last byte is there.
            let mut seen = 0;
            for (i, delta) in deltas.iter().enumerate() {
                seen += delta.len();
                assert!(seen <= i + 1, "{text}: {deltas:?}");
            }
        }
    }

    #[test]
    fn broken_characters_become_one_replacement_each_and_do_not_grow_the_window() {
        let (deltas, _) = run(&Bytes, &[0xe6, 0x97, u32::from(b'o'), u32::from(b'k')], &[]);
        assert_eq!(deltas, ["", "", "\u{fffd}o", "k", ""]);
        let (deltas, _) = run(&Bytes, &[u32::from(b'a'), 0xe6], &[]);
        assert_eq!(deltas, ["a", "", "\u{fffd}"]);
        let mut stream = TextStream::new(Vec::new());
        for _ in 0..1000 {
            stream.push(0xe6, &Bytes);
            assert!(stream.ids.len() <= 2 * HELD_TOKENS_MAX + 2);
        }
    }

    #[test]
    fn stops_are_found_across_tokens_and_never_shown() {
        const P: Pieces = Pieces(&["Hel", "lo wo", "rld", "\n", "END", "EN", "D!", "é", "日"]);
        let check = |ids: &[u32], stops: &[&str], deltas: &[&str], stop: Option<usize>| {
            let found = run(&P, ids, stops);
            let expected: Vec<String> = deltas.iter().map(|s| (*s).to_owned()).collect();
            assert_eq!(found, (expected, stop), "{ids:?} {stops:?}");
        };
        check(&[0, 1, 2], &[], &["Hel", "lo wo", "rld", ""], None);
        check(&[0, 1, 2], &["lo w"], &["He", "l"], Some(0));
        check(&[0, 1, 2], &["Hello"], &["", ""], Some(0));
        check(&[0, 1, 2], &["world"], &["Hel", "lo ", ""], Some(0));
        // Held back, then not a stop after all.
        check(&[0, 1, 2], &["worms"], &["Hel", "lo ", "world", ""], None);
        // Held back until the end.
        check(&[0, 1], &["world"], &["Hel", "lo ", "wo"], None);
        // Of several the earliest in the text.
        check(&[0, 1, 2], &["rld", "wor"], &["Hel", "lo ", ""], Some(1));
        check(&[0, 5, 6, 2], &["END"], &["Hel", "", ""], Some(0));
        check(&[0, 5, 5, 6], &["END"], &["Hel", "", "EN", ""], Some(0));
        check(&[7, 8, 8], &["日日"], &["é", "", ""], Some(0));
        check(&[3, 3], &["\n\n"], &["", ""], Some(0));
    }

    #[test]
    fn offsets_count_characters() {
        let mut stream = TextStream::new(vec!["zz".to_owned()]);
        let mut at = Vec::new();
        for id in "日a".bytes() {
            at.push(stream.chars());
            stream.push(u32::from(id), &Bytes);
        }
        at.push(stream.chars());
        assert_eq!(at, [0, 0, 0, 1, 2]);
    }
}
