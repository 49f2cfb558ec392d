//! A slow way where the kernel has no `netem`: two processes, each with the end of a tunnel in its own network
//! namespace, that hand packets to each other some time after they have got them.
//!
//! ```text
//! worker ─► tunnel device ─► read ─► queue: due at … ─► socket of the other one ─► its tunnel device ─► worker
//! ```

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// The first argument that makes this program one end of a way.
pub const RELAY: &str = "relay";

/// Longer than any packet of a tunnel.
const PACKET_MAX: usize = 4096;

/// Packets on their way; more are lost, as in any network.
const QUEUE_MAX: usize = 10_000;

/// `TUNSETIFF` of `linux/if_tun.h`, and its flags `IFF_TUN | IFF_NO_PI`: packets as they are.
const SET_INTERFACE: libc::c_ulong = 0x4004_54ca;
const FLAGS: i16 = 0x1001;

/// What `TUNSETIFF` takes: a name and flags.
#[repr(C)]
struct Interface {
    name: [u8; 16],
    flags: i16,
    rest: [u8; 22],
}

/// Opens a tunnel's device, which is there for as long as the file is open.
#[allow(unsafe_code, reason = "the standard library has no ioctl")]
fn device(name: &str) -> Result<File> {
    let tunnel = File::options().read(true).write(true).open("/dev/net/tun");
    let tunnel = tunnel.context("/dev/net/tun")?;
    let mut interface = Interface { name: [0; 16], flags: FLAGS, rest: [0; 22] };
    ensure!(name.len() < interface.name.len(), "`{name}` is too long for a device");
    interface.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the descriptor is open, and the structure is the 40 bytes that the call reads and writes.
    let failed = unsafe { libc::ioctl(tunnel.as_raw_fd(), SET_INTERFACE, &raw mut interface) };
    ensure!(failed == 0, "TUNSETIFF: {}", std::io::Error::last_os_error());
    Ok(tunnel)
}

/// One end of a way, until it is killed: `DEVICE OWN-SOCKET OTHER-SOCKET MICROSECONDS`.
pub fn run(args: &[String]) -> Result<()> {
    let [name, own, other, delay] = args else { bail!("not what a relay takes: {args:?}") };
    let delay = Duration::from_micros(delay.parse()?);
    let mut tunnel = device(name)?;
    let socket = UnixDatagram::bind(own).with_context(|| own.clone())?;
    println!("ready");
    let (mut out, into) = (tunnel.try_clone()?, socket.try_clone()?);
    std::thread::spawn(move || {
        let mut packet = [0; PACKET_MAX];
        while let Ok(len) = into.recv(&mut packet) {
            // A device that is down takes nothing; what was sent to it is lost.
            let _ = out.write_all(&packet[..len]);
        }
    });
    let (queue, due) = sync_channel::<(Instant, Vec<u8>)>(QUEUE_MAX);
    let other = other.clone();
    std::thread::spawn(move || {
        for (at, packet) in due {
            // Time is what this is about: there is no event to wait for.
            crate::processes::pass(at.saturating_duration_since(Instant::now()));
            let _ = socket.send_to(&packet, &other);
        }
    });
    let mut packet = [0; PACKET_MAX];
    loop {
        let len = tunnel.read(&mut packet)?;
        let _ = queue.try_send((Instant::now() + delay, packet[..len].to_vec()));
    }
}

/// The process of one end. It is killed when this is dropped.
pub(super) struct End(Child);

impl End {
    /// Starts it behind these words, and waits until its device is there.
    pub fn start(
        prefix: &[&str],
        device: &str,
        (own, other): (&Path, &Path),
        delay: Duration,
    ) -> Result<Self> {
        let program = std::env::current_exe()?;
        let mut command = match prefix.split_first() {
            Some((first, rest)) => {
                let mut command = Command::new(first);
                command.args(rest).arg(program);
                command
            }
            None => Command::new(program),
        };
        command.args([RELAY, device]).arg(own).arg(other).arg(delay.as_micros().to_string());
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let mut end = Self(child);
        let mut line = [0; 6];
        let stdout = end.0.stdout.as_mut().context("stdout is piped")?;
        stdout.read_exact(&mut line).with_context(|| format!("no tunnel {device}"))?;
        Ok(end)
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
