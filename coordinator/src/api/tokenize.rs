//! ● The text side of a model: its tokenizer, its chat template, its defaults. Loaded from the
//! model's folder on first use and kept.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;
use shoal_protocol::id::TokenId;
use shoal_protocol::model::gguf::{Gguf, gguf_of};
use tokenizers::Tokenizer;
use tokio::sync::{OnceCell, Semaphore};

use super::generation::{self, Defaults};
use super::gguf_text;
use super::pieces::Pieces;
use super::stream::Decode;
use super::template::{ChatTemplate, TemplateContext, TemplateError};
use super::validate::Message;

/// The largest companion file (everything but tokenizer.json) that is read: real ones have at most
/// a few hundred KiB.
const COMPANION_LEN_MAX: u64 = 16 << 20;

const TOKENIZER: &str = "tokenizer.json";

/// The text side of one model.
#[derive(Debug)]
pub struct ModelText {
    tokenizer: Tokenizer,
    pieces: Pieces,
    template: Option<ChatTemplate>,
    bos_token: Option<String>,
    eos_token: Option<String>,
    /// What holds where a client says nothing.
    pub defaults: Defaults,
    /// The tokens that end an answer, unless the client ignores them.
    pub end_tokens: Vec<TokenId>,
}

/// Why a model's text side cannot be loaded.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LoadError {
    /// A file that cannot be read.
    #[error("{}: {why}", file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// What happened.
        why: String,
    },
    /// A file that is not what it should be.
    #[error("{}: {why}", file.display())]
    Bad {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

/// Why a prompt has no tokens.
#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    /// The model has no chat template.
    #[error(
        "this model has no chat template (neither chat_template.jinja nor one in \
         tokenizer_config.json, nor, in a GGUF file, tokenizer.chat_template); send a finished prompt to /v1/completions"
    )]
    NoTemplate,
    /// The template refused, or does not work.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The tokenizer refused.
    #[error("the tokenizer refuses the prompt: {0}")]
    Tokenizer(String),
}

impl ModelText {
    /// Reads tokenizer.json (which must be there) and its companions (which need not be), or a GGUF file
    /// without a tokenizer.json beside it.
    pub fn load(path: &Path) -> Result<Self, LoadError> {
        let gguf = gguf_of(path)
            .map_err(|error| LoadError::Bad { file: path.to_owned(), why: error.to_string() })?;
        let Some(file) = gguf else { return Self::load_folder(path) };
        match file.parent() {
            Some(folder) if folder.join(TOKENIZER).exists() => Self::load_folder(folder),
            _ => Self::load_gguf(&file),
        }
    }

    fn load_folder(folder: &Path) -> Result<Self, LoadError> {
        let file = folder.join(TOKENIZER);
        let read = |error: std::io::Error| LoadError::Read {
            file: file.clone(),
            why: format!("{error}; a model that takes text needs its tokenizer.json"),
        };
        let tokenizer = parse(&file, &std::fs::read(&file).map_err(read)?)?;
        let tokenizer_config = companion(folder, "tokenizer_config.json")?;
        let special_tokens = companion(folder, "special_tokens_map.json")?;
        let special = |name: &str| {
            generation::special_token(&tokenizer_config, name)
                .or_else(|| generation::special_token(&special_tokens, name))
        };
        let mut generation_config = companion(folder, "generation_config.json")?;
        if generation::end_tokens(&generation_config).is_empty()
            && let Some(end) = companion(folder, "config.json")?.get("eos_token_id")
        {
            match &mut generation_config {
                Value::Object(config) => drop(config.insert("eos_token_id".into(), end.clone())),
                none => *none = serde_json::json!({ "eos_token_id": end }),
            }
        }
        let template = template(folder, &tokenizer_config)?;
        let names = (special("bos_token"), special("eos_token"));
        Ok(Self::of(tokenizer, template, names, &generation_config))
    }

    fn load_gguf(file: &Path) -> Result<Self, LoadError> {
        let bad = |why: String| LoadError::Bad { file: file.to_owned(), why };
        let header = Gguf::read(file).map_err(|error| bad(error.to_string()))?;
        let texts = gguf_text::text_files(&header.values).map_err(bad)?;
        let template = generation::chat_template(&texts.tokenizer_config);
        let template = template.map(ChatTemplate::new).transpose();
        let template = template.map_err(|error| bad(format!("its chat template: {error}")))?;
        let special = |name: &str| generation::special_token(&texts.tokenizer_config, name);
        let names = (special("bos_token"), special("eos_token"));
        let tokenizer = parse(file, texts.tokenizer.to_string().as_bytes())?;
        Ok(Self::of(tokenizer, template, names, &texts.generation_config))
    }

    /// Out of a tokenizer and what is said beside it.
    fn of(
        tokenizer: Tokenizer,
        template: Option<ChatTemplate>,
        (bos_token, eos_token): (Option<String>, Option<String>),
        generation_config: &Value,
    ) -> Self {
        let mut end_tokens = generation::end_tokens(generation_config);
        end_tokens.extend(eos_token.as_ref().and_then(|token| tokenizer.token_to_id(token)));
        end_tokens.sort_unstable();
        end_tokens.dedup();
        Self {
            pieces: Pieces::of(&tokenizer),
            template,
            bos_token,
            eos_token,
            defaults: Defaults::read(generation_config),
            end_tokens,
            tokenizer,
        }
    }

