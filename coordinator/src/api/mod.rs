//! ● The request plane: HTTP in OpenAI's words.

mod fields;
mod generation;
mod messages;
mod pieces;
pub mod stream;
mod strftime;
mod surface;
mod template;
pub mod tokenize;
pub mod validate;
