//! The fixed dose of faults on real processes; `make faults` has more.

use anyhow::Result;
use shoal_tests::faults::{Fault, run};

/// Each kind so often: two dozen kinds make more than forty faults.
const TIMES: usize = 2;

/// `SHOAL_FAULT=cut` does those alone whose names contain it.
#[test]
fn no_fault_loses_doubles_or_changes_a_token() -> Result<()> {
    let wanted = std::env::var("SHOAL_FAULT").unwrap_or_default();
    let faults: Vec<_> =
        Fault::ALL.into_iter().filter(|fault| format!("{fault:?}").contains(&wanted)).collect();
    let report = run(&faults, TIMES, |line| eprintln!("{line}"))?;
    eprintln!("{report}");
    assert_eq!(report.faults(), faults.len() * TIMES);
    assert!(!wanted.is_empty() || report.faults() >= 40);
    assert!(report.is_clean(), "{report}");
    Ok(())
}
