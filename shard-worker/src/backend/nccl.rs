//! Tensor ranks on the GPUs of one host: [`Collective`] over NCCL.
//!
//! Compiled with the feature `cuda`, and **never run**: no machine of ours has two GPUs. Nothing makes one of
//! these yet, since there is no device backend whose buffers would be worth keeping off the host; ranks
//! talk through [`crate::stage`]'s links until then. Neither driver nor NCCL is linked: cudarc opens
//! `libcuda` and `libnccl` when the first rank joins, and where they are missing that is an error in words.
//!
//! ```text
//! parts ─► device ─┬─ lengths ─► every rank ─┐                     ┌─► got, in rank order
//!                  └─ bytes   ─► every rank ─┴─ one group of sends ┘
//!                                               and receives each
//! ```
//!
//! Bytes are carried, and nothing is added: sums are made above, in rank order ([`crate::collective`]).
//! NCCL's own all-reduce adds in an order of its own choice, whose bits no contract of ours could name.
//! What NCCL carries between GPUs is neither authenticated nor encrypted: it stays inside one host.

#![allow(unsafe_code)] // Asking whether a library is there; a handle that goes to another thread.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, DriverError};
use cudarc::nccl::result::NcclError;
use cudarc::nccl::safe::{Comm, Id, group_end, group_start};
use shoal_protocol::model::Split;

use crate::collective::{Collective, CollectiveError};

/// What names a group of ranks: rank 0 makes it and tells the others.
pub const ID_BYTES: usize = 128;

/// How long a round may take: as long as a link may be silent, since a round is a message each way.
const ROUND_WITHIN: Duration = Duration::from_millis(1500);

/// Looks at a round that is not done are so far apart at first: a round of a small message inside a host.
const LOOK: Duration = Duration::from_micros(10);

/// A message longer than this is a lie, whatever the plan is: no activation of a step is.
const MESSAGE_MAX: u64 = 1 << 30;

/// A rank that could not join its group.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// A library is not on this machine.
    #[error("{0} is not on this machine; install NVIDIA's driver and NCCL 2, or use `cpu` devices")]
    NoLibrary(&'static str),
    /// The driver refuses.
    #[error("GPU {device}: {source}; `nvidia-smi` lists the GPUs of this host")]
    Driver {
        /// Which GPU.
        device: usize,
        /// What the driver says.
        source: DriverError,
    },
    /// NCCL refuses.
    #[error(
        "{split}: NCCL says {code}; all ranks must join with the same id, each with its own GPU"
    )]
    Nccl {
        /// Which rank.
        split: Split,
        /// NCCL's own word.
        code: String,
    },
}

/// One rank's end.
pub struct Nccl {
    split: Split,
    stream: Arc<CudaStream>,
    /// Dropped, which aborts it, when a round fails: what is on its way then is of no use.
    comm: Option<Handle>,
    /// How long rounds took since this was last asked.
    waited: Duration,
}

/// A communicator that goes to the compute thread of its shard.
struct Handle(Comm);

// SAFETY: NCCL lets any thread use a communicator, one at a time; this one is used through `&mut Nccl`
// alone, and the stream in it is `Send` by itself.
unsafe impl Send for Handle {}

/// Makes the name of a new group.
pub fn new_id() -> Result<[u8; ID_BYTES], JoinError> {
    libraries()?;
    let refused = |error| JoinError::Nccl { split: Split::WHOLE, code: words(error) };
    Ok(Id::new().map_err(refused)?.internal().map(|byte| byte as u8))
}

/// cudarc panics where it finds no library.
fn libraries() -> Result<(), JoinError> {
    // SAFETY: both open a library that was installed to be opened, and look at nothing in it.
    let (driver, nccl) =
        unsafe { (cudarc::driver::sys::is_culib_present(), cudarc::nccl::sys::is_culib_present()) };
    match (driver, nccl) {
        (false, _) => Err(JoinError::NoLibrary("libcuda")),
        (true, false) => Err(JoinError::NoLibrary("libnccl")),
        (true, true) => Ok(()),
    }
}

/// NCCL's code, which is all that it gives.
fn words(error: NcclError) -> String {
    format!("{:?}", error.0)
}

impl Nccl {
    /// Joins the group of that name, with a GPU of this host. Waits for all ranks to join.
    pub fn join(device: usize, split: Split, id: [u8; ID_BYTES]) -> Result<Self, JoinError> {
        libraries()?;
        let refused = |source| JoinError::Driver { device, source };
        let context = CudaContext::new(device).map_err(refused)?;
        let stream = context.new_stream().map_err(refused)?;
        let id = Id::uninit(id.map(|byte| byte as std::ffi::c_char));
        let (rank, ranks) = (split.rank as usize, split.ranks as usize);
        let comm = Comm::from_rank(stream.clone(), rank, ranks, id)
            .map_err(|error| JoinError::Nccl { split, code: words(error) })?;
        Ok(Self { split, stream, comm: Some(Handle(comm)), waited: Duration::ZERO })
    }

