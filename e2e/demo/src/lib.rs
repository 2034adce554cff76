//! Lamina at work on a real Kubernetes on this machine: PostgreSQL on a 2-copy striped volume, a storage server killed
//! while it holds a copy that was just written, and every commit that a client was told of found again on another node.
//!
//! Invariant: what counts as kept is decided by a log outside the volume, written and synced only after the database
//! has acknowledged a commit ([`log`], [`commits`]); [`check`] reads nothing but that log and the database. The story
//! ([`run`]) ends with an error at the first thing that is not as promised.

pub mod check;
pub mod commits;
pub mod door;
pub mod faults;
pub mod images;
pub mod install;
pub mod kube;
pub mod log;
pub mod moved;
pub mod objects;
pub mod run;
pub mod say;
