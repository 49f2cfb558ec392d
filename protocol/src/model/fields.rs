//! Reading the fields of a JSON object: bounded, and refused with field, value and expectation.

use serde_json::{Map, Value};

use crate::model::spec::SpecError;

/// The members of a JSON object; `null` counts as absent, as it does in transformers.
#[derive(Clone, Copy)]
pub(super) struct Fields<'a>(pub(super) &'a Map<String, Value>);

impl<'a> Fields<'a> {
    pub(super) fn get(self, field: &str) -> Option<&'a Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    /// A whole number from 1 to `max`; there is no default.
    pub(super) fn size(self, field: &'static str, max: u64) -> Result<u32, SpecError> {
        let expected = || format!("a whole number from 1 to {max}");
        let value =
            self.get(field).ok_or_else(|| SpecError::Missing { field, expected: expected() })?;
        match value.as_u64().filter(|n| (1..=max).contains(n)).map(u32::try_from) {
            Some(Ok(n)) => Ok(n),
            _ => Err(bad(field, value, expected())),
        }
    }

    /// A finite number from `min` to `max`; there is no default.
    pub(super) fn number(self, field: &'static str, min: f64, max: f64) -> Result<f32, SpecError> {
        let expected = || format!("a number from {min:?} to {max:?}");
        let value =
            self.get(field).ok_or_else(|| SpecError::Missing { field, expected: expected() })?;
        match value.as_f64().filter(|n| (min..=max).contains(n)) {
            Some(number) => Ok(number as f32),
            None => Err(bad(field, value, expected())),
        }
    }

    pub(super) fn flag(self, field: &'static str, default: bool) -> Result<bool, SpecError> {
        match self.get(field) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| bad(field, value, "true or false")),
        }
    }

    /// The same with what to use where the field is absent.
    pub(super) fn size_or(
        self,
        field: &'static str,
        max: u64,
        default: u32,
    ) -> Result<u32, SpecError> {
        if self.get(field).is_none() { Ok(default) } else { self.size(field, max) }
    }

    /// A whole number from 1 to `max`, if there is one.
    pub(super) fn maybe_size(
        self,
        field: &'static str,
        max: u64,
    ) -> Result<Option<u32>, SpecError> {
        self.get(field).map(|_| self.size(field, max)).transpose()
    }

    /// A finite number from `min` to `max`, if there is one.
    pub(super) fn maybe_number(
        self,
        field: &'static str,
        min: f64,
        max: f64,
    ) -> Result<Option<f32>, SpecError> {
        self.get(field).map(|_| self.number(field, min, max)).transpose()
    }

    /// Whether the field is there and says `null`, which some files mean otherwise than its absence.
    pub(super) fn is_null(self, field: &str) -> bool {
        self.0.get(field).is_some_and(Value::is_null)
    }

    /// A list of `len` entries, each read by `read`; `None` where there is no list.
    pub(super) fn list<T>(
        self,
        field: &'static str,
        len: usize,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>, SpecError> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let entries = value.as_array().filter(|entries| entries.len() == len);
        let read_all = || entries?.iter().map(read).collect::<Option<Vec<T>>>();
        match read_all() {
            Some(entries) => Ok(Some(entries)),
            None => Err(bad(field, value, format!("a list of {len}: {expected}"))),
        }
    }

    /// Refuses the field unless it is absent or has the one value that is implemented.
    pub(super) fn only(self, field: &'static str, supported: &Value) -> Result<(), SpecError> {
        match self.get(field) {
            Some(value) if value != supported => {
                Err(unsupported(field, short(value), short(supported)))
            }
            _ => Ok(()),
        }
    }
}

pub(super) fn bad(field: &'static str, value: &Value, expected: impl Into<String>) -> SpecError {
    SpecError::BadValue { field, value: short(value), expected: expected.into() }
}

/// A value as an error shows it: whole where it is small, else what kind of thing it is.
pub(super) fn short(value: &Value) -> String {
    const SHOWN_MAX: usize = 80;
    match value {
        Value::String(text) if text.len() <= SHOWN_MAX => format!("`{text}`"),
        Value::Object(_) => kind(value).to_owned(),
        other => {
            let text = other.to_string();
            if text.len() <= SHOWN_MAX { text } else { kind(other).to_owned() }
        }
    }
}

pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

pub(super) fn list<'a>(names: impl Iterator<Item = &'a str>) -> String {
    names.map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// What exists and is not implemented.
pub(super) fn unsupported(
    field: &'static str,
    value: impl Into<String>,
    supported: impl Into<String>,
) -> SpecError {
    SpecError::Unsupported { field, value: value.into(), supported: supported.into() }
}
