//! Ids and encoded values between messages and domain types.
//!
//! Invariant: what does not read back exactly is refused with the field's name.

use lamina_protocol::codec::{self, DecodeError, Wire};

/// Why a message of the other side cannot be used. The stream or call that brought it ends with INVALID_ARGUMENT.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// An id of another length than 16 bytes.
    #[error("{field} is not an id of 16 bytes")]
    Id {
        /// Of which field.
        field: &'static str,
    },
    /// Bytes that do not decode.
    #[error("{field}: {why}")]
    Encoding {
        /// Of which field.
        field: &'static str,
        /// What is wrong with them.
        why: DecodeError,
    },
    /// A word where another one is due: no `hello` first, a second one, or none at all.
    #[error("a word out of turn")]
    OutOfTurn,
}

impl From<Malformed> for tonic::Status {
    fn from(why: Malformed) -> Self {
        Self::invalid_argument(why.to_string())
    }
}

/// An id as bytes; none is empty.
pub fn id_bytes(id: u128) -> Vec<u8> {
    if id == 0 { Vec::new() } else { id.to_le_bytes().to_vec() }
}

/// An id from bytes; empty is none (0).
pub fn id_from(field: &'static str, bytes: &[u8]) -> Result<u128, Malformed> {
    if bytes.is_empty() {
        return Ok(0);
    }
    bytes.try_into().map(u128::from_le_bytes).map_err(|_| Malformed::Id { field })
}

/// A value from the protocol's encoding.
pub fn value_from<T: Wire>(field: &'static str, bytes: &[u8]) -> Result<T, Malformed> {
    codec::decode(bytes).map_err(|why| Malformed::Encoding { field, why })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_reads_back_and_other_lengths_are_refused() {
        for id in [0, 1, u128::MAX] {
            assert_eq!(id_from("volume", &id_bytes(id)), Ok(id));
        }
        assert_eq!(id_from("volume", &[1, 2, 3]), Err(Malformed::Id { field: "volume" }));
    }
}
