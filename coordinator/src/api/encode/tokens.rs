//! ○ Texts and pairs of texts to an encoder's tokens, cut where that is asked for, and checked against
//! the model.

use std::sync::Arc;

use shoal_protocol::id::TokenId;
use shoal_protocol::request::SECOND_TEXT;
use tokenizers::{PostProcessor, TruncationParams};

use super::ask::Cut;
use crate::api::prepare::ModelFacts;
use crate::api::refusal::Refusal;
use crate::api::tokenize::ModelText;
use crate::api::validate::Prompt;

/// What one input is made of.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// A text, or tokens as they are.
    One(&'a Prompt),
    /// A query and a document.
    Pair(&'a str, &'a str),
}

/// How inputs are read.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    /// Where they stand in the body.
    pub param: &'static str,
    /// What to do with a long one.
    pub cut: Cut,
    /// Whether the tokenizer adds its own tokens.
    pub add_special_tokens: bool,
}

/// The tokens of one input, of which `index` is the place; those of a second text are marked.
pub fn read(
    source: Source<'_>,
    index: usize,
    model: &ModelFacts,
    reading: Reading,
) -> Result<Arc<[TokenId]>, Refusal> {
    let (param, max) = (reading.param, model.context_max as usize);
    let keep = match reading.cut {
        Cut::Never => None,
        Cut::ToModel => Some(max),
        Cut::To(tokens) => Some(max.min(tokens as usize)),
    };
    let text = || {
        let advice = "send lists of token ids";
        model.text.as_deref().ok_or(Refusal::NoText { param, advice })
    };
    let special = reading.add_special_tokens;
    let tokens = match source {
        Source::One(Prompt::Tokens(ids)) => {
            ids[..ids.len().min(keep.unwrap_or(usize::MAX))].to_vec()
        }
        Source::One(Prompt::Text(one)) => encode(text()?, (one, None), special, keep)
            .map_err(|why| Refusal::NotEncoded { param, why })?,
        Source::Pair(query, document) => encode(text()?, (query, Some(document)), special, keep)
            .map_err(|why| Refusal::NotEncoded { param, why })?,
    };
    if tokens.is_empty() {
        return Err(Refusal::EmptyPrompt { param });
    }
    // A mark is ours to make: in a client's ids it is a part of the number.
    let own = !matches!(source, Source::One(Prompt::Tokens(_)));
    let plain = |id: &TokenId| if own { id & !SECOND_TEXT } else { *id };
    if let Some(id) = tokens.iter().map(plain).find(|id| *id >= model.vocab) {
        return Err(Refusal::NotInVocabulary { param, id, vocab: model.vocab });
    }
    if tokens.len() > max {
        return Err(Refusal::InputTooLong { param, index, tokens: tokens.len(), max });
    }
    Ok(tokens.into())
}

/// The tokens of one or two texts, the tokenizer's own among what is kept.
fn encode(
    model: &ModelText,
    (first, second): (&str, Option<&str>),
    special: bool,
    keep: Option<usize>,
) -> Result<Vec<TokenId>, String> {
    let tokenizer = model.tokenizer();
    let bare = |text: &str| {
        let encoded = tokenizer.encode(text, false);
        encoded.map_err(|error| format!("the tokenizer refuses the input: {error}"))
    };
    let failed =
        |error: tokenizers::Error| format!("the tokenizer cannot put it together: {error}");
    let (mut first, mut second) = (bare(first)?, second.map(bare).transpose()?);
    if let Some(keep) = keep {
        let own =
            tokenizer.get_post_processor().map_or(0, |own| own.added_tokens(second.is_some()));
        let own = if special { own } else { 0 };
        if keep <= own {
            return Err(format!(
                "it is to be cut to {keep} tokens, of which the tokenizer's own are {own}; ask for more"
            ));
        }
        let params = TruncationParams { max_length: keep - own, ..TruncationParams::default() };
        (first, second) = tokenizers::utils::truncation::truncate_encodings(first, second, &params)
            .map_err(failed)?;
    }
    let whole = tokenizer.post_process(first, second, special).map_err(failed)?;
    let marked = |(id, kind): (&u32, &u32)| if *kind == 0 { *id } else { *id | SECOND_TEXT };
    Ok(whole.get_ids().iter().zip(whole.get_type_ids()).map(marked).collect())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn model() -> ModelFacts {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/encoders/bert");
        let text = ModelText::load(&folder).expect("the fixture's text side");
        ModelFacts { vocab: 120, context_max: 12, text: Some(Arc::new(text)) }
    }

    fn tokens(source: Source<'_>, cut: Cut) -> Result<Vec<TokenId>, Refusal> {
        let reading = Reading { param: "input", cut, add_special_tokens: true };
        read(source, 3, &model(), reading).map(|tokens| tokens.to_vec())
    }

    #[test]
    fn a_long_input_is_refused_with_the_numbers_or_cut_with_its_ends_kept() {
        let long = Prompt::Text("the fish swims in the big sea and the fish is big".to_owned());
        let error = tokens(Source::One(&long), Cut::Never).expect_err("too long");
        assert!(error.to_string().contains("input 3 has 14 tokens"), "{error}");
        let cut = tokens(Source::One(&long), Cut::ToModel).expect("it is cut");
        assert_eq!(cut.len(), 12);
        let short = Prompt::Text("the fish".to_owned());
        let short = tokens(Source::One(&short), Cut::Never).expect("it fits");
        assert_eq!(
            (cut[0], cut[11]),
            (short[0], short[3]),
            "the first and the last are the model's"
        );
        let five = tokens(Source::One(&long), Cut::To(5)).expect("it is cut");
        assert_eq!((five.len(), five[4]), (5, short[3]));
        let error =
            tokens(Source::One(&long), Cut::To(2)).expect_err("nothing of the text is left");
        assert!(error.to_string().contains("cut to 2 tokens"), "{error}");
        assert_eq!(tokens(Source::One(&Prompt::Tokens(vec![7; 20])), Cut::To(4)), Ok(vec![7; 4]));
    }

    #[test]
    fn the_second_text_of_a_pair_is_marked() {
        let pair = tokens(Source::Pair("the fish", "the sea"), Cut::Never).expect("it fits");
        let marks: Vec<bool> = pair.iter().map(|id| id & SECOND_TEXT != 0).collect();
        assert_eq!(marks, [false, false, false, false, true, true, true]);
    }

    #[test]
    fn tokens_that_the_model_does_not_have_are_refused() {
        let error =
            tokens(Source::One(&Prompt::Tokens(vec![120])), Cut::Never).expect_err("a refusal");
        assert!(error.to_string().contains("120"), "{error}");
        let marked = Prompt::Tokens(vec![SECOND_TEXT | 5]);
        assert!(tokens(Source::One(&marked), Cut::Never).is_err());
    }
}
