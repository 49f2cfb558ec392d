//! The exponential of contract n1 and what is made of it.

use super::simd::Simd;

/// Below this the exponential is 0: the result would be subnormal.
const EXP_LOW: f32 = -87.336_54;
/// Above this it is infinite: two to the power of 128 is no `f32`.
const EXP_HIGH: f32 = 88.376_26;
/// ln 2 in two parts; the product of the first with a small integer is exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;
/// Adding and subtracting it rounds to the nearest integer, ties to even (1.5 x 2^23).
const ROUND: f32 = 12_582_912.0;
/// The square root of 2 / pi.
const GELU_SLOPE: f32 = 0.797_884_6;
/// The cube's part in GELU's approximation.
const GELU_CUBE: f32 = 0.044_715;
/// `(e^r - 1 - r) / r²` for `r` in ±ln 2 / 2, highest power first (Cephes `expf`).
const POLYNOMIAL: [f32; 6] =
    [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_6e-1, 0.5];

/// `e^x`, within 2 units in the last place; 0 below -87.33, infinite above 88.37.
///
/// # Safety
///
/// The machine has the instructions of `S`.
#[inline(always)]
pub unsafe fn exp<S: Simd>(x: S::F) -> S::F {
    // SAFETY: the caller's.
    unsafe {
        let round = S::splat(ROUND);
        let n = S::sub(S::fma(x, S::splat(std::f32::consts::LOG2_E), round), round);
        let r = S::fma(n, S::splat(-LN2_HIGH), x);
        let r = S::fma(n, S::splat(-LN2_LOW), r);
        let mut p = S::splat(POLYNOMIAL[0]);
        for coefficient in &POLYNOMIAL[1..] {
            p = S::fma(p, r, S::splat(*coefficient));
        }
        let fraction = S::add(S::fma(p, S::mul(r, r), r), S::splat(1.0));
        let y = S::mul(fraction, S::power_of_two(n));
        let y = S::select_less(x, S::splat(EXP_LOW), S::splat(0.0), y);
        S::select_less(S::splat(EXP_HIGH), x, S::splat(f32::INFINITY), y)
    }
}

/// `x / (1 + e^-x)`.
///
/// # Safety
///
/// The machine has the instructions of `S`.
#[inline(always)]
pub unsafe fn silu<S: Simd>(x: S::F) -> S::F {
    // SAFETY: the caller's.
    unsafe {
        let e = exp::<S>(S::sub(S::splat(0.0), x));
        S::div(x, S::add(S::splat(1.0), e))
    }
}

/// The hyperbolic tangent: `1 - 2 / (e^2x + 1)`, within 2e-7 of it.
///
/// # Safety
///
/// The machine has the instructions of `S`.
#[inline(always)]
pub unsafe fn tanh<S: Simd>(x: S::F) -> S::F {
    // SAFETY: the caller's.
    unsafe {
        let one = S::splat(1.0);
        let e = exp::<S>(S::add(x, x));
        S::sub(one, S::div(S::splat(2.0), S::add(e, one)))
    }
}

/// `cap * tanh(x / cap)`.
///
/// # Safety
///
/// The machine has the instructions of `S`.
#[inline(always)]
pub unsafe fn softcap<S: Simd>(x: S::F, cap: f32) -> S::F {
    // SAFETY: the caller's.
    unsafe {
        let cap = S::splat(cap);
        S::mul(cap, tanh::<S>(S::div(x, cap)))
    }
}

/// `x / (1 + e^-x)` with `x` in the exponent replaced by `x * slope`.
///
/// # Safety
///
/// The machine has the instructions of `S`.
#[inline(always)]
pub unsafe fn swish<S: Simd>(x: S::F, slope: f32) -> S::F {
    // SAFETY: the caller's.
    unsafe {
        let e = exp::<S>(S::mul(x, S::splat(0.0 - slope)));
        S::div(x, S::add(S::splat(1.0), e))
    }
}

/// GELU by its approximation with the hyperbolic tangent, which is `x / (1 + e^-2u)` with
/// `u = sqrt(2 / pi) * fma(0.044715 x², x, x)`.
///
/// # Safety
///
/// The machine has the instructions of `S`.
#[inline(always)]
pub unsafe fn gelu_tanh<S: Simd>(x: S::F) -> S::F {
    // SAFETY: the caller's.
    unsafe {
        let square = S::mul(S::splat(GELU_CUBE), S::mul(x, x));
        let u = S::mul(S::splat(GELU_SLOPE), S::fma(square, x, x));
        let e = exp::<S>(S::mul(u, S::splat(-2.0)));
        S::div(x, S::add(S::splat(1.0), e))
    }
}

/// `ln(erfc(x) / t) + x²` for x from 0 on as a polynomial in `t = 1 / (1 + x / 2)`, highest power first
/// (Numerical Recipes, `erfcc`): a relative error below 1.2e-7.
const ERFC: [f32; 10] = [
    0.170_872_77,
    -0.822_152_23,
    1.488_515_9,
    -1.135_204,
    0.278_868_07,
    -0.186_288_06,
    0.096_784_18,
    0.374_091_96,
    1.000_023_7,
    -1.265_512_2,
];

