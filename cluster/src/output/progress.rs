//! How far a deployment is: what a waiting person reads on stderr.
//!
//! On a terminal one line is written over and over; elsewhere a plain line follows a plain line, and
//! only when it says something new.

use std::io::{IsTerminal, Write};

use shoal_protocol::admin::{ClusterView, DeploymentPhase};
use shoal_protocol::control::ShardState;
use shoal_protocol::id::{DeploymentName, StageIndex};
use shoal_protocol::units::Bytes;

use super::table::{percent, replicas, report_of};

/// Where a deployment is on its way to being served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stand {
    /// There is no such deployment.
    Absent,
    /// No plan yet; why.
    Waiting(String),
    /// Shards load; bytes read of bytes to read, shards that are ready of shards.
    Loading {
        /// Bytes read.
        done: Bytes,
        /// Bytes to read, as far as it is known.
        total: Bytes,
        /// Shards that take steps.
        ready: usize,
        /// All shards.
        shards: usize,
    },
    /// Requests are served.
    Ready,
    /// It will not be served as it is; why.
    Failed(String),
}

/// Reads the stand of a deployment off the cluster's view.
pub fn stand(view: &ClusterView, name: &DeploymentName) -> Stand {
    let Some(deployment) = view.deployments.iter().find(|d| d.name == *name) else {
        return Stand::Absent;
    };
    match deployment.phase {
        DeploymentPhase::Waiting => Stand::Waiting(deployment.reason.clone()),
        DeploymentPhase::Ready => Stand::Ready,
        DeploymentPhase::Failed => Stand::Failed(deployment.reason.clone()),
        DeploymentPhase::Loading => {
            let (mut done, mut total, mut ready, mut shards) = (Bytes(0), Bytes(0), 0, 0);
            for replica in replicas(view, deployment) {
                for (stage, index) in replica.stages.iter().zip(0..) {
                    for shard in &stage.shards {
                        shards += 1;
                        let weights = shard.memory.weights;
                        let (d, t) = match report_of(view, replica, StageIndex(index), shard)
                            .map(|report| &report.state)
                        {
                            None => (Bytes(0), weights),
                            Some(ShardState::Loading { done, total }) => (*done, *total),
                            Some(state) => {
                                ready += usize::from(*state == ShardState::Ready);
                                (weights, weights)
                            }
                        };
                        done = done + d;
                        total = total + t;
                    }
                }
            }
            Stand::Loading { done, total, ready, shards }
        }
    }
}

/// Says how a wait goes on.
#[derive(Debug)]
pub struct Progress {
    name: DeploymentName,
    terminal: bool,
    /// The last line that was written.
    last: String,
    /// Whether the cursor stands in a line that can be written over.
    open: bool,
}

/// Without a terminal a line is worth writing each time that a tenth more has been read.
const PLAIN_STEP_PERCENT: u64 = 10;

impl Progress {
    /// Progress of this deployment, on stderr.
    pub fn new(name: DeploymentName) -> Self {
        Self { name, terminal: std::io::stderr().is_terminal(), last: String::new(), open: false }
    }

    /// Shows a new stand, if it says something new.
    pub fn show(&mut self, stand: &Stand) {
        let Some(line) = line(&self.name, stand, self.terminal) else { return };
        if line == self.last {
            return;
        }
        let mut stderr = std::io::stderr().lock();
        // Nobody can be told that stderr is gone.
        let _ = if self.terminal {
            self.open = true;
            write!(stderr, "\r\x1b[2K{line}").and_then(|()| stderr.flush())
        } else {
            writeln!(stderr, "{line}")
        };
        self.last = line;
    }

    /// Ends the line that was written over.
    pub fn end(&mut self) {
        if std::mem::take(&mut self.open) {
            eprintln!();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.end();
    }
}

fn line(name: &DeploymentName, stand: &Stand, fine: bool) -> Option<String> {
    match stand {
        Stand::Absent | Stand::Ready | Stand::Failed(_) => None,
        Stand::Waiting(why) if why.is_empty() => Some(format!("{name}: waiting for a plan")),
        Stand::Waiting(why) => Some(format!("{name}: waiting: {}", why.replace('\n', "; "))),
        Stand::Loading { done, total, ready, shards } if done < total => {
            let (done, total) = (done.0, total.0);
            let shown = if fine {
                format!("{} of {}, {}", Bytes(done), Bytes(total), percent(done, total))
            } else {
                let tenth = total.div_ceil(100 / PLAIN_STEP_PERCENT).max(1);
                format!("{} of {}", percent(done / tenth * tenth, total), Bytes(total))
            };
            Some(format!("{name}: reading weights: {shown} ({ready} of {shards} shards ready)"))
        }
        Stand::Loading { ready, shards, .. } => {
            Some(format!("{name}: linking the stages ({ready} of {shards} shards ready)"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_lines_move_in_tenths_and_fine_ones_with_every_byte() {
        let name = DeploymentName::new("m").unwrap();
        let loading =
            |done| Stand::Loading { done: Bytes(done), total: Bytes(1000), ready: 0, shards: 2 };
        let plain = |done| line(&name, &loading(done), false);
        assert_eq!(plain(101), plain(199));
        assert_ne!(plain(199), plain(200));
        assert_ne!(line(&name, &loading(101), true), line(&name, &loading(199), true));
        assert_eq!(
            plain(205).as_deref(),
            Some("m: reading weights: 20 % of 1000 B (0 of 2 shards ready)")
        );
        assert_eq!(plain(1000).as_deref(), Some("m: linking the stages (0 of 2 shards ready)"));
    }
}
