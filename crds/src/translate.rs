//! From the API's types to the protocol's and back: the one place where a map, a proposal and retired copies change their
//! form (PROTOCOL.md §2.2, §3).
//!
//! Invariant: what was written is read back as it was ([`map`]'s round trip test); what cannot be a map is refused with
//! the field that is wrong, and nothing of it is used. Used by the operator and by csi-node, which reads maps as a
//! fallback of the data connection.

mod map;
mod status;

pub use map::{attach_mode, attach_wish_mode};
pub use status::{committed_map, protocol_status, volume_id, write_status};

use lamina_protocol::map::InvalidMap;

use crate::id::Id;
use crate::schema::MOST;

/// Why something in an object is not what the protocol knows. The API server refuses such an object, so only one written
/// around it, or by a newer Lamina, can be the cause: the reader says so and leaves the volume alone.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// Not 32 hexadecimal digits.
    #[error("{field} is not an id of 32 hexadecimal digits")]
    Id {
        /// Which field.
        field: &'static str,
    },
    /// Out of its range.
    #[error("{field} is out of range: {value}")]
    Number {
        /// Which field.
        field: &'static str,
        /// What stands there.
        value: i64,
    },
    /// A size that is not one.
    #[error("{field} is not a size")]
    Size {
        /// Which field.
        field: &'static str,
    },
    /// A running settle that does not say by which copy.
    #[error("a settle is running without its authoritative copy, boot id or beginning")]
    Settle,
    /// A map without its generation, or of another one.
    #[error("status.map is not of status.generation")]
    Generation,
    /// A map that the protocol does not allow.
    #[error(transparent)]
    Map(#[from] InvalidMap),
}

fn id<T>(make: fn(u128) -> T, id: &Id, field: &'static str) -> Result<T, Unreadable> {
    id.value().map(make).ok_or(Unreadable::Id { field })
}

/// A number of the API as one of the protocol, or of a narrower type.
fn number<T: TryFrom<i64>>(value: i64, field: &'static str) -> Result<T, Unreadable> {
    T::try_from(value).map_err(|_| Unreadable::Number { field, value })
}

/// A number of the protocol as the API shows it. Counters never come near the bound of 2^53; one that a broken server
/// reported is cut, because the API server would refuse the whole map for it.
fn shown(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(MOST).min(MOST)
}

#[cfg(test)]
mod tests;
