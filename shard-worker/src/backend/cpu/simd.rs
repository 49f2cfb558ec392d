//! Sixteen `f32` lanes, whatever the machine has: kernels are written once against [`Simd`].
//!
//! Each operation is an IEEE operation on each lane, so that every implementation gives the same
//! bits; where an instruction leaves a choice (the maximum of two zeros, NaN), [`Portable`] says
//! what x86 does.

/// The lanes of a vector.
pub const LANES: usize = 16;

/// Operations on 16 lanes.
///
/// # Safety
///
/// An implementation may use instructions that not every machine has. Every method may be called
/// only where they exist, which [`super::isa::Isa::run`] sees to; that is what each method's
/// `unsafe` stands for, together with the validity of its pointers. Pointers need no alignment
/// beyond that of their element.
pub unsafe trait Simd: Copy + Send + Sync + 'static {
    /// Sixteen lanes.
    type F: Copy;
    /// Sixteen lanes of four bytes.
    type Bytes: Copy;
    /// Sixteen whole numbers of 32 bits.
    type Ints: Copy;

    /// Whether 32 registers hold a vector each, rather than 16 half a vector.
    const WIDE: bool;

    /// All lanes `value`.
    unsafe fn splat(value: f32) -> Self::F;
    /// `from[0..16]`.
    unsafe fn load(from: *const f32) -> Self::F;
    /// `from[0..lanes]`, then zeros; `lanes` is at most 16.
    unsafe fn load_first(from: *const f32, lanes: usize) -> Self::F;
    /// The values of 16 bfloat16 bit patterns.
    unsafe fn load_bf16(from: *const u16) -> Self::F;
    /// The values of 16 half-precision bit patterns.
    unsafe fn load_f16(from: *const u16) -> Self::F;
    /// The values of 16 signed bytes.
    unsafe fn load_i8(from: *const i8) -> Self::F;
    /// The values of 16 bytes.
    unsafe fn load_u8(from: *const u8) -> Self::F;
    /// The values of 16 numbers of eight bits: sign, four of exponent, three of fraction. None of them
    /// has all bits of its magnitude set.
    unsafe fn load_e4m3(from: *const u8) -> Self::F;
    /// Twice the values of 16 numbers of four bits (e2m1), the low halves of bytes moved right by `shift`, 0
    /// or 4.
    unsafe fn load_e2m1(from: *const u8, shift: u32) -> Self::F;
    /// Asks the memory for the line of `from`, which need not be there.
    unsafe fn prefetch(from: *const u8);
    /// `from[0..64]`: four bytes for each lane.
    unsafe fn load_bytes(from: *const u8) -> Self::Bytes;
    /// Each byte moved right by `right`, 0 to 7, of which the bits of `mask` count: none of those that a move
    /// fills.
    unsafe fn bits(bytes: Self::Bytes, right: u32, mask: u8) -> Self::Bytes;
    /// `low + 16 * high` of each byte; both are below 16.
    unsafe fn join(low: Self::Bytes, high: Self::Bytes) -> Self::Bytes;
    /// Byte `i` of each lane, 0 to 3, as a number.
    unsafe fn byte(bytes: Self::Bytes, i: usize) -> Self::F;
    /// All lanes `value`.
    unsafe fn splat_int(value: i32) -> Self::Ints;
    /// The values of whole numbers below 2^24.
    unsafe fn floats(value: Self::Ints) -> Self::F;
    /// The four bytes at `from` in each lane.
    unsafe fn splat_bytes(from: *const i8) -> Self::Bytes;
    /// Adds to each lane the products of its four bytes with those of `signed`, none of which is -128.
    /// `bytes` have no sign; they are below 128 unless `WIDE`.
    unsafe fn dot<const WIDE: bool>(
        sum: Self::Ints,
        bytes: Self::Bytes,
        signed: Self::Bytes,
    ) -> Self::Ints;
    /// Writes `to[0..16]`.
    unsafe fn store(to: *mut f32, value: Self::F);
    /// Writes `to[0..lanes]`; `lanes` is at most 16.
    unsafe fn store_first(to: *mut f32, value: Self::F, lanes: usize);
    /// `a * b + c`, rounded once.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `a + b`.
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    /// `a - b`.
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    /// `a * b`.
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    /// `a / b`.
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// `if a > b { a } else { b }`.
    unsafe fn max(a: Self::F, b: Self::F) -> Self::F;
    /// `if a < b { then } else { otherwise }`.
    unsafe fn select_less(a: Self::F, b: Self::F, then: Self::F, otherwise: Self::F) -> Self::F;
    /// Two to the power of an integer in -126 to 127.
    unsafe fn power_of_two(exponent: Self::F) -> Self::F;
    /// The lanes' sum by the fold tree of contract n1: lane `i` and `i + 8`, then `i + 4`, `i + 2`,
    /// `i + 1`.
    unsafe fn fold_add(a: Self::F) -> f32;
    /// The lanes' maximum by the same tree.
    unsafe fn fold_max(a: Self::F) -> f32;
}

/// Plain Rust, for every architecture.
#[derive(Clone, Copy)]
pub struct Portable;

type Lanes = [f32; LANES];

#[inline(always)]
fn map2(a: Lanes, b: Lanes, f: impl Fn(f32, f32) -> f32) -> Lanes {
    std::array::from_fn(|i| f(a[i], b[i]))
}

#[inline(always)]
fn fold(mut a: Lanes, f: impl Fn(f32, f32) -> f32) -> f32 {
    for distance in [8, 4, 2, 1] {
        for i in 0..distance {
            a[i] = f(a[i], a[i + distance]);
        }
    }
    a[0]
}

