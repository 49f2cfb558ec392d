//! How much memory is free for this process: what the machine has, and what its control groups let
//! it have. A container's limit is that of a group, and `/proc/meminfo` knows nothing of groups.
//!
//! ```text
//! /proc/meminfo ─► MemAvailable ──────────────────────────────────────────────────────┐
//! /proc/self/cgroup ─► its group and each above it ─► limit - (used - inactive cache) ─┴─► least
//! ```
//!
//! What a group has used counts the pages of files it has read; those that nobody uses any more are
//! given back as soon as memory is short. Groups are looked for where systems mount them.

use std::io;
use std::path::{Component, Path, PathBuf};

use shoal_protocol::units::Bytes;

/// Of the memory that is free at start, how much workers take where nobody says otherwise, in
/// percent. The rest is for the page cache that loads go through, and for everybody else.
const WORKERS_PERCENT: u64 = 80;

/// What all workers of a machine take together of so much free memory.
pub fn for_workers(free: Bytes) -> Bytes {
    Bytes(free.0 / 100 * WORKERS_PERCENT)
}

/// The memory that is free for this process.
pub fn free() -> io::Result<Bytes> {
    free_by(&|path| std::fs::read_to_string(path))
}

/// Reads a file of the system.
type Read<'a> = &'a dyn Fn(&Path) -> io::Result<String>;

/// The memory that there is at all, where the system says.
pub fn of_machine() -> Option<Bytes> {
    parse_line(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemTotal:")
}

fn free_by(read: Read<'_>) -> io::Result<Bytes> {
    let machine = parse_available(&read(Path::new("/proc/meminfo"))?).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, "it has no line `MemAvailable: … kB`")
    })?;
    // A system without groups has no such file.
    let groups = read(Path::new("/proc/self/cgroup")).unwrap_or_default();
    let left = groups.lines().filter_map(parse_group).flat_map(|(version, group)| {
        version.folders(group).into_iter().filter_map(move |folder| version.left(&folder, read))
    });
    Ok(left.fold(machine, Bytes::min))
}

fn parse_available(meminfo: &str) -> Option<Bytes> {
    parse_line(meminfo, "MemAvailable:")
}

fn parse_line(meminfo: &str, name: &str) -> Option<Bytes> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(Bytes(kib.checked_mul(1024)?))
}

/// One version of control groups: where it is mounted and what it calls things.
#[derive(Debug, PartialEq)]
struct Version {
    mount: &'static str,
    limit: &'static str,
    used: &'static str,
    /// The line of `memory.stat` with the pages of files that nobody uses.
    inactive: &'static str,
}

const V1: Version = Version {
    mount: "/sys/fs/cgroup/memory",
    limit: "memory.limit_in_bytes",
    used: "memory.usage_in_bytes",
    inactive: "total_inactive_file",
};

const V2: Version = Version {
    mount: "/sys/fs/cgroup",
    limit: "memory.max",
    used: "memory.current",
    inactive: "inactive_file",
};

/// The group of a line of `/proc/self/cgroup`, if it may limit memory: `0::/a/b` in version 2,
/// `7:cpu,memory:/a/b` in version 1.
fn parse_group(line: &str) -> Option<(&'static Version, &str)> {
    let mut fields = line.splitn(3, ':');
    let (id, controllers, group) = (fields.next()?, fields.next()?, fields.next()?);
    if (id, controllers) == ("0", "") {
        return Some((&V2, group));
    }
    controllers.split(',').any(|controller| controller == "memory").then_some((&V1, group))
}

impl Version {
    /// The folder of a group and those of all above it.
    ///
    /// A container may see its own group as the mount, under the name that the host gives it: the
    /// folders in between do not exist then, and its limit is found at the mount all the same.
    fn folders(&self, group: &str) -> Vec<PathBuf> {
        let mut folder = PathBuf::from(self.mount);
        for part in Path::new(group).components() {
            match part {
                Component::Normal(name) => folder.push(name),
                // A group outside of what is mounted here; there is no way to its folder.
                Component::ParentDir => return vec![PathBuf::from(self.mount)],
                _ => {}
            }
        }
        let inside = folder.ancestors().take_while(|folder| folder.starts_with(self.mount));
        inside.map(Path::to_owned).collect()
    }

