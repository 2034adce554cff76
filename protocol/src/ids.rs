//! Identity: random 128-bit values minted once and never reused (PROTOCOL.md, Identity).
//!
//! Nothing that matters is keyed by a name, a Kubernetes UID, a pod, a path or an address. This module mints nothing:
//! the core has no randomness of its own, programs pass minted ids in.

use std::fmt;
use std::str::FromStr;

/// A text that is not 32 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an id is 32 hexadecimal digits")]
pub struct NotAnId;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u128);

        impl $name {
            /// The value that names nothing.
            pub const NONE: Self = Self(0);

            /// Whether this names nothing.
            pub fn is_none(self) -> bool {
                self.0 == 0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({:x})", stringify!($name), self.0)
            }
        }

        impl FromStr for $name {
            type Err = NotAnId;
            fn from_str(text: &str) -> Result<Self, NotAnId> {
                if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
                    return Err(NotAnId);
                }
                u128::from_str_radix(text, 16).map(Self).map_err(|_| NotAnId)
            }
        }
    };
}

id!(
    /// One installation of Lamina; a device of another cluster is refused.
    ClusterId
);
id!(
    /// A volume; also the CSI volume handle.
    VolumeId
);
id!(
    /// One translucent layer of pages.
    LayerId
);
id!(
    /// One member's share of one group of one placement, with all layers of it.
    CopyId
);
id!(
    /// A storage server, minted when its first device is formatted and kept in every superblock of it.
    ServerId
);
id!(
    /// A device of a storage server.
    DeviceId
);
id!(
    /// One attachment of a volume to a node.
    SessionId
);
id!(
    /// One opening of one device by one process (R3): any new process is a restart.
    BootId
);

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        impl $name {
            /// The one after this. 2^64 of them are never used up.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.0)
            }
        }
    };
}

number!(
    /// The data storage configuration identifier (seed 002 \[0025\]): a logical time stamp of one volume's map.
    /// 0 = no map yet; the first map is generation 1.
    Generation
);
number!(
    /// Which process of a session acts: the one that takes over a device opens with one more (H20). First is 1.
    Incarnation
);
number!(
    /// Counts the `Open`s of one (session, incarnation) (H1, R7). First is 1.
    OpenNumber
);
number!(
    /// Counts the write attempts of one (session, incarnation); the token of an acknowledgement. First is 1.
    Seq
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_reads_back_from_its_text() {
        let id = VolumeId(0x0123_4567_89ab_cdef_0000_0000_0000_00ff);
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!("12".parse::<VolumeId>(), Err(NotAnId));
        assert_eq!("+123456789abcdef0123456789abcdef0".parse::<VolumeId>(), Err(NotAnId));
    }
}
