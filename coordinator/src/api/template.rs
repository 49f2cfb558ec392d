//! ○ Chat templates: Jinja as transformers runs it.
//!
//! Blocks are trimmed and stripped on the left, Python's methods work on texts and maps, `tojson`
//! writes JSON as Python does (nothing escaped for HTML, keys in their order), `raise_exception`
//! refuses a conversation and `strftime_now` tells the date, which is an argument here.

use std::sync::Arc;

use minijinja::value::{Kwargs, Rest};
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior, Value, context};

use super::validate::Message;

/// The template's name in error messages.
const NAME: &str = "chat_template";

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    /// Whether the template has an opinion on the role `developer`.
    knows_developer: bool,
}

/// Why a conversation was not rendered.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The template itself refused the conversation.
    #[error("the model's chat template refuses this conversation: {0}")]
    Refused(String),
    /// The template cannot be compiled or run.
    #[error("the model's chat template does not work: {0}")]
    Broken(String),
}

/// What a template is given besides the messages.
#[derive(Clone, Debug, Default)]
pub struct TemplateContext {
    /// The token that begins a text.
    pub bos_token: Option<String>,
    /// The token that ends one.
    pub eos_token: Option<String>,
    /// Whether to open the assistant's turn.
    pub add_generation_prompt: bool,
    /// Now, in seconds since 1970, for `strftime_now`.
    pub now: u64,
}

/// What `raise_exception` was called with; the source of the error that it makes.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

impl ChatTemplate {
    /// Compiles `source`.
    pub fn new(source: String) -> Result<Self, TemplateError> {
        let knows_developer = source.contains("developer");
        let mut env = Environment::new();
        env.set_trim_blocks(true);
        env.set_lstrip_blocks(true);
        env.set_undefined_behavior(UndefinedBehavior::Lenient);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        env.add_filter("tojson", to_json);
        env.add_function("raise_exception", raise_exception);
        env.add_template_owned(NAME, source)
            .map_err(|error| TemplateError::Broken(words(&error)))?;
        Ok(Self { env, knows_developer })
    }

