//! The one binary encoding: maps, frame bodies, control messages, what a device keeps of a volume.
//!
//! Little endian, fields in the order of their declaration, nothing aligned, nothing optional but what says so:
//!
//! | type | bytes |
//! |---|---|
//! | `u8 u16 u32 u64`, numbers, ids (16 bytes) | themselves |
//! | `bool` | one byte, 0 or 1 |
//! | `Option` | one byte 0, or 1 and the value |
//! | list, text, bytes | `u32` number of elements, then those |
//! | enum | one byte, then the fields of that variant |
//!
//! A reader takes no more memory than the bytes that it was given and refuses what is left over, out of range or unknown.

use bytes::Bytes;

/// Why bytes are not what they should be. The reader drops the message; on a connection it closes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// It ends too early.
    #[error("truncated at byte {at}")]
    Truncated {
        /// Where.
        at: usize,
    },
    /// Something is left over.
    #[error("{left} bytes left over")]
    LeftOver {
        /// How many.
        left: usize,
    },
    /// A tag, flag or text that does not exist.
    #[error("no such {what}: {value}")]
    Unknown {
        /// What was read.
        what: &'static str,
        /// What stood there.
        value: u64,
    },
    /// A number out of its range.
    #[error("{what} out of range: {value}")]
    OutOfRange {
        /// What was read.
        what: &'static str,
        /// What stood there.
        value: u64,
    },
    /// A checksum does not fit.
    #[error("checksum of the {what} does not fit")]
    Checksum {
        /// Header or payload.
        what: &'static str,
    },
}

/// Reads values off the front of a byte string.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    /// The first tag, where it stands elsewhere than before its fields.
    tag: Option<u8>,
}

impl<'a> Reader<'a> {
    /// Starts at the first byte.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0, tag: None }
    }

    /// Reads an enum whose tag stands elsewhere: a frame's kind.
    pub fn tagged(tag: u8, bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0, tag: Some(tag) }
    }

    /// The tag of an enum.
    pub fn tag(&mut self) -> Result<u8, DecodeError> {
        match self.tag.take() {
            Some(tag) => Ok(tag),
            None => u8::take(self),
        }
    }

    /// The next `n` bytes.
    pub fn take(&mut self, n: usize) -> Result<&'a [u8], DecodeError> {
        let end = self.at.checked_add(n).filter(|&end| end <= self.bytes.len());
        let end = end.ok_or(DecodeError::Truncated { at: self.bytes.len() })?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    /// Bytes not read yet.
    pub fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// Fails if anything is left.
    pub fn finish(self) -> Result<(), DecodeError> {
        if self.left() == 0 { Ok(()) } else { Err(DecodeError::LeftOver { left: self.left() }) }
    }
}

/// A value with an encoding.
pub trait Wire: Sized {
    /// Appends it.
    fn put(&self, out: &mut Vec<u8>);
    /// Reads it.
    fn take(from: &mut Reader<'_>) -> Result<Self, DecodeError>;
}

/// The encoding of a value.
pub fn encode<T: Wire>(value: &T) -> Vec<u8> {
    let mut out = Vec::with_capacity(256);
    value.put(&mut out);
    out
}

/// The value that exactly these bytes encode.
pub fn decode<T: Wire>(bytes: &[u8]) -> Result<T, DecodeError> {
    let mut reader = Reader::new(bytes);
    let value = T::take(&mut reader)?;
    reader.finish()?;
    Ok(value)
}

macro_rules! wire_integer {
    ($($int:ty),*) => {$(
        impl Wire for $int {
            fn put(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_le_bytes());
            }
            fn take(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
                let bytes = from.take(size_of::<$int>())?;
                Ok(<$int>::from_le_bytes(bytes.try_into().expect("as many as asked for")))
            }
        }
    )*};
}
wire_integer!(u8, u16, u32, u64, u128);

macro_rules! wire_newtype {
    ($($name:path),* $(,)?) => {$(
        impl Wire for $name {
            fn put(&self, out: &mut Vec<u8>) {
                self.0.put(out);
            }
            fn take(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
                Ok(Self(Wire::take(from)?))
            }
        }
    )*};
}
wire_newtype!(
    crate::ids::ClusterId,
    crate::ids::VolumeId,
    crate::ids::LayerId,
    crate::ids::CopyId,
    crate::ids::ServerId,
    crate::ids::DeviceId,
    crate::ids::SessionId,
    crate::ids::BootId,
    crate::ids::Generation,
    crate::ids::Incarnation,
    crate::ids::OpenNumber,
    crate::ids::Seq,
);

impl Wire for bool {
    fn put(&self, out: &mut Vec<u8>) {
        out.push(u8::from(*self));
    }
    fn take(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
        match u8::take(from)? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(DecodeError::Unknown { what: "flag", value: other.into() }),
        }
    }
}

impl<T: Wire> Wire for Option<T> {
    fn put(&self, out: &mut Vec<u8>) {
        self.is_some().put(out);
        if let Some(value) = self {
            value.put(out);
        }
    }
    fn take(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
        if bool::take(from)? { T::take(from).map(Some) } else { Ok(None) }
    }
}

