//! Weights that travel once: a model's files on this machine, brought here in verified chunks from the
//! nearest source that has them.
//!
//! ```text
//!            ┌─► disk: chunks on record, hashed before a process uses them first
//! ModelCache ┼─► another worker (`shoal-blob`): only chunks whose hash somebody else has said
//!            └─► origin: the Hugging Face hub, an object store; ranges of only what is needed
//!                                       │
//!                 folder of sparse files ◄┘─► `Checkpoint::open`, `pread`: as any other folder
//! ```
//!
//! A model of an origin lies in a folder of the Hugging Face layout. Its small files are whole; its
//! weights are sparse files of full length in which only headers and fetched chunks are backed by the
//! disk. So whoever reads a folder reads this one too, there is no second copy, and what is read stays in
//! the page cache. Everything here blocks, except for `shoal-blob` itself.

mod cache;
pub mod chunks;
mod disk;
mod error;
mod fill;
mod http;
mod hub;
mod kept;
pub mod name;
mod origin;
mod prepare;
mod quant;
mod s3;
mod settings;
mod sigv4;
mod sums;
pub mod swarm;
pub mod tracker;
mod turn;

pub use cache::ModelCache;
pub use chunks::Cut;
pub use error::BlobError;
pub use fill::{Alone, Choice, Filling, Peers, Wanted};
pub use prepare::Side;
pub use s3::ObjectUrl;
pub use settings::{BlobSettings, Patience, S3Keys};
