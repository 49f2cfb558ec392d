//! Which instructions the kernels use: found once, carried as a value.

use std::fmt;
use std::str::FromStr;

use super::simd::{Portable, Simd};
#[cfg(target_arch = "x86_64")]
use super::simd_x86::{Avx2, Avx512};
use crate::backend::BackendError;

/// The environment variable that overrides the choice; see [`InstructionSet`] for its words.
pub const ISA_VARIABLE: &str = "SHOAL_ISA";

/// The paths that kernels are compiled for. All give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InstructionSet {
    /// `portable`: what the target always has.
    Portable,
    /// `avx2`: AVX2, FMA and F16C.
    Avx2,
    /// `avxvnni`: these and AVX-VNNI.
    AvxVnni,
    /// `avx512`: AVX-512 F, BW, DQ and VL.
    Avx512,
    /// `avx512vnni`: these and VNNI.
    Avx512Vnni,
}

impl InstructionSet {
    /// From the slowest to the fastest.
    pub const ALL: [InstructionSet; 5] =
        [Self::Portable, Self::Avx2, Self::AvxVnni, Self::Avx512, Self::Avx512Vnni];

    fn is_here(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => Self::Avx2.is_here() && is_x86_feature_detected!("avxvnni"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni => Self::Avx512.is_here() && is_x86_feature_detected!("avx512vnni"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_here()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::AvxVnni | Self::Avx512 | Self::Avx512Vnni => false,
        }
    }
}

impl fmt::Display for InstructionSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::AvxVnni => "avxvnni",
            Self::Avx512 => "avx512",
            Self::Avx512Vnni => "avx512vnni",
        })
    }
}

impl FromStr for InstructionSet {
    type Err = BackendError;

    fn from_str(text: &str) -> Result<Self, BackendError> {
        Self::ALL.into_iter().find(|set| set.to_string() == text).ok_or_else(|| {
            BackendError::InstructionSet {
                asked: text.to_owned(),
                why: format!(
                    "not known; known are {}",
                    Self::ALL.map(|set| set.to_string()).join(", ")
                ),
            }
        })
    }
}

/// An instruction set that this machine has: holding one is the proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(InstructionSet);

/// Work that is written once and compiled for each instruction set.
pub trait Kernel {
    /// What it gives back.
    type Output;

    /// Whether it takes dot products of bytes; to all others an instruction for those is nothing.
    const DOTS: bool = false;

    /// Does it. Implementations are `#[inline(always)]`, so that they are compiled for the
    /// instructions of the caller.
    ///
    /// # Safety
    ///
    /// The machine has the instructions of `S`, and the kernel's own demands are met.
    unsafe fn run<S: Simd>(self) -> Self::Output;
}

impl Isa {
    /// The fastest that this machine has.
    pub fn best() -> Self {
        let best = InstructionSet::ALL.into_iter().rev().find(|set| set.is_here());
        Self(best.unwrap_or(InstructionSet::Portable))
    }

    /// This one; refused where the machine lacks it.
    pub fn of(set: InstructionSet) -> Result<Self, BackendError> {
        if set.is_here() {
            Ok(Self(set))
        } else {
            Err(BackendError::InstructionSet {
                asked: set.to_string(),
                why: format!("this machine lacks it; the best that it has is {}", Self::best()),
            })
        }
    }

    /// What [`ISA_VARIABLE`] says, or else the best.
    pub fn from_environment() -> Result<Self, BackendError> {
        match std::env::var(ISA_VARIABLE) {
            Ok(word) => Self::of(word.parse()?),
            Err(_) => Ok(Self::best()),
        }
    }

    /// All that this machine has.
    pub fn all() -> impl Iterator<Item = Self> {
        InstructionSet::ALL.into_iter().filter(|set| set.is_here()).map(Self)
    }

    /// Runs a kernel with these instructions.
    ///
    /// # Safety
    ///
    /// The kernel's own demands are met.
    pub unsafe fn run<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: an `Isa` exists only for instructions that were found; the kernel's demands are
        // the caller's.
        unsafe {
            // Others are not compiled again for what would be the same. A plain `if` on the constant, so that
            // the compiler leaves it out.
            #[cfg(target_arch = "x86_64")]
            if K::DOTS {
                match self.0 {
                    InstructionSet::AvxVnni => return run_avxvnni(kernel),
                    InstructionSet::Avx512Vnni => return run_avx512vnni(kernel),
                    _ => {}
                }
            }
            match self.0 {
                InstructionSet::Portable => kernel.run::<Portable>(),
                #[cfg(target_arch = "x86_64")]
                InstructionSet::Avx2 | InstructionSet::AvxVnni => run_avx2(kernel),
                #[cfg(target_arch = "x86_64")]
                InstructionSet::Avx512 | InstructionSet::Avx512Vnni => run_avx512(kernel),
                #[cfg(not(target_arch = "x86_64"))]
                _ => kernel.run::<Portable>(),
            }
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller's.
    unsafe { kernel.run::<Avx2<false>>() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
unsafe fn run_avxvnni<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller's.
    unsafe { kernel.run::<Avx2<true>>() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
unsafe fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller's.
    unsafe { kernel.run::<Avx512<false>>() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn run_avx512vnni<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller's.
    unsafe { kernel.run::<Avx512<true>>() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_name_instruction_sets() {
        for set in InstructionSet::ALL {
            assert_eq!(set.to_string().parse(), Ok(set));
        }
        let error = "sse9".parse::<InstructionSet>().unwrap_err().to_string();
        assert!(error.contains("sse9") && error.contains("avx2"), "{error}");
    }

    #[test]
    fn the_best_is_one_that_is_here() {
        assert!(Isa::all().any(|isa| isa == Isa::best()));
        assert!(Isa::of(InstructionSet::Portable).is_ok());
    }
}
