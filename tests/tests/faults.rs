//! The fixed dose of faults on real processes; `make faults` has more.

use anyhow::Result;
use shoal_tests::faults::{Fault, run};

#[test]
fn no_fault_loses_doubles_or_changes_a_token() -> Result<()> {
    let report = run(&Fault::ALL, 5, |_| {})?;
    eprintln!("{report}");
    assert_eq!(report.faults(), 40);
    assert!(report.is_clean(), "{report}");
    Ok(())
}