    /// The tokenizer itself, for those who put texts together in other ways.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The tokens of a text prompt.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<TokenId>, EncodeError> {
        let encoding = self
            .tokenizer
            .encode_fast(text, add_special)
            .map_err(|error| EncodeError::Tokenizer(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The tokens of a conversation. `now` is in seconds since 1970: templates may tell the date.
    pub fn encode_chat(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        add_special: bool,
        now: u64,
    ) -> Result<Vec<TokenId>, EncodeError> {
        let template = self.template.as_ref().ok_or(EncodeError::NoTemplate)?;
        let given = TemplateContext {
            bos_token: self.bos_token.clone(),
            eos_token: self.eos_token.clone(),
            add_generation_prompt,
            now,
        };
        self.encode(&template.render(messages, &given)?, add_special)
    }

    /// The bytes of one token on its own: those of its characters that it holds.
    pub fn token_bytes(&self, id: TokenId) -> Vec<u8> {
        self.pieces.bytes(&self.tokenizer, id)
    }
}

impl Decode for ModelText {
    fn decode(&self, ids: &[TokenId]) -> String {
        // Ids without text (a padded vocabulary has some) are left out; decoders do not fail on
        // tokens of their own vocabulary.
        self.tokenizer.decode(ids, true).unwrap_or_default()
    }
}

/// A tokenizer.json, wherever it comes from.
fn parse(file: &Path, text: &[u8]) -> Result<Tokenizer, LoadError> {
    let bad = |why: String| LoadError::Bad { file: file.to_owned(), why };
    let mut tokenizer = Tokenizer::from_bytes(text).map_err(|error| bad(error.to_string()))?;
    // Both are for training batches; a prompt is never cut or filled up.
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|error| bad(error.to_string()))?;
    Ok(tokenizer)
}

/// A JSON file that may be absent: `null` then.
fn companion(folder: &Path, name: &str) -> Result<Value, LoadError> {
    let Some(text) = optional(folder, name)? else { return Ok(Value::Null) };
    serde_json::from_slice(&text)
        .map_err(|error| LoadError::Bad { file: folder.join(name), why: error.to_string() })
}

fn optional(folder: &Path, name: &str) -> Result<Option<Vec<u8>>, LoadError> {
    let file = folder.join(name);
    match std::fs::metadata(&file) {
        Ok(facts) if facts.len() > COMPANION_LEN_MAX => {
            let why = format!("it has {} bytes; at most {COMPANION_LEN_MAX} are read", facts.len());
            return Err(LoadError::Bad { file, why });
        }
        _ => {}
    }
    match std::fs::read(&file) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(LoadError::Read { file, why: error.to_string() }),
    }
}

fn template(folder: &Path, config: &Value) -> Result<Option<ChatTemplate>, LoadError> {
    const FILE: &str = "chat_template.jinja";
    let (file, source) = match optional(folder, FILE)? {
        Some(text) => {
            let source = String::from_utf8(text).map_err(|error| LoadError::Bad {
                file: folder.join(FILE),
                why: error.to_string(),
            })?;
            (FILE, Some(source))
        }
        None => ("tokenizer_config.json", generation::chat_template(config)),
    };
    source
        .map(ChatTemplate::new)
        .transpose()
        .map_err(|error| LoadError::Bad { file: folder.join(file), why: error.to_string() })
}

/// Whose text side: the folder, and when it was deployed. Whoever deploys a folder again has perhaps
/// changed what is in it.
pub type TextKey = (PathBuf, u64);

/// The text sides in use.
#[derive(Debug)]
pub struct ModelTexts {
    /// Held for a look-up, never across an await.
    loaded: Mutex<HashMap<TextKey, Arc<OnceCell<Arc<ModelText>>>>>,
    /// Tokenising is pure compute: more at once than there are cores only costs memory.
    compute: Arc<Semaphore>,
}

impl ModelTexts {
    /// Nothing is loaded yet. At most `parallel` prompts are tokenised at a time.
    pub fn new(parallel: usize) -> Self {
        Self { loaded: Mutex::default(), compute: Arc::new(Semaphore::new(parallel.max(1))) }
    }

    /// The text side of the model in `key`'s folder; loads it once, however many ask. A failure is
    /// not kept: the next request tries again. Those that `in_use` refuses are forgotten.
    pub async fn get(
        &self,
        key: &TextKey,
        in_use: impl Fn(&TextKey) -> bool,
    ) -> Result<Arc<ModelText>, LoadError> {
        let cell = {
            let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
            if !loaded.contains_key(key) {
                loaded.retain(|known, _| in_use(known));
            }
            loaded.entry(key.clone()).or_default().clone()
        };
        let load = || {
            let folder = key.0.clone();
            async move {
                let file = folder.clone();
                tokio::task::spawn_blocking(move || ModelText::load(&folder).map(Arc::new))
                    .await
                    .unwrap_or_else(|gone| Err(LoadError::Bad { file, why: gone.to_string() }))
            }
        };
        cell.get_or_try_init(load).await.cloned()
    }

    /// Runs `work` on a blocking thread, when one of the places for computing is free.
    pub async fn compute<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Gone> {
        let place = Arc::clone(&self.compute).acquire_owned().await.map_err(|_| Gone)?;
        // The place goes along: a caller that gives up does not make room while its work goes on.
        let work = move || {
            let _place = place;
            work()
        };
        tokio::task::spawn_blocking(work).await.map_err(|_| Gone)
    }
}

/// The work panicked, or the runtime is ending.
#[derive(Debug, thiserror::Error)]
#[error("the tokenizer's thread ended without an answer")]
pub struct Gone;

#[cfg(test)]
#[path = "tokenize_test.rs"]
mod tests;
