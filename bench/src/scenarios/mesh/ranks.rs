//! Two tensor ranks with a thread each against one thread unsplit.

use anyhow::Result;
use shoal_protocol::mesh::{Objective, Reduction};
use shoal_protocol::plan::Precision;

use super::bed::{Bed, Served, Wanted};
use crate::measure::Series;
use crate::measure::machine::read_bandwidth;
use crate::measure::report::Section;
use crate::measure::stats::significant;
use crate::processes::Host;
use crate::scenarios::Settings;
use crate::workload::model::Shape;

const TOKENS: u32 = 24;

/// Of what two cores could do at best.
const SHARE: f64 = 0.9;

/// What is asked of formats that are bound by arithmetic.
const COMPUTE: f64 = 1.7;

/// What two threads could do at best of what one does, where that is less than this, the memory is their bound.
const TWICE: f64 = COMPUTE / SHARE;

/// Milliseconds that a token takes at least where the goals are promised.
const TOKEN_MS: f64 = 20.0;

/// In four bits, too, it takes that long.
const LARGEST: Shape = Shape { layers: 20, ..Shape::BILLION };

/// Runs it.
pub fn run(settings: &Settings) -> Result<Section> {
    let mut section = Section::new(
        "Two tensor ranks against one thread",
        format!(
            "One stream of {TOKENS} tokens: mesh 1x2 with one thread a rank, each bound to a processor (`--cpus`), against 1x1 with one thread, taken in \
             turn, and 1x2 over QUIC as between machines (SHOAL_RANKS_APART=1) beside them, on models of {TOKEN_MS} ms a token and more. What one core reads in a second, and two together, is measured just \
             before each pair of meshes and just behind it. Two ranks can be faster only until they read what two cores read: where \
             that is less than {TWICE:.2} times what the one thread reads of the weights, the memory is their bound, and the goal {SHARE} of it. \
             Else it is their arithmetic, and the goal {COMPUTE}. \
             distributed-llama's two nodes, on machines of their own, reach 2.00 of its one (issue 4)."
        ),
    );
    // Room for all that are compared, each with as much context as it can have.
    let roomy = |host| Host { memory: "8GiB".to_owned(), ..host };
    let hosts = [0, 1].map(Host::computing_on).map(roomy);
    let bed = Bed::start(hosts.to_vec(), None)?;
    let env = ["env", "SHOAL_RANKS_APART=1"].map(str::to_owned);
    let apart = hosts.map(|host| Host { prefix: env.to_vec(), ..host });
    let apart = Bed::start(apart.to_vec(), None)?;
    for (shape, precision) in [
        (Shape::MEDIUM, Precision::F32),
        (Shape::LARGE, Precision::Bf16),
        (LARGEST, Precision::Q8_0),
        (LARGEST, Precision::Q4K),
    ] {
        let shape = settings.shape(shape);
        // As the other scenarios write them.
        let seed = match shape {
            Shape::LARGE => 2,
            LARGEST => 3,
            _ => 1,
        };
        let model = shape.write(&settings.models, seed)?;
        let of = |mesh, reduction| Wanted {
            model: &model,
            vocab: shape.vocab,
            precision: Some(precision),
            mesh,
            objective: Objective::Latency,
            reduction,
        };
        let before = [read_bandwidth(1), read_bandwidth(2)];
        let served = [
            (&bed, bed.serve("one", of("1x1", None))?),
            (&bed, bed.serve("two", of("1x2", Some(Reduction::Sum)))?),
            (&apart, apart.serve("two", of("1x2", Some(Reduction::Sum)))?),
            (&bed, bed.serve("exact", of("1x2", Some(Reduction::Exact)))?),
        ];
        let bytes = weights(&bed, &served[0].1)?;
        let mut series = [(); 4].map(|()| Series::default());
        for (bed, served) in &served {
            bed.token_ms(served, TOKENS)?;
        }
        for pair in 0..settings.pairs {
            for which in [pair % 2, 1 - pair % 2, 2, 3] {
                let (bed, served) = &served[which];
                series[which].push(bed.token_ms(served, TOKENS)?);
            }
        }
        let after = [read_bandwidth(1), read_bandwidth(2)];
        let read = [0, 1].map(|cores| f64::midpoint(before[cores], after[cores]));
        let name = format!("{} M parameters, {precision}", shape.parameters() / 1_000_000);
        let [one, two, over_quic, exact] = series;
        let share = bytes / (one.median() / 1e3) / read[0];
        section.seen(
            format!("{name}: ms a token, one thread"),
            format!("{one} ({} of what a thread reads)", significant(share)),
        );
        section.seen(format!("{name}: ms a token, two ranks"), two.to_string());
        let over_quic = format!("{over_quic} ({})", one.over(&over_quic));
        section.seen(format!("{name}: the same over QUIC (tokens/s over one thread)"), over_quic);
        section.seen(
            format!("{name}: two ranks with --reduction exact (ms a token over those of sum)"),
            format!("{exact} ({})", exact.over(&two)),
        );
        let ratio = one.over(&two);
        // A kernel may read faster than the plain loop that the machine is measured with: then that is what one core
        // reads, or two.
        let reads = |series: &Series| bytes / (series.median() / 1e3);
        let by_one = read[0].max(reads(&one));
        // Two cores read no less than one, whatever was seen at another moment.
        let by_two = read[1].max(reads(&two)).max(by_one);
        let (cores, best) = (by_two / by_one, by_two / reads(&one));
        let (bound, goal) = match best < TWICE {
            true => ("memory", SHARE * best),
            false => ("arithmetic", COMPUTE),
        };
        let what = format!(
            "{name}: tokens/s, two ranks over one thread (bound by {bound}; two cores read {cores:.2}x of one, {best:.2}x of what this one did)"
        );
        match one.median() >= TOKEN_MS {
            true => {
                let goal = (goal * 100.0).round() / 100.0;
                section.at_least(what, ratio.median(), ratio.to_string(), goal);
            }
            // Nothing is promised of it.
            false => section.seen(what, ratio.to_string()),
        }
        for (bed, served) in served {
            bed.remove(served)?;
        }
    }
    Ok(section)
}

/// Bytes of the weights of a mesh.
fn weights(bed: &Bed, served: &Served) -> Result<f64> {
    let plan = bed.explain(served)?;
    let shards = plan.replicas.iter().flat_map(|r| &r.stages).flat_map(|stage| &stage.shards);
    Ok(shards.map(|shard| shard.memory.weights.0 as f64).sum())
}