/// Reads the length of a list; each element takes at least one byte, so a longer one is refused before any is read.
fn take_length(from: &mut Reader<'_>) -> Result<usize, DecodeError> {
    let length = u32::take(from)? as usize;
    if length > from.left() { Err(DecodeError::Truncated { at: from.bytes.len() }) } else { Ok(length) }
}

impl<T: Wire> Wire for Vec<T> {
    fn put(&self, out: &mut Vec<u8>) {
        (self.len() as u32).put(out);
        for value in self {
            value.put(out);
        }
    }
    fn take(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let length = take_length(from)?;
        // Grown as elements come, for an element in memory may be much larger than its bytes.
        let mut values = Vec::with_capacity(length.min(64));
        for _ in 0..length {
            values.push(T::take(from)?);
        }
        Ok(values)
    }
}

impl<A: Wire, B: Wire> Wire for (A, B) {
    fn put(&self, out: &mut Vec<u8>) {
        self.0.put(out);
        self.1.put(out);
    }
    fn take(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
        Ok((A::take(from)?, B::take(from)?))
    }
}

impl Wire for String {
    fn put(&self, out: &mut Vec<u8>) {
        (self.len() as u32).put(out);
        out.extend_from_slice(self.as_bytes());
    }
    fn take(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let length = take_length(from)?;
        let bytes = from.take(length)?;
        std::str::from_utf8(bytes)
            .map(str::to_owned)
            .map_err(|e| DecodeError::Unknown { what: "text", value: e.valid_up_to() as u64 })
    }
}

impl Wire for Bytes {
    fn put(&self, out: &mut Vec<u8>) {
        (self.len() as u32).put(out);
        out.extend_from_slice(self);
    }
    fn take(from: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let length = take_length(from)?;
        from.take(length).map(Bytes::copy_from_slice)
    }
}

/// Derives [`Wire`] for a struct: its fields in this order.
macro_rules! wire_struct {
    ($name:ident { $($field:ident),* $(,)? }) => {
        impl $crate::codec::Wire for $name {
            fn put(&self, out: &mut Vec<u8>) {
                let _ = &out;
                $($crate::codec::Wire::put(&self.$field, out);)*
            }
            fn take(from: &mut $crate::codec::Reader<'_>) -> Result<Self, $crate::codec::DecodeError> {
                let _ = &from;
                Ok(Self { $($field: $crate::codec::Wire::take(from)?),* })
            }
        }
    };
}

/// Derives [`Wire`] for an enum: the tag of the variant, then its named fields in this order.
macro_rules! wire_enum {
    ($name:ident { $($tag:literal = $variant:ident $({ $($field:ident),* $(,)? })? $(( $inner:ident ))?),* $(,)? }) => {
        impl $crate::codec::Wire for $name {
            fn put(&self, out: &mut Vec<u8>) {
                match self {
                    $(Self::$variant $({ $($field),* })? $(( $inner ))? => {
                        out.push($tag);
                        $($($crate::codec::Wire::put($field, out);)*)?
                        $($crate::codec::Wire::put($inner, out);)?
                    })*
                }
            }
            fn take(from: &mut $crate::codec::Reader<'_>) -> Result<Self, $crate::codec::DecodeError> {
                match from.tag()? {
                    $($tag => Ok(
                        Self::$variant $({ $($field: $crate::codec::Wire::take(from)?),* })?
                        $(({ let $inner = $crate::codec::Wire::take(from)?; $inner }))?
                    ),)*
                    other => Err($crate::codec::DecodeError::Unknown { what: stringify!($name), value: other.into() }),
                }
            }
        }
    };
}

pub(crate) use {wire_enum, wire_struct};

mod map {
    use crate::map::*;
    wire_struct!(ServerEntry { id, addresses });
    wire_struct!(Placement { groups });
    wire_struct!(Group { members, loss, settle });
    wire_enum!(Settle { 0 = None, 1 = Running { authoritative, boot, begun }, 2 = Over });
    wire_enum!(MemberState { 1 = Active, 2 = Syncing, 3 = Failed });
    wire_struct!(Member { ordinal, copy, server, boot, state, avoid, unpromised });
    wire_enum!(Scheme { 1 = Replicate });
    wire_struct!(Layer { id, size, page_bytes, scheme, chunk_bytes, placement, sealed });
    wire_enum!(AccessMode { 1 = ReadWrite, 2 = ReadOnly });
    wire_enum!(Standing { 1 = Admitted, 2 = Held });
    wire_struct!(Session { id, node, mode, incarnation, handled, standing });
    wire_struct!(Revocation { session, below, ranges });
    wire_struct!(VolumeMap {
        format,
        required_features,
        volume,
        generation,
        size,
        multi_session,
        servers,
        placements,
        layers,
        sessions,
        revoked,
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_list_longer_than_its_bytes_is_refused_before_it_is_read() {
        assert_eq!(decode::<Vec<u64>>(&[0xff, 0xff, 0xff, 0xff, 1]), Err(DecodeError::Truncated { at: 5 }));
        assert_eq!(decode::<u16>(&[1, 2, 3]), Err(DecodeError::LeftOver { left: 1 }));
        assert!(matches!(decode::<bool>(&[2]), Err(DecodeError::Unknown { .. })));
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = decode::<crate::map::VolumeMap>(&bytes);
        }
    }
}
