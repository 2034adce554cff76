//! The operator: keeps the maps of all volumes true (PROTOCOL.md §3; seed 002 Fig. 6).
//!
//! Decisions are made in `lamina_protocol::management`; this crate is its eyes and hands. [`runtime`] owns the leader's
//! state machine and carries out what it says, over any [`store`] with compare-and-swap: Kubernetes objects
//! ([`kubernetes`]) or a directory of files ([`directory`]). Invariant: whatever the leader writes is guarded by what it
//! read; losing an answer, a watch event or the whole process never loses more than time.
//!
//! Absent on purpose: any decision about maps, any safety that rests on the Lease.

pub mod admin;
pub mod csi;
pub mod directory;
pub mod front;
pub mod index;
pub mod kubernetes;
pub mod metrics;
mod pv;
pub mod replacement;
pub mod runtime;
pub mod store;
pub mod summary;
pub mod translate;

/// A random 128-bit value that is never 0: ids are minted by programs, never by the core.
#[must_use]
pub fn mint() -> u128 {
    loop {
        let id = rand::random::<u128>();
        if id != 0 {
            return id;
        }
    }
}
