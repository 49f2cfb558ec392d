//! Processors that compute threads are bound to.
//!
//! Where several workers share a machine, the system moves their threads as it sees fit; tensor ranks then wait for
//! one that shares a processor while another one idles. `shoal worker --cpus` says who computes where.

use std::str::FromStr;

/// Some processors, by their numbers; none: threads go where the system puts them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cpus(Vec<usize>);

/// The most processors that are listed: more than a socket has.
const CPUS_MAX: usize = 1024;

impl FromStr for Cpus {
    type Err = String;

    /// Numbers and ranges of numbers, such as `0-3,8`.
    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || {
            format!(
                "`{text}` is no list of processors; write numbers below {CPUS_MAX} and ranges, such as 0-3,8"
            )
        };
        let mut cpus = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let number = |text: &str| text.parse::<usize>().ok().filter(|cpu| *cpu < CPUS_MAX);
            let (first, last) = number(first).zip(number(last)).ok_or_else(bad)?;
            if first > last {
                return Err(bad());
            }
            for cpu in first..=last {
                if cpus.contains(&cpu) {
                    return Err(format!("processor {cpu} stands twice in `{text}`"));
                }
                cpus.push(cpu);
            }
        }
        Ok(Self(cpus))
    }
}

impl Cpus {
    /// All that this process may use; none where the system does not say.
    pub fn all() -> Self {
        #[cfg(target_os = "linux")]
        if let Ok(allowed) = rustix::thread::sched_getaffinity(None) {
            return Self((0..CPUS_MAX).filter(|cpu| allowed.is_set(*cpu)).collect());
        }
        Self::default()
    }

    /// How many; 0 where threads are not bound.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Where thread `index` computes: one after the other, and from the first again.
    pub(super) fn of_thread(&self, index: usize) -> Option<usize> {
        (!self.0.is_empty()).then(|| self.0[index % self.0.len()])
    }

    /// That this process may use each of them; else which ones it may.
    #[cfg(target_os = "linux")]
    pub fn check(&self) -> Result<(), String> {
        if self.0.is_empty() {
            return Ok(());
        }
        let allowed = rustix::thread::sched_getaffinity(None).map_err(|error| {
            format!("the system does not say which processors there are: {error}")
        })?;
        let missing = |cpu: &&usize| !allowed.is_set(**cpu);
        match self.0.iter().find(missing) {
            None => Ok(()),
            Some(cpu) => {
                let may: Vec<_> = Self::all().0.iter().map(usize::to_string).collect();
                let may = may.join(",");
                Err(format!(
                    "processor {cpu} is not one that this process may use, which are {may}"
                ))
            }
        }
    }

    /// Elsewhere threads cannot be bound.
    #[cfg(not(target_os = "linux"))]
    pub fn check(&self) -> Result<(), String> {
        match self.0.is_empty() {
            true => Ok(()),
            false => Err("threads are bound to processors on Linux alone".to_owned()),
        }
    }
}

/// Binds the calling thread. Where that fails, a processor that went away since, it goes on wherever it is.
pub(super) fn bind(cpu: usize) {
    #[cfg(target_os = "linux")]
    {
        let mut set = rustix::thread::CpuSet::new();
        set.set(cpu);
        if let Err(error) = rustix::thread::sched_setaffinity(None, &set) {
            tracing::warn!("a compute thread is not bound to processor {cpu}: {error}");
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = cpu;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_numbers_and_ranges() {
        assert_eq!("0-2,8".parse(), Ok(Cpus(vec![0, 1, 2, 8])));
        assert_eq!("5".parse(), Ok(Cpus(vec![5])));
        for text in ["", "a", "3-1", "0,", "0-", "-1", "1024", "0-0-0"] {
            let error = text.parse::<Cpus>().unwrap_err();
            assert!(error.contains("such as 0-3,8"), "{text}: {error}");
        }
        assert_eq!("0-2,1".parse::<Cpus>(), Err("processor 1 stands twice in `0-2,1`".to_owned()));
    }

    #[test]
    fn threads_take_turns() {
        let cpus: Cpus = "4,6".parse().unwrap();
        assert_eq!(
            (0..3).map(|i| cpus.of_thread(i)).collect::<Vec<_>>(),
            [Some(4), Some(6), Some(4)]
        );
        assert_eq!(Cpus::default().of_thread(0), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_processor_that_is_not_there_is_refused_with_those_that_are() {
        assert_eq!(Cpus::default().check(), Ok(()));
        assert!(Cpus::all().count() > 0);
        assert_eq!(Cpus::all().check(), Ok(()));
        let error = Cpus(vec![1023]).check().unwrap_err();
        assert!(
            error.starts_with("processor 1023 is not one that this process may use"),
            "{error}"
        );
    }
}
