//! ○ Takes typed values out of a JSON object; each refusal names the parameter.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};
use shoal_protocol::id::TokenId;

use super::refusal::Refusal;

/// The most bytes of a client's value that an error message repeats.
const ECHO_LEN_MAX: usize = 64;

/// A JSON object whose fields are taken one by one. `null` counts as absent.
pub struct Fields {
    map: Map<String, Value>,
    prefix: String,
}

impl Fields {
    /// The fields of a request's body.
    pub fn new(map: Map<String, Value>) -> Self {
        Self { map, prefix: String::new() }
    }

    /// The fields of an object within the body; `place` says where it stands.
    pub fn nested(place: &str, map: Map<String, Value>) -> Self {
        Self { map, prefix: format!("{place}.") }
    }

    /// The field's place, as errors name it.
    pub fn place(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Any value.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        self.map.remove(name).filter(|value| !value.is_null())
    }

    /// A text.
    pub fn text(&mut self, name: &str) -> Result<Option<String>, Refusal> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong_type(&self.place(name), "a text", &other)),
        }
    }

    /// `true` or `false`.
    pub fn boolean(&mut self, name: &str) -> Result<Option<bool>, Refusal> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(other) => Err(wrong_type(&self.place(name), "true or false", &other)),
        }
    }

    /// A number that passes `ok`; `expected` says which do.
    pub fn number(
        &mut self,
        name: &str,
        expected: &str,
        ok: impl Fn(f64) -> bool,
    ) -> Result<Option<f32>, Refusal> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let number = value.as_f64().ok_or_else(|| {
            wrong_type(&self.place(name), &format!("a number {expected}"), &value)
        })?;
        // The wire has f32: a value that only f64 holds (such as 1e-60) must stay in range there.
        if ok(number) && ok(f64::from(number as f32)) {
            return Ok(Some(number as f32));
        }
        Err(Refusal::OutOfRange {
            param: self.place(name),
            expected: expected.to_owned(),
            found: echo(&value),
        })
    }

    /// A whole number in `range`; `3.0` is one, too.
    pub fn integer(
        &mut self,
        name: &str,
        range: RangeInclusive<i64>,
    ) -> Result<Option<i64>, Refusal> {
        let Some(value) = self.take(name) else { return Ok(None) };
        if !value.is_number() {
            return Err(wrong_type(&self.place(name), "a whole number", &value));
        }
        let whole = value.as_i64().or_else(|| {
            let number = value.as_f64()?;
            // Beyond 2^53 a float no longer says which whole number was meant.
            (number.fract() == 0.0 && number.abs() <= 9e15).then_some(number as i64)
        });
        match whole.filter(|number| range.contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(Refusal::OutOfRange {
                param: self.place(name),
                expected: format!("a whole number from {} to {}", range.start(), range.end()),
                found: echo(&value),
            }),
        }
    }

    /// Refuses what nobody took.
    pub fn end(self) -> Result<(), Refusal> {
        match self.map.keys().next() {
            None => Ok(()),
            Some(name) => Err(Refusal::Unknown(format!("{}{name}", self.prefix))),
        }
    }
}

/// A list of token ids.
pub fn token_ids(place: &str, list: Vec<Value>) -> Result<Vec<TokenId>, Refusal> {
    let one = |(i, value): (usize, &Value)| {
        value.as_u64().and_then(|id| TokenId::try_from(id).ok()).ok_or_else(|| {
            wrong_type(&format!("{place}[{i}]"), "a token id (a whole number from 0)", value)
        })
    };
    list.iter().enumerate().map(one).collect()
}

/// The refusal of a value of the wrong type.
pub fn wrong_type(param: &str, expected: &str, found: &Value) -> Refusal {
    Refusal::WrongType {
        param: param.to_owned(),
        expected: expected.to_owned(),
        found: match found {
            Value::Number(_) | Value::Bool(_) => echo(found),
            other => kind(other).to_owned(),
        },
    }
}

/// What a value is, in words.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn echo(value: &Value) -> String {
    let mut text = value.to_string();
    if text.len() > ECHO_LEN_MAX {
        let cut = (0..=ECHO_LEN_MAX).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
        text.truncate(cut);
        text.push('…');
    }
    text
}
