//! Whole changes against fake servers and a fake store, each test named for the guarantee it holds.
#![allow(clippy::unwrap_used)]

mod changes;
mod fake;
mod force;
mod leaders;
mod loss;
mod paces;
mod plans;
mod progress;
mod restored;
mod shape;
mod stale;
mod walk;
