//! Sizes: from CSI's range, which may be open at either end, to a whole number of blocks.
//!
//! Invariants: a chosen size is a multiple of [`BLOCK_BYTES`], at least what is required and at most what is allowed; growing
//! never shrinks, and growing to what is there already changes nothing.

use tonic::Status;

use crate::v1;

/// The unit of a volume's size: a block of the protocol, bytes.
pub const BLOCK_BYTES: u64 = 4096;

/// A range that can not be met or makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CapacityError {
    /// The caller is wrong: INVALID_ARGUMENT.
    #[error("capacity_range.{field} is negative")]
    Negative {
        /// As spelled in the .proto.
        field: &'static str,
    },
    /// The caller is wrong: INVALID_ARGUMENT.
    #[error("capacity_range.limit_bytes {limit} is below capacity_range.required_bytes {required}")]
    Crossed {
        /// Bytes.
        required: u64,
        /// Bytes.
        limit: u64,
    },
    /// A range of any kind is required here: INVALID_ARGUMENT.
    #[error("capacity_range is required")]
    Missing,
    /// No size of ours lies in the range: OUT_OF_RANGE.
    #[error(
        "the smallest possible size is {smallest} bytes (sizes are multiples of 4096), capacity_range.limit_bytes is {limit}"
    )]
    AboveLimit {
        /// Bytes.
        smallest: u64,
        /// Bytes.
        limit: u64,
    },
    /// More than a volume can have: OUT_OF_RANGE.
    #[error("capacity_range.required_bytes {required} is above the largest volume, {largest} bytes")]
    TooLarge {
        /// Bytes.
        required: u64,
        /// Bytes.
        largest: u64,
    },
}

impl From<CapacityError> for Status {
    fn from(error: CapacityError) -> Self {
        use CapacityError as E;
        match error {
            E::Negative { .. } | E::Crossed { .. } | E::Missing => Status::invalid_argument(error.to_string()),
            E::AboveLimit { .. } | E::TooLarge { .. } => Status::out_of_range(error.to_string()),
        }
    }
}

/// What sizes a volume can have, bytes. All are multiples of [`BLOCK_BYTES`], `smallest ≤ usual ≤ largest`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeSizes {
    /// No volume is smaller.
    pub smallest: u64,
    /// What a caller gets who asks for nothing.
    pub usual: u64,
    /// No volume is larger; at most `i64::MAX`, CSI has no larger number.
    pub largest: u64,
}

/// What a caller wants, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct WantedCapacity {
    required: u64,
    limit: Option<u64>,
}

impl WantedCapacity {
    /// Reads a range that may be absent.
    ///
    /// # Errors
    /// [`CapacityError::Negative`], [`CapacityError::Crossed`].
    pub fn parse(range: Option<&v1::CapacityRange>) -> Result<Self, CapacityError> {
        let Some(range) = range else { return Ok(Self::default()) };
        let required = bytes("required_bytes", range.required_bytes)?;
        let limit = Some(bytes("limit_bytes", range.limit_bytes)?).filter(|limit| *limit > 0);
        match limit {
            Some(limit) if limit < required => Err(CapacityError::Crossed { required, limit }),
            _ => Ok(Self { required, limit }),
        }
    }

    /// Reads a range that must be there and say something.
    ///
    /// # Errors
    /// As [`Self::parse`], and [`CapacityError::Missing`].
    pub fn parse_required(range: Option<&v1::CapacityRange>) -> Result<Self, CapacityError> {
        let wanted = Self::parse(range)?;
        if wanted == Self::default() { Err(CapacityError::Missing) } else { Ok(wanted) }
    }

    /// The size of a new volume, bytes: what is required, rounded up to a block, or the usual size.
    ///
    /// # Errors
    /// [`CapacityError::TooLarge`], [`CapacityError::AboveLimit`].
    pub fn choose(&self, sizes: &VolumeSizes) -> Result<u64, CapacityError> {
        let least = self.least(sizes.smallest, sizes)?;
        if self.required > 0 {
            return Ok(least);
        }
        let most = self.limit.map_or(sizes.usual, |limit| limit / BLOCK_BYTES * BLOCK_BYTES);
        Ok(sizes.usual.min(most).max(least))
    }

    /// The size to grow a volume of `current` bytes to; `current` if it is large enough already.
    ///
    /// # Errors
    /// [`CapacityError::TooLarge`]; [`CapacityError::AboveLimit`], also when the volume is above the limit already.
    pub fn grow(&self, current: u64, sizes: &VolumeSizes) -> Result<u64, CapacityError> {
        self.least(current, sizes)
    }