    /// What the group in this folder may still take; `None` if it may take everything.
    fn left(&self, folder: &Path, read: Read<'_>) -> Option<Bytes> {
        let number = |file: &str| read(&folder.join(file)).ok()?.trim().parse::<u64>().ok();
        // Where there is no limit the file is not there, or says `max`.
        let limit = number(self.limit)?;
        let stat = read(&folder.join("memory.stat")).unwrap_or_default();
        let inactive = stat.lines().find_map(|line| {
            line.strip_prefix(self.inactive)?.strip_prefix(' ')?.trim().parse::<u64>().ok()
        });
        let used = number(self.used).unwrap_or(0).saturating_sub(inactive.unwrap_or(0));
        Some(Bytes(limit.saturating_sub(used)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: (&str, &str) = (
        "/proc/meminfo",
        "MemTotal:       16 kB\nMemFree:        2 kB\nMemAvailable:   12345 kB\n",
    );

    /// The free memory of a system with these files.
    fn free_with(files: &[(&str, &str)]) -> io::Result<Bytes> {
        free_by(&|path| {
            let found = files.iter().find(|(name, _)| Path::new(name) == path);
            found.map(|(_, text)| (*text).to_owned()).ok_or(io::ErrorKind::NotFound.into())
        })
    }

    #[test]
    fn without_groups_the_machine_counts() {
        assert_eq!(free_with(&[MEMINFO]).unwrap(), Bytes(12345 * 1024));
        for text in ["", "MemAvailable: 12", "MemAvailable: x kB", "MemTotal: 1 kB"] {
            let error = free_with(&[("/proc/meminfo", text)]).unwrap_err();
            assert!(error.to_string().contains("MemAvailable"), "{text:?}: {error}");
        }
        assert!(free_with(&[]).is_err());
    }

    #[test]
    fn the_tightest_group_counts() {
        let check = |what: &str, expected: u64, files: &[(&str, &str)]| {
            let files: Vec<_> = [MEMINFO].into_iter().chain(files.iter().copied()).collect();
            assert_eq!(free_with(&files).unwrap(), Bytes(expected), "{what}");
        };
        let all = 12345 * 1024;
        const V2_OWN: (&str, &str) = ("/proc/self/cgroup", "0::/a.slice/b\n");
        check(
            "a limit of version 2, its inactive cache not counted",
            700,
            &[
                V2_OWN,
                ("/sys/fs/cgroup/a.slice/b/memory.max", "1000\n"),
                ("/sys/fs/cgroup/a.slice/b/memory.current", "500\n"),
                (
                    "/sys/fs/cgroup/a.slice/b/memory.stat",
                    "anon 9\ninactive_file 200\nactive_file 7\n",
                ),
            ],
        );
        check(
            "one above is tighter",
            60,
            &[
                V2_OWN,
                ("/sys/fs/cgroup/a.slice/b/memory.max", "1000\n"),
                ("/sys/fs/cgroup/a.slice/b/memory.current", "500\n"),
                ("/sys/fs/cgroup/a.slice/memory.max", "600\n"),
                ("/sys/fs/cgroup/a.slice/memory.current", "540\n"),
            ],
        );
        check(
            "no limit",
            all,
            &[
                V2_OWN,
                ("/sys/fs/cgroup/a.slice/b/memory.max", "max\n"),
                ("/sys/fs/cgroup/a.slice/b/memory.current", "500\n"),
            ],
        );
        check(
            "a limit beyond the machine",
            all,
            &[V2_OWN, ("/sys/fs/cgroup/a.slice/b/memory.max", "99999999999\n")],
        );
        check(
            "more than the limit is used",
            0,
            &[
                V2_OWN,
                ("/sys/fs/cgroup/a.slice/b/memory.max", "1000\n"),
                ("/sys/fs/cgroup/a.slice/b/memory.current", "1500\n"),
            ],
        );
        const V1_OWN: (&str, &str) =
            ("/proc/self/cgroup", "9:name=systemd:/x\n4:cpu,memory:/docker/f0\n0::/\n");
        check(
            "a container of version 1 under its host's name",
            650,
            &[
                V1_OWN,
                ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "1000\n"),
                ("/sys/fs/cgroup/memory/memory.usage_in_bytes", "400\n"),
                ("/sys/fs/cgroup/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 50\n"),
            ],
        );
        check(
            "no limit in version 1",
            all,
            &[
                V1_OWN,
                ("/sys/fs/cgroup/memory/docker/f0/memory.limit_in_bytes", "9223372036854771712\n"),
                ("/sys/fs/cgroup/memory/docker/f0/memory.usage_in_bytes", "400\n"),
            ],
        );
        check(
            "a group outside of the mount",
            1000,
            &[
                ("/proc/self/cgroup", "0::/../other\n"),
                ("/sys/fs/cgroup/memory.max", "1000\n"),
                ("/sys/fs/cgroup/other/memory.max", "10\n"),
            ],
        );
    }

    #[test]
    fn workers_leave_something_to_others() {
        assert_eq!(for_workers(Bytes(3000)), Bytes(2400));
    }
}
