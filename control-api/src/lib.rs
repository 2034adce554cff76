//! The conversation of the operator's leader with storage servers and drivers: gRPC that carries the protocol's own binary
//! encoding, with typed ends.
//!
//! Invariants: nothing undecoded leaves this crate, in either direction; every queue is bounded and what a full one means is
//! said where it is made; a broken stream is told to the caller, who reconnects under its own rules. Nothing here decides:
//! generations and `Lease` numbers are in the messages (PROTOCOL.md §3), so a deposed leader's words cannot harm.
//!
//! Absent on purpose: block requests (those go over [`lamina_protocol::wire`]), retries, discovery of addresses.

pub mod accept;
pub mod edge;
pub mod leader;
pub mod storage;

/// Messages and services as generated from `proto/lamina/control/v1`.
pub mod v1 {
    #![allow(missing_docs, unreachable_pub, clippy::all, clippy::large_futures)]
    include!(concat!(env!("OUT_DIR"), "/lamina.control.v1.rs"));
}

/// The version of the conversation that this code speaks.
pub const VERSION: u32 = 1;

/// Longest message of a session, bytes: an inventory of 64 Ki copies.
pub const MAX_SESSION_MESSAGE_BYTES: usize = 4 << 20;

/// Longest message of the leader's service, bytes: a map and room for its envelope.
pub const MAX_LEADER_MESSAGE_BYTES: usize = lamina_protocol::limits::MAX_MAP_BYTES + (1 << 10);
