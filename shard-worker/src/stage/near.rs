//! ● A shorter way between two ranks on one machine: a socket of the kernel, whose ends their compute threads hold.
//!
//! ```text
//! compute thread ══ write ══ socket ══ read ══ compute thread
//! message:   round u64 | bytes u64 | what the round is about
//! ```
//!
//! A round over a link wakes a thread at each end and then the one that computes, and is sealed and opened in
//! between. Here nobody else wakes, and who waits looks for [`LOOK_FOR`] before it sleeps: ranks take equally long
//! for their halves of a layer, so that the other one is nearly always there by then. Who is at the other end, the
//! link has proven ([`meet`](super::meet)). It stays and is watched as any other, and when it is lost it shuts the socket ([`Guard`]),
//! which ends a wait.

use std::io::{self, ErrorKind, IoSlice, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use rustix::event::{PollFd, PollFlags, poll};
use tokio::sync::oneshot;

use super::wire::LinkEnd;
use crate::collective::CollectiveError;

/// How long to look whether the other rank has come: four times what it costs to be woken.
const LOOK_FOR: Duration = Duration::from_micros(100);

/// Round and length.
const HEAD_LEN: usize = 16;

/// One end of the socket.
#[derive(Debug)]
pub struct Near {
    socket: UnixStream,
    bytes_max: usize,
    round: u64,
    /// Where messages are read into; its memory comes back when they are dropped.
    inbox: BytesMut,
    /// To the link, once the other rank is gone.
    lost: Option<oneshot::Sender<LinkEnd>>,
}

/// The link's side of it. Shuts the socket when it is dropped: nobody waits at either end any more.
#[derive(Debug)]
pub(super) struct Guard {
    socket: UnixStream,
    lost: oneshot::Receiver<LinkEnd>,
}

impl Guard {
    /// Waits until the compute thread finds the other rank gone, or what it says wrong.
    pub(super) async fn lost(&mut self) -> LinkEnd {
        match (&mut self.lost).await {
            Ok(end) => end,
            // Its thread has ended, which is others' to notice.
            Err(_) => std::future::pending().await,
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // It fails where the other rank was faster.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

impl Near {
    /// An end at which no message is longer than `bytes_max`, and what ends it.
    pub(super) fn new(socket: UnixStream, bytes_max: usize) -> io::Result<(Self, Guard)> {
        socket.set_nonblocking(true)?;
        let (tell, lost) = oneshot::channel();
        let guard = Guard { socket: socket.try_clone()?, lost };
        Ok((Self { socket, bytes_max, round: 0, inbox: BytesMut::new(), lost: Some(tell) }, guard))
    }

    /// Tells the link, which cannot have noticed.
    fn tell(&mut self, end: LinkEnd) {
        if let Some(tell) = self.lost.take() {
            // Where the link has ended it knows.
            let _ = tell.send(end);
        }
    }
}

/// One round with one rank, on its way.
#[derive(Debug)]
pub(super) struct Round<'a> {
    rank: usize,
    near: &'a mut Near,
    head: [u8; HEAD_LEN],
    told: &'a [u8],
    /// Of head and message.
    sent: usize,
    got_head: [u8; HEAD_LEN],
    /// Of the other one's head and message.
    got: usize,
}

fn head_of(round: u64, len: usize) -> [u8; HEAD_LEN] {
    let mut head = [0; HEAD_LEN];
    head[..8].copy_from_slice(&round.to_le_bytes());
    head[8..].copy_from_slice(&(len as u64).to_le_bytes());
    head
}

impl<'a> Round<'a> {
    /// The next one with `rank`, to which `told` goes.
    pub(super) fn begin(rank: usize, near: &'a mut Near, told: &'a [u8]) -> Self {
        let head = head_of(near.round, told.len());
        near.round += 1;
        near.inbox.clear();
        Self { rank, near, head, told, sent: 0, got_head: [0; HEAD_LEN], got: 0 }
    }

    fn is_sent(&self) -> bool {
        self.sent == HEAD_LEN + self.told.len()
    }

    fn is_got(&self) -> bool {
        self.got >= HEAD_LEN && self.got == HEAD_LEN + self.near.inbox.len()
    }

    fn gone(&mut self, why: impl ToString) -> CollectiveError {
        self.ended(LinkEnd::Gone(why.to_string()))
    }

    /// What ends the link ends the round; the link says which it was.
    fn ended(&mut self, end: LinkEnd) -> CollectiveError {
        let why = end.to_string();
        self.near.tell(end);
        CollectiveError::Gone { rank: self.rank as u32, why }
    }

    /// Sends what the socket takes; whether that was anything.
    fn push(&mut self) -> Result<bool, CollectiveError> {
        if self.is_sent() {
            return Ok(false);
        }
        let head = IoSlice::new(&self.head[self.sent.min(HEAD_LEN)..]);
        let rest = IoSlice::new(&self.told[self.sent.saturating_sub(HEAD_LEN)..]);
        match (&self.near.socket).write_vectored(&[head, rest]) {
            Ok(sent) => {
                self.sent += sent;
                Ok(sent > 0)
            }
            Err(error) if is_nothing_yet(&error) => Ok(false),
            Err(error) => Err(self.gone(error)),
        }
    }

    /// Takes what has come; whether that was anything.
    fn pull(&mut self) -> Result<bool, CollectiveError> {
        if self.is_got() {
            return Ok(false);
        }
        let to = match self.got.checked_sub(HEAD_LEN) {
            None => &mut self.got_head[self.got..],
            Some(got) => &mut self.near.inbox[got..],
        };
        match (&self.near.socket).read(to) {
            Ok(0) => Err(self.gone("it has closed the socket of their machine")),
            Ok(got) => {
                let before = self.got;
                self.got += got;
                if before < HEAD_LEN && self.got == HEAD_LEN {
                    self.opened()?;
                }
                Ok(true)
            }
            Err(error) if is_nothing_yet(&error) => Ok(false),
            Err(error) => Err(self.gone(error)),
        }
    }

    /// Checks the other one's head and makes room for what follows.
    fn opened(&mut self) -> Result<(), CollectiveError> {
        let number = |at: usize| {
            self.got_head[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
        };
        let (round, expected) = (number(0), self.near.round - 1);
        let (len, most) = (number(8), self.near.bytes_max);
        if round != expected {
            let why = format!("round {round} where {expected} comes next");
            return Err(self.ended(LinkEnd::Violation(why)));
        }
        match usize::try_from(len).ok().filter(|len| *len <= most) {
            Some(len) => {
                self.near.inbox.resize(len, 0);
                Ok(())
            }
            None => {
                let why = format!("a message of {len} bytes where {most} are the most");
                Err(self.ended(LinkEnd::Violation(why)))
            }
        }
    }

    /// What the other rank has told.
    fn end(self) -> (usize, Bytes) {
        (self.rank, self.near.inbox.split().freeze())
    }
}

/// Nothing can be sent, or has come, at this moment.
fn is_nothing_yet(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

/// Carries rounds with several ranks until all are done: what each has told, by rank. Both ends may have long
/// messages to tell, so that each takes while it gives.
pub(super) fn carry(mut rounds: Vec<Round<'_>>) -> Result<Vec<(usize, Bytes)>, CollectiveError> {
    let mut idle: Option<Instant> = None;
    loop {
        let (mut moved, mut done) = (false, true);
        for round in &mut rounds {
            moved |= round.push()? | round.pull()?;
            done &= round.is_sent() && round.is_got();
        }
        if done {
            return Ok(rounds.into_iter().map(Round::end).collect());
        }
        if moved {
            idle = None;
        } else if idle.get_or_insert_with(Instant::now).elapsed() < LOOK_FOR {
            // Whoever else needs this processor, the other rank perhaps, goes first.
            std::thread::yield_now();
        } else {
            sleep(&rounds)?;
            idle = None;
        }
    }
}

/// Until something can be sent or has come. A rank that is lost ends it through its [`Guard`]; one that computes
/// for too long has the head's deadline.
fn sleep(rounds: &[Round<'_>]) -> Result<(), CollectiveError> {
    let open = rounds.iter().filter(|round| !(round.is_sent() && round.is_got()));
    let mut sockets: Vec<PollFd<'_>> = open
        .map(|round| {
            let mut wanted = PollFlags::empty();
            wanted.set(PollFlags::OUT, !round.is_sent());
            wanted.set(PollFlags::IN, !round.is_got());
            PollFd::new(&round.near.socket, wanted)
        })
        .collect();
    match poll(&mut sockets, None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(CollectiveError::Carrier { why: error.to_string() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(bytes_max: usize) -> [(Near, Guard); 2] {
        let (a, b) = UnixStream::pair().unwrap();
        [a, b].map(|socket| Near::new(socket, bytes_max).unwrap())
    }

    fn one(near: &mut Near, told: &[u8]) -> Result<Bytes, CollectiveError> {
        carry(vec![Round::begin(1, near, told)]).map(|mut all| all.remove(0).1)
    }

    /// Longer than what a socket holds, told by both at once.
    #[test]
    fn long_and_empty_messages_cross_round_after_round() {
        let long = 3 << 20;
        let [(mut a, _a), (mut b, _b)] = pair(long);
        let told = |round: usize, who: u8| vec![who + round as u8; [long, 0, 5, 1][round % 4]];
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0..8 {
                    assert_eq!(one(&mut b, &told(round, 100)).unwrap(), told(round, 0));
                }
            });
            for round in 0..8 {
                assert_eq!(one(&mut a, &told(round, 0)).unwrap(), told(round, 100));
            }
        });
    }

    #[test]
    fn three_ranks_meet_in_one_round() {
        let [(mut ab, _guard_ab), (mut ba, _guard_ba)] = pair(8);
        let [(mut ac, _guard_ac), (mut ca, _guard_ca)] = pair(8);
        std::thread::scope(|scope| {
            scope.spawn(|| assert_eq!(one(&mut ba, b"b").unwrap(), "a1"));
            scope.spawn(|| assert_eq!(one(&mut ca, b"c").unwrap(), "a2"));
            let rounds = vec![Round::begin(1, &mut ab, b"a1"), Round::begin(2, &mut ac, b"a2")];
            let expected = vec![(1, Bytes::from_static(b"b")), (2, Bytes::from_static(b"c"))];
            assert_eq!(carry(rounds), Ok(expected));
        });
    }

    #[test]
    fn a_rank_that_is_gone_ends_the_wait() {
        let [(mut a, guard), (b, _b)] = pair(8);
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| one(&mut a, b"told"));
            // The link of the rank that waits is lost; the other one still has its end.
            drop(guard);
            let error = waits.join().unwrap().unwrap_err();
            assert!(matches!(error, CollectiveError::Gone { rank: 1, .. }), "{error}");
        });
        drop(b);
    }

    #[test]
    fn what_does_not_fit_the_round_is_refused_by_name() {
        let refused = |bytes: &[u8]| {
            let [(mut a, _a), (b, _b)] = pair(8);
            (&b.socket).write_all(bytes).unwrap();
            one(&mut a, b"told").unwrap_err().to_string()
        };
        let late = refused(&head_of(3, 0));
        assert!(late.contains("it broke the protocol: round 3 where 0 comes next"), "{late}");
        let long = refused(&head_of(0, 9));
        assert!(long.contains("a message of 9 bytes where 8 are the most"), "{long}");
        let endless = refused(&[&head_of(0, 0)[..8], &[0xFF; 8]].concat());
        assert!(endless.contains("where 8 are the most"), "{endless}");
    }

    /// A message's memory is used again once nobody has it.
    #[test]
    fn rounds_of_one_length_take_memory_once() {
        let [(mut a, _a), (mut b, _b)] = pair(4096);
        std::thread::scope(|scope| {
            scope.spawn(|| (0..16).for_each(|_| drop(one(&mut b, &[1; 4096]).unwrap())));
            let places: Vec<_> =
                (0..16).map(|_| one(&mut a, &[2; 4096]).unwrap().as_ptr()).collect();
            assert!(places[1..].iter().all(|place| *place == places[1]), "{places:?}");
        });
    }
}
