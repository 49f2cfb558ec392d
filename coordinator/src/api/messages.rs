//! ○ The turns of a conversation: text alone; everything else is refused by name.

use serde_json::Value;

use super::fields::{Fields, wrong_type};
use super::refusal::Refusal;
use super::validate::Message;

/// The roles that can be served.
const ROLES: [&str; 4] = ["system", "developer", "user", "assistant"];

/// Roles that OpenAI knows and that come later.
const ROLES_LATER: [&str; 2] = ["tool", "function"];

/// Fields of a turn that come with features that are not served yet. Clients send answers back as
/// they got them, so that their empty values must be taken.
const FIELDS_LATER: [&str; 8] = [
    "tool_calls",
    "tool_call_id",
    "function_call",
    "refusal",
    "audio",
    "annotations",
    "reasoning",
    "reasoning_content",
];

/// Takes `messages`.
pub fn read(fields: &mut Fields) -> Result<Vec<Message>, Refusal> {
    let list = match fields.take("messages") {
        None => return Err(Refusal::Missing("messages")),
        Some(Value::Array(list)) if !list.is_empty() => list,
        Some(Value::Array(_)) => {
            return Err(Refusal::OutOfRange {
                param: "messages".to_owned(),
                expected: "a list with at least one message".to_owned(),
                found: "empty".to_owned(),
            });
        }
        Some(other) => return Err(wrong_type("messages", "a list of messages", &other)),
    };
    list.into_iter().enumerate().map(|(i, value)| message(i, value)).collect()
}

fn message(i: usize, value: Value) -> Result<Message, Refusal> {
    let place = format!("messages[{i}]");
    let Value::Object(map) = value else {
        return Err(wrong_type(&place, "an object with `role` and `content`", &value));
    };
    let mut fields = Fields::nested(&place, map);
    let role = fields.text("role")?;
    let role = match role {
        Some(role) if ROLES.contains(&role.as_str()) => role,
        Some(role) if ROLES_LATER.contains(&role.as_str()) => {
            return Err(Refusal::Unsupported {
                param: format!("{place}.role: {role}"),
                neutral: "system, developer, user or assistant",
            });
        }
        found => {
            return Err(Refusal::OutOfRange {
                param: format!("{place}.role"),
                expected: "system, developer, user or assistant".to_owned(),
                found: found.map_or("missing".to_owned(), |role| format!("{role:.32?}")),
            });
        }
    };
    for name in FIELDS_LATER {
        let empty = |value: &Value| {
            value.as_array().is_some_and(Vec::is_empty) || value.as_str().is_some_and(str::is_empty)
        };
        if fields.take(name).is_some_and(|value| !empty(&value)) {
            return Err(Refusal::Unsupported { param: fields.place(name), neutral: "null" });
        }
    }
    let content = match fields.take("content") {
        Some(Value::String(text)) => text,
        Some(Value::Array(parts)) => {
            let place = fields.place("content");
            let texts = parts.into_iter().enumerate().map(|(i, part)| text_part(&place, i, part));
            texts.collect::<Result<Vec<_>, _>>()?.join("\n")
        }
        None => {
            return Err(Refusal::WrongType {
                param: fields.place("content"),
                expected: "a text or a list of text parts".to_owned(),
                found: "missing".to_owned(),
            });
        }
        Some(other) => {
            return Err(wrong_type(
                &fields.place("content"),
                "a text or a list of text parts",
                &other,
            ));
        }
    };
    let name = fields.text("name")?;
    fields.end()?;
    Ok(Message { role, content, name })
}

fn text_part(place: &str, i: usize, part: Value) -> Result<String, Refusal> {
    let place = format!("{place}[{i}]");
    let Value::Object(map) = part else {
        return Err(wrong_type(&place, "an object with `type` and `text`", &part));
    };
    let mut fields = Fields::nested(&place, map);
    let kind = fields.text("type")?;
    if kind.as_deref() != Some("text") {
        return Err(Refusal::Unsupported {
            param: format!("{place}.type: {:.32}", kind.as_deref().unwrap_or("missing")),
            neutral: "\"text\"",
        });
    }
    let text = fields.text("text")?.ok_or(Refusal::WrongType {
        param: fields.place("text"),
        expected: "a text".to_owned(),
        found: "missing".to_owned(),
    })?;
    fields.end()?;
    Ok(text)
}
