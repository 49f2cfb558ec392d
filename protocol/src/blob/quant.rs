//! ○ Which GGUF model of a repository is meant: most repositories of such files hold one model in many
//! quantisations, some in folders of their own, large ones in parts.
//!
//! As users of llama.cpp expect it: a word such as `Q4_K_M` is looked for in the files' names, whatever its
//! case; without one [`USUAL`] are tried in turn, then the first file by name is taken. Unlike there, a word
//! that fits several models is refused: which of them comes first would be chance.

use std::collections::BTreeSet;
use std::path::Path;

use super::error::BlobError;
use super::name::is_gguf;
use crate::model::gguf::{all_parts, first_part};

/// What is taken where nobody says which.
const USUAL: [&str; 2] = ["Q4_K_M", "Q8_0"];

/// The most names that a refusal lists; repositories have some thirty.
const NAMES_MAX: usize = 40;

/// What is no model of its own, by its name: projectors of images, and what quantisers weigh by.
const OTHERS: [&str; 2] = ["mmproj", "imatrix"];

/// Of these files the first one of the model that is asked for: by a quantisation, by its file, or not at
/// all (empty). `what` says where they are, for words.
pub(super) fn choose<'a>(
    files: impl Iterator<Item = &'a str>,
    asked: &str,
    what: &str,
) -> Result<String, BlobError> {
    let files: BTreeSet<&str> = files.filter(|file| is_gguf(file)).collect();
    let models: BTreeSet<String> =
        files.iter().filter(|file| is_model(file)).filter_map(|file| first_of(file)).collect();
    let refused = |why: String, there: &mut dyn Iterator<Item = &String>| {
        let mut names: Vec<&str> = there.map(String::as_str).collect();
        let more = names.len().saturating_sub(NAMES_MAX);
        names.truncate(NAMES_MAX);
        let there = match (names.is_empty(), more) {
            (true, _) => "no GGUF model".to_owned(),
            (_, 0) => names.join(", "),
            _ => format!("{} and {more} more", names.join(", ")),
        };
        BlobError::WhichGguf { what: what.to_owned(), why, there }
    };
    if is_gguf(asked) {
        // Whichever of its parts is named.
        return match first_of(asked).filter(|first| files.contains(first.as_str())) {
            Some(first) => Ok(first),
            None => Err(refused(format!("has no file {asked}"), &mut models.iter())),
        };
    }
    let fit = |quant: &str| -> Vec<&String> {
        models.iter().filter(|model| fits(model, quant)).collect()
    };
    let words: &[&str] = if asked.is_empty() { &USUAL } else { &[asked] };
    for word in words {
        match fit(word)[..] {
            [] => {}
            [only] => return Ok(only.clone()),
            ref several => {
                let why = format!("has {} GGUF models that `{word}` fits", several.len());
                return Err(refused(why, &mut several.iter().copied()));
            }
        }
    }
    match models.first() {
        Some(first) if asked.is_empty() => Ok(first.clone()),
        _ => Err(refused(format!("has no GGUF model that `{asked}` fits"), &mut models.iter())),
    }
}

/// The files of the model that a file stands for.
pub(super) fn parts(file: &str) -> Vec<String> {
    let parts = all_parts(Path::new(file)).into_iter();
    parts.filter_map(|path| path.to_str().map(str::to_owned)).collect()
}

fn first_of(file: &str) -> Option<String> {
    first_part(Path::new(file)).to_str().map(str::to_owned)
}

fn is_model(file: &str) -> bool {
    let name = file.rsplit('/').next().unwrap_or(file).to_ascii_lowercase();
    !OTHERS.iter().any(|other| name.contains(other))
}