// SAFETY: no instruction that the target lacks.
unsafe impl Simd for Portable {
    type F = Lanes;
    type Bytes = [[u8; 4]; LANES];
    type Ints = [i32; LANES];
    const WIDE: bool = false;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Lanes {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Lanes {
        // SAFETY: the caller's pointer is valid for 16 values.
        std::array::from_fn(|i| unsafe { from.add(i).read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_first(from: *const f32, lanes: usize) -> Lanes {
        std::array::from_fn(|i| {
            // SAFETY: the caller's pointer is valid for `lanes` values.
            if i < lanes { unsafe { from.add(i).read_unaligned() } } else { 0.0 }
        })
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Lanes {
        // SAFETY: the caller's pointer is valid for 16 values.
        std::array::from_fn(|i| f32::from_bits(u32::from(unsafe { *from.add(i) }) << 16))
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Lanes {
        // SAFETY: the caller's pointer is valid for 16 values.
        std::array::from_fn(|i| half::f16::from_bits(unsafe { *from.add(i) }).to_f32())
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Lanes {
        // SAFETY: the caller's pointer is valid for 16 values.
        std::array::from_fn(|i| f32::from(unsafe { *from.add(i) }))
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Lanes {
        // SAFETY: the caller's pointer is valid for 16 values.
        std::array::from_fn(|i| f32::from(unsafe { *from.add(i) }))
    }
    #[inline(always)]
    unsafe fn load_e4m3(from: *const u8) -> Lanes {
        // SAFETY: the caller's pointer is valid for 16 values.
        std::array::from_fn(|i| crate::stored::e4m3(unsafe { *from.add(i) }))
    }
    #[inline(always)]
    unsafe fn load_e2m1(from: *const u8, shift: u32) -> Lanes {
        std::array::from_fn(|i| {
            // SAFETY: the caller's pointer is valid for 16 values.
            let byte = unsafe { *from.add(i) };
            f32::from(crate::stored::TWICE_E2M1[usize::from(byte >> shift & 0xF)])
        })
    }
    #[inline(always)]
    unsafe fn prefetch(_from: *const u8) {}
    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Self::Bytes {
        // SAFETY: the caller's pointer is valid for 64 bytes.
        unsafe { from.cast::<Self::Bytes>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn bits(bytes: Self::Bytes, right: u32, mask: u8) -> Self::Bytes {
        bytes.map(|lane| lane.map(|byte| byte >> right & mask))
    }
    #[inline(always)]
    unsafe fn join(low: Self::Bytes, high: Self::Bytes) -> Self::Bytes {
        std::array::from_fn(|i| std::array::from_fn(|j| low[i][j] | high[i][j] << 4))
    }
    #[inline(always)]
    unsafe fn byte(bytes: Self::Bytes, i: usize) -> Lanes {
        bytes.map(|lane| f32::from(lane[i]))
    }
    #[inline(always)]
    unsafe fn splat_int(value: i32) -> Self::Ints {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn floats(value: Self::Ints) -> Lanes {
        value.map(|value| value as f32)
    }
    #[inline(always)]
    unsafe fn splat_bytes(from: *const i8) -> Self::Bytes {
        // SAFETY: the caller's pointer is valid for four bytes.
        [unsafe { from.cast::<[u8; 4]>().read_unaligned() }; LANES]
    }
    #[inline(always)]
    unsafe fn dot<const WIDE: bool>(
        sum: Self::Ints,
        bytes: Self::Bytes,
        signed: Self::Bytes,
    ) -> Self::Ints {
        std::array::from_fn(|i| {
            let product = |j| i32::from(bytes[i][j]) * i32::from(signed[i][j] as i8);
            let products = (0..4).map(product);
            sum[i].wrapping_add(products.sum())
        })
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, value: Lanes) {
        // SAFETY: the caller's pointer is valid for 16 values.
        unsafe { Self::store_first(to, value, LANES) }
    }
    #[inline(always)]
    unsafe fn store_first(to: *mut f32, value: Lanes, lanes: usize) {
        for (i, value) in value.into_iter().enumerate().take(lanes) {
            // SAFETY: the caller's pointer is valid for `lanes` values.
            unsafe { to.add(i).write_unaligned(value) }
        }
    }
    #[inline(always)]
    unsafe fn fma(a: Lanes, b: Lanes, c: Lanes) -> Lanes {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn add(a: Lanes, b: Lanes) -> Lanes {
        map2(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: Lanes, b: Lanes) -> Lanes {
        map2(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: Lanes, b: Lanes) -> Lanes {
        map2(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn div(a: Lanes, b: Lanes) -> Lanes {
        map2(a, b, |a, b| a / b)
    }
    #[inline(always)]
    unsafe fn max(a: Lanes, b: Lanes) -> Lanes {
        map2(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    unsafe fn select_less(a: Lanes, b: Lanes, then: Lanes, otherwise: Lanes) -> Lanes {
        std::array::from_fn(|i| if a[i] < b[i] { then[i] } else { otherwise[i] })
    }
    #[inline(always)]
    unsafe fn power_of_two(exponent: Lanes) -> Lanes {
        exponent.map(|e| f32::from_bits(((e as i32).wrapping_add(127) << 23) as u32))
    }
    #[inline(always)]
    unsafe fn fold_add(a: Lanes) -> f32 {
        fold(a, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn fold_max(a: Lanes) -> f32 {
        fold(a, |a, b| if a > b { a } else { b })
    }
}
