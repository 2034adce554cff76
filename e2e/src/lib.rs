//! What proves Lamina from the outside: the deterministic simulator.

pub mod sim;
