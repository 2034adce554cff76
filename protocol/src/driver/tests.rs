//! The driver against servers played by hand: each test is a guarantee, most of them a list of `counter-examples.md`.
#![allow(clippy::unwrap_used)]

mod bench;
mod loss;
mod ordering;
mod reading;
mod sessions;
mod writing;
mod written;
