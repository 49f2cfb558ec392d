//! Medians, spreads and paired ratios.

use std::fmt;

/// Figures of one kind, in the order in which they were taken.
#[derive(Clone, Debug, Default)]
pub struct Series(Vec<f64>);

impl Series {
    /// Adds a figure.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// Adds all figures of another.
    pub fn extend(&mut self, more: impl IntoIterator<Item = f64>) {
        self.0.extend(more);
    }

    /// `median / p99 / worst`, with three significant digits.
    pub fn tail(&self) -> String {
        let of = |q| significant(self.quantile(q));
        format!("{} / {} / {}", of(0.5), of(0.99), of(1.0))
    }

    /// The figures in the order in which they were taken.
    pub fn iter(&self) -> impl Iterator<Item = f64> + '_ {
        self.0.iter().copied()
    }

    /// How many figures.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The value below which a share `q` (0 to 1) of the figures lies; NaN where there is none.
    pub fn quantile(&self, q: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let Some(last) = sorted.len().checked_sub(1) else {
            return f64::NAN;
        };
        let at = q * last as f64;
        let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
        low + (high - low) * at.fract()
    }

    /// The median.
    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// The ratio of each figure to the one that was taken beside it.
    pub fn over(&self, other: &Series) -> Series {
        Series(self.0.iter().zip(&other.0).map(|(a, b)| a / b).collect())
    }

    /// Each figure through a function.
    pub fn map(&self, f: impl Fn(f64) -> f64) -> Series {
        Series(self.0.iter().map(|v| f(*v)).collect())
    }
}

impl FromIterator<f64> for Series {
    fn from_iter<I: IntoIterator<Item = f64>>(iter: I) -> Self {
        Self(iter.into_iter().collect())
    }
}

/// `median [min-max]`, with three significant digits.
impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (low, mid, high) = (self.quantile(0.0), self.median(), self.quantile(1.0));
        write!(f, "{} [{}-{}]", significant(mid), significant(low), significant(high))
    }
}

/// Three significant digits.
pub fn significant(value: f64) -> String {
    let digits = match value.abs() {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_ratios() {
        let a: Series = [3.0, 1.0, 2.0, 10.0].into_iter().collect();
        let b: Series = [1.0, 1.0, 4.0, 5.0].into_iter().collect();
        assert_eq!(a.median(), 2.5);
        assert_eq!(a.over(&b).median(), 1.5);
        assert_eq!(a.quantile(1.0), 10.0);
        assert_eq!(a.to_string(), "2.50 [1.00-10.0]");
        assert_eq!(a.tail(), "2.50 / 9.79 / 10.0");
        assert!(Series::default().median().is_nan());
    }
}
