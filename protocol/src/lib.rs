//! Lamina's protocol, sans-IO: what drivers, storage servers and the operator decide.
//!
//! Absent on purpose: clocks, sockets, files, threads, randomness, hash maps with random order. Time comes in as
//! milliseconds, effects go out as values, so the production programs and the deterministic simulator run the same code.
//! `PROTOCOL.md` is normative; rules are cited by their names there (I1, H7, R5, M2), seeds by paragraph.

pub mod codec;
pub mod control;
pub mod driver;
pub mod geometry;
pub mod ids;
pub mod layer;
pub mod limits;
pub mod management;
pub mod map;
pub mod mutants;
pub mod storage_server;
pub mod time;
pub mod wire;
