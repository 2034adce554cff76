//! The storage server's state machine.
pub mod medium;