    /// Sends one piece to each other rank and takes one from each, `lengths` of them long.
    fn round(&mut self, parts: &[Bytes], lengths: &[usize]) -> Result<Vec<Bytes>, Failure> {
        let Some(Handle(comm)) = &self.comm else { return Err(Failure::Ended) };
        let me = self.split.rank as usize;
        let others = || (0..parts.len()).filter(move |rank| *rank != me);
        let mut sent: Vec<Option<CudaSlice<u8>>> = parts.iter().map(|_| None).collect();
        let mut got: Vec<Option<CudaSlice<u8>>> = parts.iter().map(|_| None).collect();
        for rank in others() {
            // Nothing is sent where there is nothing: NCCL has no empty message.
            if !parts[rank].is_empty() {
                sent[rank] = Some(self.stream.clone_htod(&parts[rank][..])?);
            }
            if lengths[rank] > 0 {
                got[rank] = Some(self.stream.alloc_zeros(lengths[rank])?);
            }
        }
        group_start()?;
        for rank in others() {
            if let Some(sent) = &sent[rank] {
                comm.send(sent, rank as i32)?;
            }
            if let Some(got) = &mut got[rank] {
                comm.recv(got, rank as i32)?;
            }
        }
        group_end()?;
        if let Err(failure) = self.wait() {
            // Before what it reads and writes is given back.
            self.comm = None;
            return Err(failure);
        }
        let fetch = |got: Option<CudaSlice<u8>>| -> Result<Bytes, Failure> {
            let Some(got) = got else { return Ok(Bytes::new()) };
            Ok(Bytes::from(self.stream.clone_dtoh(&got)?))
        };
        got.into_iter().map(fetch).collect()
    }

    /// Waits until everything that was asked of the stream is done. CUDA has no wait with a deadline, so
    /// the event is looked at again and again, with pauses that double up to a millisecond.
    fn wait(&self) -> Result<(), Failure> {
        let done = self.stream.record_event(None)?;
        let (begun, mut pause) = (Instant::now(), LOOK);
        while !done.is_complete() {
            if begun.elapsed() > ROUND_WITHIN {
                return Err(Failure::Silent);
            }
            std::thread::park_timeout(pause);
            pause = (2 * pause).min(Duration::from_millis(1));
        }
        Ok(())
    }
}

/// What another rank says that it will send; of the own one there is nothing.
fn length_of(said: &Bytes) -> Result<usize, Failure> {
    match <[u8; 8]>::try_from(&said[..]).map(u64::from_le_bytes) {
        Ok(length) if length > MESSAGE_MAX => Err(Failure::Long(length)),
        Ok(length) => Ok(length as usize),
        Err(_) => Ok(0),
    }
}

/// Why a round was not completed.
enum Failure {
    Driver(DriverError),
    Nccl(NcclError),
    Silent,
    Long(u64),
    Ended,
}

impl From<DriverError> for Failure {
    fn from(error: DriverError) -> Self {
        Failure::Driver(error)
    }
}

impl From<NcclError> for Failure {
    fn from(error: NcclError) -> Self {
        Failure::Nccl(error)
    }
}

impl From<Failure> for CollectiveError {
    fn from(failure: Failure) -> Self {
        let why = match failure {
            Failure::Driver(error) => format!("the driver says {error}"),
            Failure::Nccl(error) => format!("NCCL says {}", words(error)),
            Failure::Silent => {
                format!(
                    "no round was completed within {ROUND_WITHIN:?}; NCCL does not say whose part is missing"
                )
            }
            Failure::Long(bytes) => {
                format!("a rank announces {bytes} bytes; expected at most {MESSAGE_MAX}")
            }
            Failure::Ended => "a round before this one has failed".to_owned(),
        };
        CollectiveError::Carrier { why }
    }
}

impl Collective for Nccl {
    fn split(&self) -> Split {
        self.split
    }

    fn exchange(&mut self, parts: &[Bytes]) -> Result<Vec<Bytes>, CollectiveError> {
        let begun = Instant::now();
        let lengths: Vec<Bytes> = parts
            .iter()
            .map(|part| Bytes::copy_from_slice(&(part.len() as u64).to_le_bytes()))
            .collect();
        let of_a_length = vec![size_of::<u64>(); parts.len()];
        let got = self.round(&lengths, &of_a_length).and_then(|lengths| {
            let lengths = lengths.iter().map(length_of).collect::<Result<Vec<_>, _>>()?;
            self.round(parts, &lengths)
        });
        self.waited += begun.elapsed();
        if got.is_err() {
            self.comm = None;
        }
        Ok(got?)
    }

    fn take_waited(&mut self) -> Duration {
        std::mem::take(&mut self.waited)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_gpu_is_told_what_is_missing() {
        if let Err(error) = libraries() {
            let said = Nccl::join(0, Split { rank: 0, ranks: 2 }, [0; ID_BYTES]).err();
            assert_eq!(said.map(|said| said.to_string()), Some(error.to_string()));
            assert!(error.to_string().contains("is not on this machine"), "{error}");
        }
    }
}