/// `x / 2 * (1 + erf(x / sqrt 2))`, within 4e-7 of `max(|x|, 1)`.
///
/// # Safety
///
/// The machine has the instructions of `S`.
#[inline(always)]
pub unsafe fn gelu<S: Simd>(x: S::F) -> S::F {
    // SAFETY: the caller's.
    unsafe {
        let (zero, one) = (S::splat(0.0), S::splat(1.0));
        let away = S::max(x, S::sub(zero, x));
        let z = S::mul(away, S::splat(std::f32::consts::FRAC_1_SQRT_2));
        let t = S::div(one, S::fma(z, S::splat(0.5), one));
        let mut p = S::splat(ERFC[0]);
        for coefficient in &ERFC[1..] {
            p = S::fma(p, t, S::splat(*coefficient));
        }
        let minus_z = S::sub(zero, z);
        let tail = S::mul(t, exp::<S>(S::fma(minus_z, z, p)));
        let share = S::select_less(x, zero, tail, S::sub(S::splat(2.0), tail));
        S::mul(S::mul(x, S::splat(0.5)), share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::isa::{Isa, Kernel};
    use crate::backend::cpu::simd::LANES;

    struct Exp([f32; LANES]);

    impl Kernel for Exp {
        type Output = [f32; LANES];
        #[inline(always)]
        unsafe fn run<S: Simd>(self) -> [f32; LANES] {
            let mut out = [0.0; LANES];
            // SAFETY: `Isa::run` calls it; both arrays have 16 values.
            unsafe { S::store(out.as_mut_ptr(), exp::<S>(S::load(self.0.as_ptr()))) };
            out
        }
    }

    /// The smallest step at the exact value is the unit in the last place.
    fn ulps(got: f32, exact: f64) -> f64 {
        let near = exact as f32;
        (f64::from(got) - exact).abs() / f64::from(near.next_up() - near)
    }

    #[test]
    fn exp_is_within_two_units_and_the_same_everywhere() {
        let mut worst: f64 = 0.0;
        for step in 0..40_000 {
            let x: [f32; LANES] =
                std::array::from_fn(|i| -87.3 + (step * LANES + i) as f32 * (175.6 / 640_000.0));
            let paths: Vec<[f32; LANES]> =
                // SAFETY: `Exp` demands nothing more.
                Isa::all().map(|isa| unsafe { isa.run(Exp(x)) }).collect();
            assert!(paths.iter().all(|p| p.map(f32::to_bits) == paths[0].map(f32::to_bits)));
            for (x, got) in x.into_iter().zip(paths[0]) {
                worst = worst.max(ulps(got, libm::exp(f64::from(x))));
            }
        }
        assert!(worst < 2.0, "{worst}");
    }

    struct Gelu([f32; LANES]);

    impl Kernel for Gelu {
        type Output = [f32; LANES];
        #[inline(always)]
        unsafe fn run<S: Simd>(self) -> [f32; LANES] {
            let mut out = [0.0; LANES];
            // SAFETY: `Isa::run` calls it; both arrays have 16 values.
            unsafe { S::store(out.as_mut_ptr(), gelu::<S>(S::load(self.0.as_ptr()))) };
            out
        }
    }

    #[test]
    fn gelu_is_that_of_the_error_function_and_the_same_everywhere() {
        let exact = |x: f64| x / 2.0 * libm::erfc(-x / std::f64::consts::SQRT_2);
        for step in 0..20_000 {
            let x: [f32; LANES] =
                std::array::from_fn(|i| -20.0 + (step * LANES + i) as f32 * (40.0 / 320_000.0));
            let paths: Vec<[f32; LANES]> =
                // SAFETY: `Gelu` demands nothing more.
                Isa::all().map(|isa| unsafe { isa.run(Gelu(x)) }).collect();
            assert!(paths.iter().all(|p| p.map(f32::to_bits) == paths[0].map(f32::to_bits)));
            for (x, got) in x.into_iter().zip(paths[0]) {
                let off = (f64::from(got) - exact(f64::from(x))).abs();
                assert!(off <= 4e-7 * f64::from(x.abs().max(1.0)), "gelu({x}) is {got}: {off}");
            }
        }
    }

    #[test]
    fn exp_has_no_surprises_at_the_ends() {
        let mut x = [0.0; LANES];
        x[..6].copy_from_slice(&[f32::NEG_INFINITY, -1e30, -88.0, 89.0, f32::INFINITY, -0.0]);
        for isa in Isa::all() {
            // SAFETY: `Exp` demands nothing more.
            let y = unsafe { isa.run(Exp(x)) };
            assert_eq!(y[..6], [0.0, 0.0, 0.0, f32::INFINITY, f32::INFINITY, 1.0], "{isa}");
        }
    }
}