    /// Whether a volume of `size` bytes is what the caller wants: a repeated CreateVolume finds its volume with this, and
    /// answers ALREADY_EXISTS otherwise.
    #[must_use]
    pub fn admits(&self, size: u64) -> bool {
        size >= self.required && self.limit.is_none_or(|limit| size <= limit)
    }

    fn least(&self, floor: u64, sizes: &VolumeSizes) -> Result<u64, CapacityError> {
        if self.required > sizes.largest {
            return Err(CapacityError::TooLarge { required: self.required, largest: sizes.largest });
        }
        let smallest = self.required.next_multiple_of(BLOCK_BYTES).max(floor);
        match self.limit {
            Some(limit) if limit < smallest => Err(CapacityError::AboveLimit { smallest, limit }),
            _ => Ok(smallest),
        }
    }
}

fn bytes(field: &'static str, value: i64) -> Result<u64, CapacityError> {
    u64::try_from(value).map_err(|_| CapacityError::Negative { field })
}

/// A size as CSI writes it.
///
/// # Panics
/// If it is above `i64::MAX` (8 EiB): [`VolumeSizes::largest`] keeps it below.
#[must_use]
pub fn wire_bytes(size: u64) -> i64 {
    i64::try_from(size).expect("no volume has 8 EiB")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use tonic::Code;

    const MIB: u64 = 1 << 20;
    const SIZES: VolumeSizes = VolumeSizes { smallest: MIB, usual: 1024 * MIB, largest: 1 << 50 };

    fn wanted(required: i64, limit: i64) -> Result<WantedCapacity, CapacityError> {
        WantedCapacity::parse(Some(&v1::CapacityRange { required_bytes: required, limit_bytes: limit }))
    }

    fn chosen(required: i64, limit: i64) -> Result<u64, Code> {
        wanted(required, limit).and_then(|wanted| wanted.choose(&SIZES)).map_err(|error| Status::from(error).code())
    }

    #[test]
    fn a_chosen_size_is_whole_blocks_within_the_range() {
        let mib = MIB as i64;
        for (required, limit, size) in [
            (mib, 0, Ok(MIB)),
            (mib + 1, 0, Ok(MIB + 4096)),
            (mib + 1, mib + 4096, Ok(MIB + 4096)),
            (mib + 1, mib + 4095, Err(Code::OutOfRange)),
            (mib, mib, Ok(MIB)),
            (1, 0, Ok(MIB)),
            (1, 8192, Err(Code::OutOfRange)),
            (0, 0, Ok(1024 * MIB)),
            (0, 2 * mib + 5, Ok(2 * MIB)),
            (0, 4096, Err(Code::OutOfRange)),
            (i64::MAX, 0, Err(Code::OutOfRange)),
            (-1, 0, Err(Code::InvalidArgument)),
            (0, -1, Err(Code::InvalidArgument)),
            (2 * mib, mib, Err(Code::InvalidArgument)),
        ] {
            assert_eq!(chosen(required, limit), size, "required {required}, limit {limit}");
        }
        assert_eq!(WantedCapacity::parse(None).unwrap().choose(&SIZES), Ok(1024 * MIB));
    }

    #[test]
    fn growing_never_shrinks_and_growing_twice_changes_nothing() {
        let mib = MIB as i64;
        assert_eq!(wanted(mib, 0).unwrap().grow(4 * MIB, &SIZES), Ok(4 * MIB));
        let once = wanted(5 * mib + 1, 0).unwrap().grow(4 * MIB, &SIZES).unwrap();
        assert_eq!(once, 5 * MIB + 4096);
        assert_eq!(wanted(5 * mib + 1, 0).unwrap().grow(once, &SIZES), Ok(once));
        let smaller = wanted(mib, 2 * mib).unwrap().grow(4 * MIB, &SIZES).unwrap_err();
        assert_eq!(Status::from(smaller).code(), Code::OutOfRange);
    }

    #[test]
    fn an_expansion_without_a_size_is_refused() {
        let empty = v1::CapacityRange::default();
        for range in [None, Some(&empty)] {
            assert_eq!(WantedCapacity::parse_required(range), Err(CapacityError::Missing));
        }
    }

    #[test]
    fn an_existing_volume_is_recognised_by_its_range() {
        let exact = wanted(4096, 4096).unwrap();
        assert!(exact.admits(4096) && !exact.admits(8192) && !exact.admits(0));
        assert!(wanted(4096, 0).unwrap().admits(1 << 40));
        assert!(WantedCapacity::default().admits(4096));
    }
}