/// Whether a path has this word, whole: `Q4_K` is not in `model-Q4_K_M.gguf`.
fn fits(path: &str, quant: &str) -> bool {
    let (path, quant) = (path.to_ascii_lowercase(), quant.to_ascii_lowercase());
    let is_border = |c: char| matches!(c, '-' | '.' | '/');
    path.match_indices(&quant).any(|(at, _)| {
        let (before, behind) = (&path[..at], &path[at + quant.len()..]);
        (before.is_empty() || before.ends_with(is_border)) && behind.starts_with(is_border)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILES: [&str; 12] = [
        "README.md",
        "big-IQ1_S.gguf",
        "big-Q4_K_M.gguf",
        "big-UD-Q4_K_XL.gguf",
        "big-Q8_0.gguf",
        "big.q6_K.gguf",
        "BF16/big-BF16-00002-of-00002.gguf",
        "BF16/big-BF16-00001-of-00002.gguf",
        "Q5_K_M/big-Q5_K_M-00001-of-00003.gguf",
        "mmproj-BF16.gguf",
        "mmproj-Q8_0.gguf",
        "imatrix.gguf",
    ];

    fn chosen(files: &[&str], asked: &str) -> Result<String, String> {
        let files = files.iter().copied();
        choose(files, asked, "org/big-GGUF@main").map_err(|error| error.to_string())
    }

    #[test]
    fn a_quantisation_is_a_word_of_a_files_name_or_folder() {
        for (asked, file) in [
            ("", "big-Q4_K_M.gguf"),
            ("Q4_K_M", "big-Q4_K_M.gguf"),
            ("q8_0", "big-Q8_0.gguf"),
            ("Q6_K", "big.q6_K.gguf"),
            ("UD-Q4_K_XL", "big-UD-Q4_K_XL.gguf"),
            ("Q4_K_XL", "big-UD-Q4_K_XL.gguf"),
            ("bf16", "BF16/big-BF16-00001-of-00002.gguf"),
            ("Q5_K_M", "Q5_K_M/big-Q5_K_M-00001-of-00003.gguf"),
            ("BF16/big-BF16-00002-of-00002.gguf", "BF16/big-BF16-00001-of-00002.gguf"),
            ("big-IQ1_S.gguf", "big-IQ1_S.gguf"),
        ] {
            assert_eq!(chosen(&FILES, asked).as_deref(), Ok(file), "{asked:?}");
        }
    }

    #[test]
    fn where_nobody_says_which_it_is_the_usual_one_or_the_first() {
        for (files, file) in [
            (&["m-Q2_K.gguf", "m-Q8_0.gguf", "m-f16.gguf"][..], "m-Q8_0.gguf"),
            (&["m-f16.gguf", "m-Q2_K.gguf"][..], "m-Q2_K.gguf"),
            (&["whatever.gguf", "config.json"][..], "whatever.gguf"),
        ] {
            assert_eq!(chosen(files, "").as_deref(), Ok(file));
        }
    }

    #[test]
    fn what_is_not_there_or_is_there_twice_is_refused_with_what_there_is() {
        let two = ["a-Q4_K_M.gguf", "b-Q4_K_M.gguf", "b-Q8_0.gguf"];
        for (files, asked, words) in [
            (&FILES[..], "Q4_K", "no GGUF model that `Q4_K` fits; there is: BF16/big-BF16-00001"),
            (&FILES[..], "K_M", "no GGUF model that `K_M` fits"),
            (&FILES[..], "big.gguf", "no file big.gguf; there is: BF16"),
            (&two[..], "", "2 GGUF models that `Q4_K_M` fits; there is: a-Q4_K_M.gguf, b-Q4_K_M"),
            (&["config.json"][..], "", "there is: no GGUF model"),
        ] {
            let error = chosen(files, asked).unwrap_err();
            assert!(error.starts_with("org/big-GGUF@main has"), "{error}");
            assert!(error.contains(words), "`{words}` is not in `{error}`");
            assert!(error.contains("org/name/FILE.gguf"), "{error}");
            assert!(!error.contains("mmproj"), "{error}");
        }
        let many: Vec<String> = (0..50).map(|n| format!("m{n:02}-Q1.gguf")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let error = chosen(&many, "Q9").unwrap_err();
        assert!(error.contains("m39-Q1.gguf and 10 more"), "{error}");
    }
}