    /// The prompt for these messages.
    ///
    /// `developer` is OpenAI's newer word for `system`; a template that never heard of it sees the
    /// old one.
    pub fn render(
        &self,
        messages: &[Message],
        given: &TemplateContext,
    ) -> Result<String, TemplateError> {
        let mut messages = messages.to_vec();
        for message in &mut messages {
            if message.role == "developer" && !self.knows_developer {
                message.role = "system".to_owned();
            }
        }
        let now = given.now;
        let strftime_now = move |format: &str| super::strftime::format(format, now);
        let template =
            self.env.get_template(NAME).map_err(|error| TemplateError::Broken(words(&error)))?;
        let token = |token: &Option<String>| match token {
            // An absent token is undefined rather than none, so that it prints as nothing.
            None => Value::UNDEFINED,
            Some(token) => Value::from(token.as_str()),
        };
        template
            .render(context! {
                messages => Value::from_serialize(&messages),
                add_generation_prompt => given.add_generation_prompt,
                bos_token => token(&given.bos_token),
                eos_token => token(&given.eos_token),
                strftime_now => Value::from_function(strftime_now),
            })
            .map_err(|error| match raised(&error) {
                Some(message) => TemplateError::Refused(message),
                None => TemplateError::Broken(words(&error)),
            })
    }
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

fn raised(error: &Error) -> Option<String> {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = source {
        if let Some(Raised(message)) = error.downcast_ref() {
            return Some(message.clone());
        }
        source = error.source();
    }
    None
}

fn words(error: &Error) -> String {
    let line = error.line().map(|line| format!(" (line {line})")).unwrap_or_default();
    format!("{error}{line}")
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`.
fn to_json(value: &Value, args: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = match args.first() {
        Some(first) => Some(usize::try_from(first.clone())?),
        None => kwargs.get("indent")?,
    };
    // Known to transformers and without effect on what is written here.
    let _: Option<bool> = kwargs.get("ensure_ascii")?;
    kwargs.assert_all_used()?;
    let failed = |error| Error::new(ErrorKind::BadSerialization, "no JSON").with_source(error);
    let mut out = Vec::new();
    match indent {
        None => {
            let mut to = serde_json::Serializer::with_formatter(&mut out, PythonFormatter);
            serde::Serialize::serialize(value, &mut to).map_err(failed)?;
        }
        Some(width) => {
            let indent = " ".repeat(width.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            let mut to = serde_json::Serializer::with_formatter(&mut out, formatter);
            serde::Serialize::serialize(value, &mut to).map_err(failed)?;
        }
    }
    let text: Arc<str> = String::from_utf8_lossy(&out).into();
    Ok(Value::from(text))
}

/// Python's separators: `", "` and `": "`.
struct PythonFormatter;

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[derive(serde::Deserialize)]
    struct Case {
        template: String,
        bos_token: Option<String>,
        eos_token: Option<String>,
        messages: Vec<CaseMessage>,
        add_generation_prompt: bool,
        expected: Option<String>,
        expected_error: Option<String>,
    }

    #[derive(serde::Deserialize)]
    struct CaseMessage {
        role: String,
        content: String,
    }

    #[test]
    fn prompts_equal_those_of_transformers() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/chat");
        let mut cases = 0;
        for entry in std::fs::read_dir(&folder).expect("tests/fixtures/chat is there") {
            let path = entry.expect("a readable folder").path();
            let text = std::fs::read(&path).expect("a readable case");
            let case: Case = serde_json::from_slice(&text)
                .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            let messages: Vec<Message> = case
                .messages
                .into_iter()
                .map(|m| Message { role: m.role, content: m.content, name: None })
                .collect();
            let given = TemplateContext {
                bos_token: case.bos_token,
                eos_token: case.eos_token,
                add_generation_prompt: case.add_generation_prompt,
                now: 0,
            };
            let found = ChatTemplate::new(case.template).and_then(|t| t.render(&messages, &given));
            match (found, case.expected, case.expected_error) {
                (Ok(found), Some(expected), None) => {
                    assert_eq!(found, expected, "{}", path.display());
                }
                (Err(TemplateError::Refused(found)), None, Some(expected)) => {
                    assert_eq!(found, expected, "{}", path.display());
                }
                (found, ..) => panic!("{}: {found:?}", path.display()),
            }
            cases += 1;
        }
        assert!(cases >= 30, "only {cases} cases in {}", folder.display());
    }

    fn one(template: &str, role: &str) -> Result<String, TemplateError> {
        let message = Message { role: role.to_owned(), content: "<x>".to_owned(), name: None };
        let given = TemplateContext { now: 951_782_400, ..TemplateContext::default() };
        ChatTemplate::new(template.to_owned())?.render(&[message], &given)
    }

    #[test]
    fn what_templates_use_works() {
        for (template, expected) in [
            ("{{ strftime_now('%d %b %Y') }}", "29 Feb 2000"),
            ("{{ messages | tojson }}", r#"[{"role": "system", "content": "<x>"}]"#),
            ("{{ messages[0].role }}{# developer #}", "developer"),
            ("{{ messages[0].role }}", "system"),
            ("{{ bos_token }}|{{ messages[0]['content'] | trim }}", "|<x>"),
            (
                "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}",
                "01",
            ),
            ("{{ 'tools' if tools is defined and tools else 'none' }}", "none"),
            ("{{ {'a': 1.5, 'b': [true, none]} | tojson }}", r#"{"a": 1.5, "b": [true, null]}"#),
        ] {
            match one(template, "developer") {
                Ok(found) => assert_eq!(found, expected, "{template}"),
                Err(error) => panic!("{template}: {error}"),
            }
        }
    }

    #[test]
    fn refusals_and_faults_are_told_apart() {
        assert!(matches!(
            one("{{ raise_exception('no ' + messages[0].role) }}", "user"),
            Err(TemplateError::Refused(message)) if message == "no user"
        ));
        assert!(matches!(one("{{ nothing.at.all }}", "user"), Err(TemplateError::Broken(_))));
        assert!(matches!(one("{% if %}", "user"), Err(TemplateError::Broken(_))));
    }
}
